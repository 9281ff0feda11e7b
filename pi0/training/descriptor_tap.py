"""Listening in on a file descriptor: what is written to it goes where it went before, and to a listener."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import select
import subprocess
import sys
import termios
import threading
import tty
from pathlib import Path

# A process that waits until the one that is tapped has ended, and passes on what nobody has read: the last words of one
# that was killed or has crashed. Arguments: descriptors of what is tapped, of the console, and of a pipe that says where
# the log file is and closes with the tapped process; whether to echo.
HEIR = """
import os, select, sys
tapped, console, told, echo = map(int, sys.argv[1:])
path = b""
while data := os.read(told, 4096):
    path += data
targets = [console] if echo else []
try:
    targets.append(os.open(path, os.O_WRONLY | os.O_APPEND))
except OSError:  # there is no log file yet
    pass
while select.select([tapped], [], [], 0)[0]:
    try:
        data = os.read(tapped, 65536)
    except OSError:  # how a terminal says that its last writer is gone
        break
    if not data:
        break
    for target in targets:
        try:
            os.write(target, data)
        except OSError:
            pass
"""


class DescriptorTap:
    """Passes on what is written to a file descriptor, and tells `heard` of it.

    It works below Python's streams, so libraries, tracebacks and child processes are heard too. Where the
    descriptor is a terminal, its writers still see one. What is written last before a crash is passed on by another
    process (`HEIR`), and the crash says where in the program it was (`faulthandler`).

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
        if descriptor == 2:
            faulthandler.enable()
        told, self._tell = os.pipe()
        descriptors = (self._reader, self._console, told)
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HEIR, *map(str, descriptors), str(int(echo))],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is not for it
        )
        os.close(told)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="descriptor tap", daemon=True)
        self._thread.start()

    def leave_to(self, path: Path) -> None:
        """Where last words are to go that `heard` is not told of: the end of the file at `path`."""
        os.write(self._tell, os.fsencode(path.resolve()))

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
