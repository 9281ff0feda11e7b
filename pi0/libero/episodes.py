"""What goes into a rollout and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pi0.data.demonstrations import Observation, Robot
from pi0.libero.stepping import CONTROL_HZ, InitState
from pi0.libero.suites import Task

STATE_DIM = 8
ACTION_DIM = 7
ROBOT = Robot(STATE_DIM, ACTION_DIM, largest_action=1.0, hz=CONTROL_HZ, names=("panda", "franka", "libero"))


@dataclass(frozen=True)
class Rollout:
    """One episode to run. Its noise depends on `noise_key` alone, never on timing or on who runs it.

    Attributes:
        task: what to do.
        init: where to start.
        init_index: position of `init` in its pool.
        noise_key: integers that seed the policy's noise, e.g. (seed, step, task, init state, repetition).
        horizon: control steps allowed, settle steps not counted.
        settle_steps: control steps before the policy sees its first observation.
        record: draw a frame of the agent's view for a video every this many control steps (0: no video).
        keep_last: the episode keeps what is seen after its last action, which is drawn for that alone.
        keep_every: the episode keeps what is seen before each of its actions, which is drawn for that alone, too.
    """

    task: Task
    init: InitState
    init_index: int
    noise_key: tuple[int, ...]
    horizon: int
    settle_steps: int
    record: int = 0
    keep_last: bool = False
    keep_every: bool = False

    @property
    def beginning(self) -> tuple:
        """The same for rollouts whose first observation is the same: those of a group."""
        init = self.init
        return (self.task, self.settle_steps, init.state.tobytes(), init.fixtures.tobytes())

    def __str__(self) -> str:
        return f"{self.task.suite} task {self.task.index} state {self.init_index}"


@dataclass
class Episode:
    """A finished rollout. T policy observations, chunks of C actions, of which `executed[t]` were carried out.

    Attributes:
        images: camera name to uint8 [T, height, width, 3], upright.
        states: float32 [T, 8].
        actions: float32 [T, C, 7] in [-1, 1], as the policy gave them.
        executed: int64 [T], in 1..C; shorter than C in the last chunk, cut off by success or horizon.
        success: LIBERO's goal held after the last step.
        conditions: which conditions of the goal held then, by their words; empty for an episode that broke.
        failure: what broke the rollout (simulation or worker), else None; such an episode teaches nothing.
        video: uint8 frames [height, width, 3], empty unless `Rollout.record`.
        last: what was seen after the last action; None unless `Rollout.keep_last`, and where the rollout broke.
        every: what was seen before each of its `steps` actions; empty unless `Rollout.keep_every`.
    """

    rollout: Rollout
    images: dict[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    executed: np.ndarray
    success: bool
    failure: str | None = None
    conditions: dict[str, bool] = field(default_factory=dict)
    video: list[np.ndarray] = field(default_factory=list)
    last: Observation | None = None
    every: list[Observation] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """The instruction."""
        return self.rollout.task.prompt

    @property
    def steps(self) -> int:
        """Control steps carried out."""
        return int(self.executed.sum())

    @property
    def terminated(self) -> bool:
        """Whether it ended by success."""
        return self.success and self.failure is None

    @property
    def truncated(self) -> bool:
        """Whether the horizon ended it, with the task unsolved."""
        return not self.success and self.failure is None

    def outline(self) -> Episode:
        """The episode without what the policy saw and did: enough for a score, little to send."""
        return replace(
            self, images={}, states=self.states[:0], actions=self.actions[:0], video=[], last=None, every=[]
        )
