"""`score`: success on LIBERO of any function from observations to chunks of actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.base.typed_yaml import unfit_values
from pi0.libero.environments import Environments
from pi0.libero.episodes import ACTION_DIM, STATE_DIM
from pi0.libero.evaluation import EvaluationResult, evaluate, refuse_broken
from pi0.libero.rendering import CAMERAS
from pi0.libero.settings import TaskConfig

# Images by camera, states and instructions of B observations to their chunks.
Act = Callable[[dict[str, np.ndarray], np.ndarray, list[str]], Any]


@dataclass(frozen=True)
class CalledSpec:
    """What environments must know about a policy that is a function (`pi0.libero.environments.PolicySpec`)."""

    cameras: tuple[str, ...]
    image_size: int
    action_horizon: int
    source: str
    robot_state_dim: int = STATE_DIM
    robot_action_dim: int = ACTION_DIM


class CalledPolicy:
    """A function as a policy for `pi0.libero.rollouts`: it sees the observations that are somebody's, and no others."""

    shares_first_look = False

    def __init__(self, act: Act, chunk: int):
        self._act, self._chunk = act, chunk

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """None: what is random in the function is its own."""
        return np.zeros(0, np.float32)

    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray:
        """Its chunks float32 [B, C, 7], clipped to [-1, 1]; 0 where there is no prompt.

        Raises:
            InputError: it returned something else.
        """
        rows = [row for row, prompt in enumerate(prompts) if prompt]
        seen = {camera: frames[rows] for camera, frames in images.items()}
        chosen = np.asarray(self._act(seen, states[rows], [prompts[row] for row in rows]), np.float32)
        if (
            chosen.ndim != 3
            or len(chosen) != len(rows)
            or chosen.shape[1] < self._chunk
            or chosen.shape[2] != ACTION_DIM
        ):
            raise InputError(
                f"act returned {list(chosen.shape)}; chunks [{len(rows)}, {self._chunk} or more, {ACTION_DIM}] are needed"
            )
        if not np.isfinite(chosen).all():
            raise InputError("act returned actions that are not finite")
        chunks = np.zeros((len(prompts), self._chunk, ACTION_DIM), np.float32)
        chunks[rows] = chosen[:, : self._chunk].clip(-1, 1)
        return chunks

    def prepared(self, images: dict, states: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """Not known here."""
        raise InputError("what act makes of an observation is not known here; unset DEBUG_SAVE_PROCESSED")


def score(
    act: Act,
    *,
    suite: str = "libero_spatial",
    tasks: Sequence[int | str] = (),
    episodes: int = 50,
    replan_steps: int = 10,
    cameras: Sequence[str] = tuple(CAMERAS),
    image_size: int = 128,
    **task: Any,
) -> EvaluationResult:
    """Score a policy of your own on LIBERO's recorded initial states, in parallel processes.

    Args:
        act: called with images (by camera uint8 [B, image_size, image_size, 3], upright), states float32 [B, 8] (hand's
            position 3 in m, its axis-angle 3 in rad, fingers 2 in m) and B instructions; returns chunks [B, C, 7] of actions
            in [-1, 1], as `pi0.libero.gym_env.LIBEROEnv` takes them. B changes from call to call.
        suite, tasks: which tasks, by index or name; none: the whole suite.
        episodes: number in all, spread evenly over the tasks; at most 50 a task.
        replan_steps: actions of a chunk that are carried out before it is called again.
        cameras: which images it gets.
        image_size: pixels a side.
        **task: other keys of a configuration's section `task`: assets, num_parallel_envs, max_episode_length, ...

    Returns:
        The result: `print(result)` shows successes and their 95% interval, `result.score()` all numbers.

    Raises:
        InputError: unknown tasks or keys, or act returned something else than chunks.
        BrokenSimulationsError: more than a tenth of the episodes broke.
    """
    known = [field.name for field in dataclasses.fields(TaskConfig)]
    unknown = [name for name in task if name not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no key of the section task; its keys are {', '.join(known)}")
    config = TaskConfig(
        **{
            "benchmark_name": suite, "task_names_to_use": list(tasks), "replan_steps": replan_steps,
            "image_size": image_size, **task,
        }  # type: ignore[arg-type]
    )  # fmt: skip
    if problems := unfit_values(config):
        raise InputError(problems[0])
    spec = CalledSpec(tuple(cameras), image_size, replan_steps, getattr(act, "__name__", type(act).__name__))
    with Environments(config, spec) as environments:
        result = evaluate(environments, CalledPolicy(act, replan_steps), episodes, seed=0)
    refuse_broken("evaluation", result.broken, len(result.episodes))
    return result
