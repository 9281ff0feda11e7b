"""Recovery from bad updates: how many in a row, and how often a run may return to a checkpoint."""

from __future__ import annotations

from pi0.base.errors import InputError


class Recovery:
    """Counts gradients that are not finite, and the returns to a checkpoint that they lead to.

    Args:
        max_bad_updates: after so many gradients in a row that are not finite, the run returns to a checkpoint.
        max_rollbacks: how often the run may return because of the same step; then it ends.

    Attributes:
        bad_in_a_row: gradients since the last finite one.
        rollbacks: returns to a checkpoint in the whole run.
        in_a_row: returns since the run last got beyond the step that failed.
    """

    def __init__(self, max_bad_updates: int, max_rollbacks: int):
        self._max_bad_updates = max_bad_updates
        self._max_rollbacks = max_rollbacks
        self.bad_in_a_row = 0
        self.rollbacks = 0
        self.in_a_row = 0
        self._furthest = -1  # latest step that failed

    def count_gradient(self, finite: bool) -> None:
        """Count a gradient."""
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def check(self) -> None:
        """Raise FloatingPointError if too many gradients in a row were not finite."""
        if self.bad_in_a_row >= self._max_bad_updates:
            raise FloatingPointError(f"{self.bad_in_a_row} gradients in a row are not finite")

    def count_rollback(self, step: int, error: FloatingPointError) -> None:
        """Count a return to a checkpoint.

        Args:
            step: the step that failed.
            error: why it failed.
        Raises:
            InputError: the run has already returned `max_rollbacks` times for this step.
        """
        self.rollbacks += 1
        self.in_a_row = self.in_a_row + 1 if step <= self._furthest else 1
        self._furthest = max(self._furthest, step)
        if self.in_a_row > self._max_rollbacks:
            raise InputError(
                f"step {step}: {error}, again and again; start a new run with a lower algo.lr"
            ) from error
        self.bad_in_a_row = 0

    @property
    def offset(self) -> int:
        """Number to add to the seed, so that the noise differs from the last attempt's."""
        return 15_485_863 * self.in_a_row + 7_919 * self._furthest

    def facts(self) -> dict[str, int]:
        """What a resumed run needs to know."""
        return {"bad_in_a_row": self.bad_in_a_row, "rollbacks": self.rollbacks}

    def resume(self, facts: dict) -> None:
        """Continue from `facts()`."""
        self.bad_in_a_row, self.rollbacks = facts.get("bad_in_a_row", 0), facts.get("rollbacks", 0)
