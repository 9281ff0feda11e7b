"""Where transitions and weights lie in the memory that all workers and the trainer share.

A slice is a fixed number of steps of one worker. Episodes run on from one slice into the next. Single frames are
stored; the trainer stacks them when it learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pi0.parallel import policy
from pi0.parallel.games import SIDE
from pi0.parallel.policy import STACK
from pi0.workers.arrays import ArrayTable, arrays_in, nbytes

WEIGHT_BUFFERS = 2  # the newest weights, and those before them, with which a slice may still be collected


@dataclass(frozen=True)
class Layout:
    """The shared arrays of a run.

    Attributes:
        workers: number of workers.
        buffers: slices of a worker that there is room for at the same time.
        steps: greatest length of a slice.
        actions: number of actions.
    """

    workers: int
    buffers: int
    steps: int
    actions: int

    @property
    def positions(self) -> int:
        """Frames of a slice: those of the stack before its first, its own, and the one after its last."""
        return STACK - 1 + self.steps + 1

    @property
    def table(self) -> ArrayTable:
        """The arrays.

        The last of `frames` stays black. `weights` hold what `weights_in` finds there. `ages` are numbers of steps since the episode began, at most 3.
        """
        each = (self.buffers, self.workers, self.steps)
        return {
            "frames": ((self.buffers * self.workers * self.positions + 1, SIDE, SIDE), np.uint8),
            "ages": ((self.buffers, self.workers, self.steps + 1), np.uint8),
            "actions": (each, np.int64),
            "log_probs": (each, np.float32),
            "values": (each, np.float32),
            "rewards": (each, np.float32),
            "ended": (each, np.uint8),
            "bootstraps": (each, np.float32),
            "last_values": ((self.buffers, self.workers), np.float32),
            "weights": ((WEIGHT_BUFFERS, nbytes(policy.arranged_table(self.actions))), np.uint8),
            "versions": ((WEIGHT_BUFFERS,), np.int64),
        }

    def weights_in(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of `pi0.parallel.policy.arrange` in one of the two buffers of `weights`."""
        return arrays_in(buffer, policy.arranged_table(self.actions))

    def first_frame(self, buffer: int, worker: int) -> int:
        """Index in `frames` of a slice's first own frame."""
        return (buffer * self.workers + worker) * self.positions + STACK - 1

    def stacks(self, buffer: int, worker: int, ages: np.ndarray) -> np.ndarray:
        """Indices into `frames` of the stacks of a slice's observations, int64 [len(ages), 4], oldest first.

        Args:
            ages: of the observations, from the first on; frames from before an episode are black.
        """
        numbers = self.first_frame(buffer, worker) + np.arange(len(ages))
        back = np.arange(STACK - 1, -1, -1)
        black = self.buffers * self.workers * self.positions
        return np.where(back <= ages[:, None], numbers[:, None] - back, black)


def publish(
    layout: Layout, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray], version: int
) -> None:
    """Write the weights of a version, in place of those of the version before the last."""
    buffer = version % WEIGHT_BUFFERS
    arrays["versions"][buffer] = -1  # nobody takes what is half written
    policy.arrange(parameters, layout.weights_in(arrays["weights"][buffer]))
    arrays["versions"][buffer] = version
