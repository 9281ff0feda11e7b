"""Listening in on a file descriptor: what is written to it goes where it went before, and to a listener."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import termios
import threading
import tty


class DescriptorTap:
    """Passes on what is written to a file descriptor, and tells `heard` of it.

    It works below Python's streams, so libraries, tracebacks and child processes are heard too. Where the
    descriptor is a terminal, its writers still see one.

    Args:
        descriptor: 1 for standard output, 2 for standard error.
        echo: whether it still reaches where it went before.
    """

    def __init__(self, descriptor: int, echo: bool = True):
        self._descriptor, self._echo = descriptor, echo
        self._console = os.dup(descriptor)
        if os.isatty(descriptor):
            self._reader, writer = os.openpty()
            tty.setraw(writer)
            size = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        else:
            self._reader, writer = os.pipe()
        os.dup2(writer, descriptor)
        os.close(writer)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="descriptor tap", daemon=True)
        self._thread.start()

    def heard(self, data: bytes) -> None:
        """Called with everything that was written, in order, from a thread of its own."""
        raise NotImplementedError

    def say(self, data: bytes) -> None:
        """Write to where the descriptor went before, unless it is gone or the disk behind it is full."""
        with contextlib.suppress(OSError):
            os.write(self._console, data)

    def restore(self) -> None:
        """Put the descriptor back as it was; what was written until now is still passed on."""
        os.dup2(self._console, self._descriptor)
        self._end.set()
        self._thread.join()

    def _pass_on(self) -> None:
        while True:
            ended = self._end.is_set()  # asked first: what came before the end is still to be read
            ready, _, _ = select.select([self._reader], [], [], 0.0 if ended else 0.05)
            if ready:
                try:
                    data = os.read(self._reader, 65536)
                except OSError:  # how a terminal says that its last writer is gone
                    return
                if not data:
                    return
                if self._echo:
                    self.say(data)
                self.heard(data)
            elif ended:
                return
