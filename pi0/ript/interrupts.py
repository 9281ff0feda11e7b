"""Signals as questions that are asked where a run can stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

from pi0.ript.distributed import RankWatch, largest


class Interrupted(Exception):
    """The unit of work at hand was abandoned because the run was asked to stop."""


class Interrupts:
    """What this process, or any rank of the run, was asked for.

    SIGINT or SIGTERM asks to stop; the same one again ends the process at once. (One of each is one request: a
    terminal's Ctrl+C reaches a rank as SIGINT, and as SIGTERM from its launcher.) SIGUSR1 asks for a checkpoint.

    Args:
        watch: through which ranks hear of each other's requests, None in a single process.
    """

    def __init__(self, watch: RankWatch | None = None):
        self._watch = watch
        self._seen: set[int] = set()
        self.checkpoint_asked = False

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR1, self._checkpoint)

    @property
    def stop_asked(self) -> bool:
        """Whether this rank knows of a request to stop."""
        if self._watch is None:
            return bool(self._seen)
        if self._seen:
            self._watch.ask_to_stop()
        return self._watch.stop_asked

    def check(self) -> None:
        """Raise `Interrupted` where the run was asked to stop; for places without collectives."""
        if self.stop_asked:
            raise Interrupted

    def check_together(self, abandoned: bool = False) -> None:
        """Raise `Interrupted` on all ranks if any has `abandoned` its work or was asked to stop; a collective."""
        if largest(int(abandoned or self.stop_asked)):
            raise Interrupted

    def _stop(self, number: int, _: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)  # rollout workers end when their pipes close
        self._seen.add(number)
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: stopping after a checkpoint; the same again stops at once\n".encode())

    def _checkpoint(self, _number: int, _: FrameType | None) -> None:
        self.checkpoint_asked = True
