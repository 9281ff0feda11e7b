"""Protects a run's work: checkpoints by all ranks together, and the return to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from pi0.base.errors import InputError, report_failure
from pi0.base.files import write_json
from pi0.ranks.collectives import on_rank_zero, rank_and_world_size
from pi0.training.checkpoint_store import CheckpointStore
from pi0.training.interrupts import Interrupts
from pi0.training.metrics import rewrite_metrics
from pi0.training.random_state import OwnStream
from pi0.training.recovery import Recovery
from pi0.training.state import TrainingState, write_checkpoint


class SafetySettings(Protocol):
    """Settings of checkpoints and recovery."""

    num_train_steps: int
    save_freq: int
    save_best: bool
    keep_checkpoints: int
    max_bad_updates: int
    max_rollbacks: int


@dataclass(frozen=True)
class Safeguards:
    """A run's state, its checkpoints, and recovery from failures. All ranks call each method together, except `note`.

    Attributes:
        run_dir: the run's folder.
        store: its checkpoints.
        state: what a checkpoint holds.
        recovery: failures of updates.
        interrupts: requests to stop, or for a checkpoint.
    """

    run_dir: Path
    store: CheckpointStore
    state: TrainingState
    recovery: Recovery
    interrupts: Interrupts

    @classmethod
    def of(cls, run_dir: Path, settings: SafetySettings, interrupts: Interrupts) -> Self:
        """The safeguards that `settings` describe."""
        store = CheckpointStore(
            run_dir / "checkpoints",
            keep=settings.keep_checkpoints,
            keep_best=settings.save_best,
            every=settings.save_freq,
            last=settings.num_train_steps,
        )
        on_rank_zero(store.folder.mkdir, 0o755, True, True)  # this folder marks a run that can be resumed
        recovery = Recovery(settings.max_bad_updates, settings.max_rollbacks)
        return cls(run_dir, store, TrainingState(), recovery, interrupts)

    def find(self) -> Path | None:
        """The newest valid checkpoint, or None if there is none; prints which damaged ones were skipped and why.

        Raises:
            InputError: there are checkpoints, but none is valid.
        """
        newest, damaged = on_rank_zero(self.store.newest_valid)
        for path, reason in damaged:
            print(f"skipped {path}: {reason}")
        if newest is None and damaged:
            raise InputError(
                f"no checkpoint in {self.store.folder} is valid; start a new run, without --resume"
            )
        if newest is None:
            print(f"no checkpoint in {self.store.folder}: starting from the beginning")
        return newest

    def write(self) -> str | None:
        """Make a checkpoint of the last finished iteration; returns the reason of a failure, or None."""
        return write_checkpoint(self.store, self.state)

    def read(self, checkpoint: Path) -> None:
        """Restore the run's state from a checkpoint, and print it."""
        shared_out = self.state.read(checkpoint, *rank_and_world_size())
        done = f"{self.state.step} iterations done" + (f"; {shared_out}" if shared_out else "")
        print(f"continuing from {checkpoint}, {done}")

    def begin(self, checkpoint: Path | None) -> None:
        """Resume from a checkpoint, or begin a run; all parts of the state must be present."""
        if checkpoint is None:
            self.state.begin()
        else:
            self.read(checkpoint)
            self.recovery.resume(self.state.facts)
        self._rewrite_metrics()

    def roll_back(self, error: FloatingPointError, noise: OwnStream) -> None:
        """Return to the last good checkpoint; the run continues from there with other noise.

        Raises:
            InputError: there is no checkpoint, or the run has returned too often for the same step.
        """
        step = self.state.step
        self.recovery.count_rollback(step, error)
        print(f"step {step}: {error}; back to the last good checkpoint, with other noise")
        if self.recovery.in_a_row > 1:
            on_rank_zero(report_failure, "a checkpoint that fails again is not removed", self.store.drop_last)
        if (newest := self.find()) is None:
            raise InputError(f"step {step}: {error}, and there is no checkpoint") from error
        self.read(newest)
        noise.start(rank_and_world_size()[0], self.recovery.offset)
        self.state.begin()
        self._rewrite_metrics()

    def note(self, name: str, number: int) -> None:
        """Write a number for the resumed run when no checkpoint can be made; this rank alone calls it."""
        write_json(self.run_dir / f"{name}.json", number)

    def noted(self, name: str, default: int) -> int:
        """The number that `note` wrote, on any rank."""
        file = self.run_dir / f"{name}.json"
        return int(json.loads(file.read_text())) if file.exists() else default

    def _rewrite_metrics(self) -> None:
        rewrite = (rewrite_metrics, self.run_dir, self.state.history, self.state.evaluations)
        on_rank_zero(report_failure, "metrics.jsonl not rewritten", *rewrite)
