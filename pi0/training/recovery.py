"""When updates go wrong: how often in a row, and how often a run may go back to a checkpoint."""

from __future__ import annotations

from pi0.base.errors import InputError


class Recovery:
    """Counts gradients that are not finite, and the returns to a checkpoint that they lead to.

    Args:
        max_bad_updates: gradients in a row that are not finite after which the run goes back to a checkpoint.
        max_rollbacks: such returns for the same step after which the run ends.

    Attributes:
        bad_in_a_row: gradients since the last one that was finite.
        rollbacks: returns to a checkpoint in the whole run.
        in_a_row: returns since the run last came further than where it went wrong.
    """

    def __init__(self, max_bad_updates: int, max_rollbacks: int):
        self._max_bad_updates = max_bad_updates
        self._max_rollbacks = max_rollbacks
        self.bad_in_a_row = 0
        self.rollbacks = 0
        self.in_a_row = 0
        self._furthest = -1  # step at which the run went wrong

    def count_gradient(self, finite: bool) -> None:
        """Count a gradient."""
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def check(self) -> None:
        """Raise FloatingPointError where too many gradients in a row were not finite."""
        if self.bad_in_a_row >= self._max_bad_updates:
            raise FloatingPointError(f"{self.bad_in_a_row} gradients in a row are not finite")

    def count_rollback(self, step: int, error: FloatingPointError) -> None:
        """Count a return to a checkpoint.

        Args:
            step: at which the run went wrong.
        Raises:
            InputError: there were as many for this step as there may be.
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
        """What is added to the seed of the noise, so that it is other noise than the last time."""
        return 15_485_863 * self.in_a_row + 7_919 * self._furthest

    def facts(self) -> dict[str, int]:
        """What a resumed run needs to know."""
        return {"bad_in_a_row": self.bad_in_a_row, "rollbacks": self.rollbacks}

    def resume(self, facts: dict) -> None:
        """Continue from `facts()`."""
        self.bad_in_a_row, self.rollbacks = facts.get("bad_in_a_row", 0), facts.get("rollbacks", 0)
