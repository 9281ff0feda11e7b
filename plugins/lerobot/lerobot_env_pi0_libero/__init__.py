"""LIBERO for `lerobot-eval`, on the engine of ript-pi0.

    lerobot-eval --policy.path=DIR --env.type=pi0_libero --env.task=libero_spatial --eval.n_episodes=50 --eval.batch_size=10

It stands in the place of LeRobot's own `--env.type=libero`: the same keys, and what a policy gets and gives is the same.

* `observation.images.image` and `image2`: the agent's and the hand's camera, turned by 180 degrees, as LeRobot's
  `LiberoProcessorStep` turns them.
* `observation.state`, 8: position of the hand 3 (m), its axis-angle 3 (rad), fingers 2 (m).
* `action`, 7: as of LIBERO's controller in its mode `relative`, -1 to 1.
* Episode k of a task starts at its recorded initial state k, after ten steps of standing still. It ends with success, or
  after as many steps as with LeRobot.

What differs: fixtures (cabinet, stove) stand where LIBERO's own evaluation puts them, whatever LeRobot's seed. An episode
that has ended costs nothing while others of its batch go on. Absolute actions and XVLA's policies, which read more of the
robot than the state above, are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from pi0.libero.gym_env import VIDEO_FPS, LIBEROVectorEnv
from pi0.libero.suites import Task, base_suite, find_tasks
from pi0.workers.pool import usable_cores

# Steps after which LeRobot 0.6.1 ends an episode (TASK_SUITE_MAX_STEPS in lerobot/envs/libero.py). Others: the suite's own.
MAX_STEPS = {"libero_spatial": 280}
CAMERAS = {"agentview_image": "base_0_rgb", "robot0_eye_in_hand_image": "left_wrist_0_rgb"}
NAMES = {"agentview_image": "image", "robot0_eye_in_hand_image": "image2"}


@EnvConfig.register_subclass("pi0_libero")
@dataclass
class Pi0LiberoEnv(EnvConfig):
    """Keys of LeRobot's `LiberoEnv`, and what only this engine has.

    Attributes:
        task: a suite, or several with commas: libero_spatial, libero_object, libero_goal, libero_10, libero_90, and
            changed ones such as libero_pro/spatial_swap.
        task_ids: tasks of each suite; None for all.
        episode_length: steps after which an episode ends; None for LeRobot's number of the suite.
        obs_type: `pixels_agent_pos`, or `pixels` without the state.
        camera_name, camera_name_mapping: LIBERO's names of the cameras, with commas; what policies call them.
        observation_height, observation_width: pixels; frames are square.
        assets: folder of LIBERO's assets, `standins`, or None to look for them.
        render: `exact` as LIBERO draws, or `fast`.
        fixtures: where fixtures stand, `libero_eval` or `pinned`.
        workers: processes that simulate; None for one on each core.
    """

    task: str | None = "libero_spatial"
    task_ids: list[int] | None = None
    fps: int = VIDEO_FPS
    episode_length: int | None = None
    obs_type: str = "pixels_agent_pos"
    camera_name: str = ",".join(CAMERAS)
    camera_name_mapping: dict[str, str] | None = None
    observation_height: int = 360
    observation_width: int = 360
    assets: str | None = None
    render: str = "exact"
    fixtures: str = "libero_eval"
    workers: int | None = None
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fps != VIDEO_FPS:
            raise ValueError(f"fps is {self.fps}; LIBERO's control steps are 50 ms, so it is {VIDEO_FPS}")
        if self.observation_height != self.observation_width:
            raise ValueError(
                f"observation_height is {self.observation_height} and observation_width {self.observation_width}; "
                "frames are square"
            )
        if self.obs_type not in ("pixels_agent_pos", "pixels"):
            raise ValueError(f"obs_type is {self.obs_type!r}; use pixels_agent_pos or pixels")
        names = NAMES | (self.camera_name_mapping or {})
        self.cameras: dict[str, str] = {}  # what policies call them, and the engine
        for name in (name.strip() for name in self.camera_name.split(",")):
            if name not in CAMERAS:
                raise ValueError(f"unknown camera {name!r} in camera_name; known: {', '.join(CAMERAS)}")
            self.cameras[names[name]] = CAMERAS[name]
        image = PolicyFeature(FeatureType.VISUAL, (self.observation_height, self.observation_width, 3))
        # LeRobot looks for a key of `features` in its data sets' frames, and for what it maps to in policies.
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, (7,))}
        self.features |= {f"{OBS_IMAGES}.{name}": image for name in self.cameras}
        self.features_map = {key: key for key in self.features}
        if self.obs_type == "pixels_agent_pos":
            self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (8,))
            self.features_map["agent_pos"] = OBS_STATE

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """What the engine's environments get."""
        return {
            "cameras": list(self.cameras.values()),
            "image_size": self.observation_height,
            "render": self.render,
            "assets": self.assets,
            "fixtures": self.fixtures,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = True) -> dict[str, dict[int, VectorEnv]]:
        """{suite: {task: its environments}}; their processes begin with the first `reset`.

        Args:
            n_envs: environments of a task.
            use_async_envs: not looked at; the engine has worker processes of its own.
        Raises:
            UnknownTaskError: no such suite, or no such task in it.
        """
        suites = [suite.strip() for suite in (self.task or "").split(",")]
        return {
            suite: {
                task.index: TaskEnvs(task, n_envs, self) for task in find_tasks(suite, self.task_ids or [])
            }
            for suite in suites
        }


class TaskEnvs(VectorEnv):
    """Environments of one task as LeRobot's rollouts use them; one that has ended stays as it is until `reset`.

    Args:
        task: the task.
        num_envs: environments.
        config: how they are made.
    """

    def __init__(self, task: Task, num_envs: int, config: Pi0LiberoEnv):
        self.num_envs = num_envs
        self.metadata = {
            "render_modes": ["rgb_array"], "render_fps": VIDEO_FPS, "autoreset_mode": AutoresetMode.DISABLED,
        }  # fmt: skip
        self.render_mode = "rgb_array"
        self._task, self._config = task, config
        self._steps = config.episode_length or MAX_STEPS.get(base_suite(task.suite), task.horizon)
        self._envs: LIBEROVectorEnv | None = None
        self._next_state = 0
        side = config.observation_height
        image = gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)
        spaces: dict[str, gymnasium.Space] = {
            "pixels": gymnasium.spaces.Dict({name: image for name in config.cameras})
        }
        if config.obs_type == "pixels_agent_pos":
            spaces["agent_pos"] = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self.single_observation_space = gymnasium.spaces.Dict(spaces)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None):
        """Start all at the next recorded states; what follows depends on these and the actions alone, not on `seed`."""
        if self._envs is None:
            self._envs = LIBEROVectorEnv(
                self.num_envs,
                self._task.suite,
                self._task.index,
                workers=self._config.workers or usable_cores(),
                autoreset=False,
                horizon=self._steps,
                **self._config.gym_kwargs,
            )
        states = (self._next_state + np.arange(self.num_envs)) % self._envs.init_states
        self._next_state += self.num_envs
        observations, infos = self._envs.reset(options={"init_state": states})
        return self._turned(observations), self._infos(infos)

    def step(self, actions: np.ndarray):
        """One control step of each environment whose episode goes on."""
        if self._envs is None:
            raise gymnasium.error.ResetNeeded("call reset before step: no episode is running")
        observations, rewards, terminated, truncated, infos = self._envs.step(actions)
        return self._turned(observations), rewards, terminated, truncated, self._infos(infos)

    def render(self) -> tuple[np.ndarray, ...]:
        """The first camera's frame of each environment, as policies see it, uint8 [height, width, 3]."""
        return tuple(next(iter(self._seen["pixels"].values())))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What LeRobot asks every environment for."""
        if name == "render":
            return self.render()
        known = {
            "task": self._task.name,
            "task_description": self._task.prompt,
            "_max_episode_steps": self._steps,
        }
        if name not in known:
            raise AttributeError(f"pi0_libero has no {name!r}; it has render, {', '.join(known)}")
        return (known[name],) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `call`."""
        return self.call(name)

    def close(self, **kwargs: Any) -> None:
        """End the workers. The next `reset` begins again with the first state, as where LeRobot scores while it trains."""
        if self._envs is not None:
            self._envs.close()
        self._envs, self._next_state = None, 0

    def _turned(self, observations: dict[str, Any]) -> dict[str, Any]:
        # The engine's frames are upright and true; LIBERO's, which are upside down, turned by 180 degrees are mirrored.
        frames = observations["images"]
        pixels = {
            name: np.ascontiguousarray(frames[camera][:, :, ::-1])
            for name, camera in self._config.cameras.items()
        }
        self._seen = {"pixels": pixels}
        if self._config.obs_type == "pixels_agent_pos":
            self._seen["agent_pos"] = observations["state"]
        return self._seen

    def _infos(self, infos: dict[str, Any]) -> dict[str, Any]:
        return {
            "is_success": infos["success"],
            "_is_success": infos["_success"],
            "init_state": infos["init_state"],
        }
