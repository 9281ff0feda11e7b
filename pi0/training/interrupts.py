"""Signals as requests that a run checks where it can stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from pi0.ranks.collectives import largest
from pi0.ranks.watch import RankWatch

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_S = 1.0  # a signal that comes sooner after the first belongs to the same request


class Interrupted(Exception):
    """The current unit of work was abandoned because somebody asked the run to stop."""


class Interrupts:
    """Requests to this process, or to any rank of the run.

    SIGINT, SIGTERM or SIGHUP (a closed terminal; `nohup` keeps it away) asks to stop. Another one, a second or more after the first, ends the process at once. (One
    within the second belongs to the same request, since a launcher passes it on as well.) SIGUSR1 asks for a
    checkpoint.

    Args:
        watch: passes requests between ranks; None in a single process.
    """

    def __init__(self, watch: RankWatch | None = None):
        self._watch = watch
        self._asked_at: float | None = None
        self._noticed_at: float | None = None
        self._checkpoints_asked = 0
        self._checkpoints_taken = 0

    def install(self) -> None:
        """Receive the signals, in a thread.

        Python runs handlers only between its own instructions. The main thread may be waiting in a collective, for
        ranks that would continue for long because the request does not reach them.
        """
        heard, told = socket.socketpair()
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in (*STOPS, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup
            signal.signal(number, lambda *_: None)  # so that it only writes to the socket
        # The thread holds both ends, which would otherwise close with this call.
        threading.Thread(target=self._hear, args=(heard, told), name="signals", daemon=True).start()

    @property
    def stop_asked(self) -> bool:
        """Whether this rank knows of a request to stop."""
        return self._asked_at is not None or (self._watch is not None and self._watch.stop_asked)

    def take_checkpoint_request(self) -> bool:
        """Whether this rank was asked for a checkpoint since the last call."""
        asked = self._checkpoints_asked  # read once: the next request may come at any time
        taken, self._checkpoints_taken = self._checkpoints_taken, asked
        return asked > taken

    def check(self) -> None:
        """Raise `Interrupted` if somebody asked the run to stop; for places without collectives."""
        if self.stop_asked:
            raise Interrupted

    def check_together(self, abandoned: bool = False, patience_s: float = 0.0) -> None:
        """Raise `Interrupted` on all ranks if any has `abandoned` its work or was asked to stop; a collective.

        Args:
            abandoned: this rank has abandoned its work.
            patience_s: how long the work may continue after this rank has noticed the request, seconds.
        """
        if self.stop_asked and self._noticed_at is None:
            self._noticed_at = time.monotonic()
        overdue = self._noticed_at is not None and time.monotonic() - self._noticed_at >= patience_s
        if largest(int(abandoned or overdue)):
            raise Interrupted

    def _hear(self, heard: socket.socket, _told: socket.socket) -> None:
        while numbers := heard.recv(1):
            if numbers[0] == signal.SIGUSR1:
                self._checkpoints_asked += 1
            elif numbers[0] in STOPS:
                self._stop(numbers[0])

    def _stop(self, number: int) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at >= REPEAT_S:
                os._exit(128 + number)  # rollout workers end when their pipes close
            return
        self._asked_at = now
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after a checkpoint; a second one stops at once\n".encode())
        if self._watch is not None:
            self._watch.ask_to_stop()
