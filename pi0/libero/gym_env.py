"""LIBERO tasks as Gymnasium environments, on this package's engine.

    import gymnasium
    import pi0.libero.gym_env

    env = gymnasium.make("pi0/LIBERO-v0", suite="libero_spatial", task=3)
    envs = gymnasium.make_vec("pi0/LIBERO-v0", num_envs=8, vectorization_mode="vector_entry_point", task=3)

With vectorization_mode="async" the processes must be spawned if this one draws as well:
vector_kwargs={"context": "spawn"}.

One action is one control step of 50 ms. The reward is 1 in the step in which LIBERO's goal is reached, else 0;
that step terminates the episode, the horizon truncates it. `reset` draws one of LIBERO's recorded initial
states, or takes `options={"init_state": index}`; what follows depends on that state and the actions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pi0.base.typed_yaml import unfit_values
from pi0.libero import gl
from pi0.libero.assets import resolve_assets
from pi0.libero.episodes import ACTION_DIM, STATE_DIM, Rollout
from pi0.libero.init_states import InitStatePool, evaluation_pools
from pi0.libero.rendering import CAMERAS
from pi0.libero.rollouts import RolloutPool
from pi0.libero.settings import TaskConfig
from pi0.libero.suites import find_tasks
from pi0.libero.worker import VIDEO_CAMERA, VIDEO_SIZE, Worker, WorkerSpec
from pi0.workers.process import WorkerError

VIDEO_FPS = 20  # control steps a second


def _spaces(spec: WorkerSpec) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
    image = gymnasium.spaces.Box(0, 255, (spec.image_size, spec.image_size, 3), np.uint8)
    state = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
    observation = {
        "images": gymnasium.spaces.Dict({camera: image for camera in spec.cameras}),
        "state": state,
    }
    return gymnasium.spaces.Dict(observation), gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def _check_ranges(**settings: Any) -> None:
    """Raise `ValueError` for numbers and words that a configuration's section `task` would refuse as well."""
    if problems := unfit_values(TaskConfig(**settings)):
        raise ValueError(problems[0].replace("max_episode_length", "horizon"))


def _check_actions(actions: np.ndarray, space: gymnasium.Space) -> np.ndarray:
    """The actions as float32; raises `ValueError` unless they are finite numbers of the space's shape."""
    actions = np.asarray(actions, np.float32)
    if actions.shape != space.shape:
        raise ValueError(f"actions have shape {actions.shape}; the action space has {space.shape}")
    if not np.isfinite(actions).all():
        raise ValueError("an action is not finite: the policy's numbers overflowed or are NaN")
    return actions


def _spec(cameras: Sequence[str], image_size: int, render: str, assets: str | None, slots: int) -> WorkerSpec:
    unknown = [camera for camera in cameras if camera not in CAMERAS]
    if unknown or not cameras:
        raise ValueError(f"unknown cameras {unknown}; known: {', '.join(CAMERAS)}")
    return WorkerSpec(
        assets=resolve_assets(assets),
        cameras=tuple(cameras),
        image_size=image_size,
        render=render,
        slots=slots,
        chunk=1,
        max_open_tasks=1,
    )


def _rollout(
    states: InitStatePool,
    random: np.random.Generator,
    options: dict[str, Any] | None,
    settle_steps: int,
    horizon: int | None,
) -> Rollout:
    index = (options or {}).get("init_state")
    if index is None:
        index = int(random.integers(len(states)))
    if not 0 <= index < len(states):
        raise ValueError(f"init_state is {index}; {states.task.name} has states 0 to {len(states) - 1}")
    return Rollout(
        task=states.task,
        init=states.states[index],
        init_index=index,
        noise_key=(),
        horizon=states.task.horizon if horizon is None else horizon,
        settle_steps=settle_steps,
        keep_last=True,
    )


class _InProcess:
    """As much of a `RolloutPool` as initial states need, without processes."""

    def __init__(self, spec: WorkerSpec, worker: Worker):
        self.spec = spec
        self._worker = worker

    def call(
        self, function: Callable[..., Any], argument_lists: Sequence[tuple]
    ) -> Iterator[tuple[int, Any]]:
        for index, arguments in enumerate(argument_lists):
            yield index, function(self._worker, *arguments)


class LIBEROEnv(gymnasium.Env):
    """One environment in this process.

    Observations: `images`, by camera uint8 [image_size, image_size, 3], upright; `state`, float32 [8],
    end-effector position 3 (m), axis-angle 3 (rad), gripper 2 (m). Actions: float32 [7] in [-1, 1], end-effector
    translation 3 (5 cm at 1), rotation 3 (0.5 rad at 1), gripper (-1 opens, 1 closes). `info` holds
    `instruction`, `init_state` and `success`.

    Args:
        suite, task: the task by name or index.
        cameras: any of `pi0.libero.rendering.CAMERAS`.
        image_size: pixels a side.
        render: `fast` or `exact`, how observations are drawn.
        assets: folder of LIBERO's assets, `standins`, or None to look for them.
        fixtures: placement of fixtures, a key of `pi0.libero.init_states.FIXTURE_MODES`.
        settle_steps: control steps of standing still before an episode.
        horizon: control steps after which an episode is truncated; None for the suite's usual one.
        render_mode: `rgb_array` or None.
    Raises:
        ValueError: an argument is none of those named here.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": VIDEO_FPS}  # noqa: RUF012

    def __init__(
        self,
        suite: str = "libero_spatial",
        task: str | int = 0,
        *,
        cameras: Sequence[str] = tuple(CAMERAS),
        image_size: int = 128,
        render: str = "fast",
        assets: str | None = None,
        fixtures: str = "libero_eval",
        settle_steps: int = 10,
        horizon: int | None = None,
        render_mode: str | None = None,
    ):
        gl.select_backend()
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}; use rgb_array or None")
        _check_ranges(
            image_size=image_size,
            render=render,
            fixtures=fixtures,
            settle_steps=settle_steps,
            max_episode_length=horizon,
        )
        self.render_mode = render_mode
        (self.task,) = find_tasks(suite, [task])
        spec = _spec(cameras, image_size, render, assets, slots=1)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.arrays().items()}
        self._worker = Worker(spec, self._arrays, np.random.default_rng())
        (self._states,) = evaluation_pools(_InProcess(spec, self._worker), [self.task], fixtures)
        self._settle_steps, self._horizon = settle_steps, horizon
        self.observation_space, self.action_space = _spaces(spec)
        self._rollout: Rollout | None = None
        self._running = self._moved = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start at a recorded initial state: `options["init_state"]`, or one drawn with `seed`."""
        super().reset(seed=seed)
        self._rollout = _rollout(self._states, self.np_random, options, self._settle_steps, self._horizon)
        self._worker.start(0, self._rollout)
        self._running, self._moved = True, False
        return self._observation(), self._info(success=False)

    def step(self, action: np.ndarray):
        """One control step."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("call reset before step: no episode is running")
        self._arrays["actions"][0, 0] = _check_actions(action, self.action_space)
        progress = self._worker.act(0, 1)
        self._running, self._moved = not progress.done, True
        truncated = progress.done and not progress.success
        return (
            self._observation(),
            float(progress.success),
            progress.success,
            truncated,
            self._info(progress.success),
        )

    def render(self) -> np.ndarray | None:
        """The agent's view, uint8 [256, 256, 3]."""
        if self.render_mode is None or self._rollout is None:
            return None
        sim, renderer = self._worker.open(self.task)
        if (
            not self._moved
        ):  # a worker remembers how episodes begin, and may have left the scene where another ended
            sim.reset(self._rollout.init, self._rollout.settle_steps)
        frame = np.empty((VIDEO_SIZE, VIDEO_SIZE, 3), np.uint8)
        renderer.render(sim.data, VIDEO_CAMERA, frame)
        return frame

    def close(self) -> None:
        """Free scene and GL context."""
        self._worker.close()

    def _observation(self) -> dict[str, Any]:
        images = {
            camera: self._arrays["images"][0, i].copy() for i, camera in enumerate(self._worker.spec.cameras)
        }
        return {"images": images, "state": self._arrays["states"][0].copy()}

    def _info(self, success: bool) -> dict[str, Any]:
        assert self._rollout is not None
        return {
            "instruction": self.task.prompt,
            "init_state": self._rollout.init_index,
            "success": success,
        }


class LIBEROVectorEnv(VectorEnv):
    """Environments of one task in worker processes, stepped together.

    Observations and actions as in `LIBEROEnv`, with a leading dimension of `num_envs`. Environment i of
    `reset(seed=s)` draws what a `LIBEROEnv` draws after `reset(seed=s + i)`. Autoreset is gymnasium's
    `NEXT_STEP`: the step after an episode's last ignores its action and returns the next episode's first
    observation, with reward 0. With `autoreset=False` it is `DISABLED`: an environment whose episode has ended stays
    as it is, with reward 0, until `reset`; `options["reset_mask"]`, bool [num_envs], says which ones that starts.

    Args:
        num_envs: environments in all.
        workers: processes that share them.
        autoreset: start the next episode where one has ended.
        Others: as in `LIBEROEnv`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": [],
        "render_fps": VIDEO_FPS,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 2,
        suite: str = "libero_spatial",
        task: str | int = 0,
        *,
        workers: int = 2,
        autoreset: bool = True,
        cameras: Sequence[str] = tuple(CAMERAS),
        image_size: int = 128,
        render: str = "fast",
        assets: str | None = None,
        fixtures: str = "libero_eval",
        settle_steps: int = 10,
        horizon: int | None = None,
        render_mode: None = None,
    ):
        if num_envs < 1 or workers < 1:
            raise ValueError(f"num_envs is {num_envs} and workers is {workers}; both must be at least 1")
        if render_mode is not None:
            raise ValueError("only single environments render (LIBEROEnv)")
        _check_ranges(
            image_size=image_size,
            render=render,
            fixtures=fixtures,
            settle_steps=settle_steps,
            max_episode_length=horizon,
        )
        self.num_envs, self.render_mode = num_envs, None
        (self.task,) = find_tasks(suite, [task])
        workers = min(workers, num_envs)
        spec = _spec(cameras, image_size, render, assets, slots=-(-num_envs // workers))
        self._pool = RolloutPool(spec, workers)
        (self._states,) = evaluation_pools(self._pool, [self.task], fixtures)
        self._settle_steps, self._horizon = settle_steps, horizon
        self._autoreset = autoreset
        mode = AutoresetMode.NEXT_STEP if autoreset else AutoresetMode.DISABLED
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = _spaces(spec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._randoms = [gymnasium.utils.seeding.np_random()[0] for _ in range(num_envs)]
        self._init_states = np.zeros(num_envs, np.int64)
        self._ended, self._succeeded = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        self._running = False  # until the first reset, and after a worker was lost with its episodes

    @property
    def instruction(self) -> str:
        """What the robot is told to do."""
        return self.task.prompt

    @property
    def init_states(self) -> int:
        """How many recorded initial states the task has."""
        return len(self._states)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        """Start all environments, or those of `options["reset_mask"]`.

        `options["init_state"]` is one index for all, or one for each.
        """
        seeds = (
            seed
            if isinstance(seed, list)
            else [seed if seed is None else seed + i for i in range(self.num_envs)]
        )
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(
                f"reset_mask is {mask.dtype} {list(mask.shape)}; bool [{self.num_envs}] is needed"
            )
        if not mask.all() and not self._running:
            raise gymnasium.error.ResetNeeded("no episode is running: reset without reset_mask")
        for i in np.flatnonzero(mask).tolist():
            if seeds[i] is not None:
                self._randoms[i] = gymnasium.utils.seeding.np_random(seeds[i])[0]
        given = (options or {}).get("init_state")
        wanted = [None] * self.num_envs if given is None else np.broadcast_to(given, self.num_envs).tolist()
        self._advance({i: self._start(i, wanted[i]) for i in np.flatnonzero(mask).tolist()})
        return self._observations(), self._infos()

    def step(self, actions: np.ndarray):
        """One control step of every environment; those whose episode ended in the step before start another."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("call reset before step: no episode is running")
        actions = _check_actions(actions, self.action_space)
        for i in range(self.num_envs):
            worker, slot = self._place(i)
            self._pool.arrays[worker]["actions"][slot, 0] = actions[i]
        commands: dict[int, Rollout | int] = {i: 1 for i in np.flatnonzero(~self._ended).tolist()}
        if self._autoreset:
            commands |= {i: self._start(i, None) for i in np.flatnonzero(self._ended).tolist()}
        rewards = self._advance(commands)
        success = self._succeeded.copy()
        return self._observations(), rewards, success, self._ended & ~success, self._infos()

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers."""
        self._pool.close()

    def _place(self, i: int) -> tuple[int, int]:
        return divmod(i, self._pool.spec.slots)

    def _start(self, i: int, init_state: int | None) -> Rollout:
        options = {"init_state": init_state}
        rollout = _rollout(self._states, self._randoms[i], options, self._settle_steps, self._horizon)
        self._init_states[i] = rollout.init_index
        return rollout

    def _advance(self, commands: dict[int, Rollout | int]) -> np.ndarray:
        """Start an episode or take a step, in each of these environments; the rewards of all, float64 [num_envs]."""
        by_worker: list[list[tuple[int, Rollout | int]]] = [[] for _ in self._pool.arrays]
        for i, command in commands.items():
            worker, slot = self._place(i)
            by_worker[worker].append((slot, command))
        rewards = np.zeros(self.num_envs)
        self._running = False
        for worker, answers in enumerate(self._pool.advance(by_worker)):
            for progress in answers:
                if progress.failure:
                    raise WorkerError(f"worker {worker}: {progress.failure}")
                i = worker * self._pool.spec.slots + progress.slot
                self._ended[i], self._succeeded[i] = progress.done, progress.success
                rewards[i] = progress.success
        self._running = True
        return rewards

    def _observations(self) -> dict[str, Any]:
        images = np.concatenate([arrays["images"] for arrays in self._pool.arrays])[: self.num_envs]
        states = np.concatenate([arrays["states"] for arrays in self._pool.arrays])[: self.num_envs]
        return {
            "images": {camera: images[:, i].copy() for i, camera in enumerate(self._pool.spec.cameras)},
            "state": states,
        }

    def _infos(self) -> dict[str, Any]:
        everywhere = np.ones(self.num_envs, bool)
        return {
            "init_state": self._init_states.copy(),
            "_init_state": everywhere,
            "success": self._succeeded.copy(),
            "_success": everywhere,
        }


gymnasium.register(
    id="pi0/LIBERO-v0",
    entry_point="pi0.libero.gym_env:LIBEROEnv",
    vector_entry_point="pi0.libero.gym_env:LIBEROVectorEnv",
)
