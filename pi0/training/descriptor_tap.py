"""A tap on a file descriptor: what is written to it still reaches its old target, and a listener too."""

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

# A process that waits for the end of the tapped process and passes on what nobody has read: the last output of a process
# that was killed or has crashed. Arguments: descriptors of the tap, of the console, and of a pipe that gives the path of
# the log file and closes with the tapped process; whether to echo.
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
    except OSError:  # a terminal reports so that its last writer has closed it
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
    """Passes on what is written to a file descriptor, and also gives it to `heard`.

    It works below Python's streams, so it also gets the output of libraries and child processes, and tracebacks. If
    the descriptor is a terminal, its writers still see one. After a crash another process (`HEIR`) passes on the last
    output, and `faulthandler` prints where in the program the crash was.

    Args:
        descriptor: 1 for standard output, 2 for standard error.
        echo: whether the output still reaches its old target.
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
            start_new_session=True,  # so that Ctrl+C does not reach it
        )
        os.close(told)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="descriptor tap", daemon=True)
        self._thread.start()

    def leave_to(self, path: Path) -> None:
        """After a crash, append the last output, which `heard` does not get, to the file at `path`."""
        os.write(self._tell, os.fsencode(path.resolve()))

    def heard(self, data: bytes) -> None:
        """Called with everything that was written, in order, from a separate thread."""
        raise NotImplementedError

    def say(self, data: bytes) -> None:
        """Write to the descriptor's old target, unless that is closed or its disk is full."""
        with contextlib.suppress(OSError):
            os.write(self._console, data)

    def restore(self) -> None:
        """Restore the descriptor; what was written until now is still passed on."""
        os.dup2(self._console, self._descriptor)
        self._end.set()
        self._thread.join()

    def _pass_on(self) -> None:
        while True:
            ended = self._end.is_set()  # checked first: output before the end must still be read
            ready, _, _ = select.select([self._reader], [], [], 0.0 if ended else 0.05)
            if ready:
                try:
                    data = os.read(self._reader, 65536)
                except OSError:  # a terminal reports so that its last writer has closed it
                    return
                if not data:
                    return
                self.heard(data)  # first, so that a crash costs the log less than the console
                if self._echo:
                    self.say(data)
            elif ended:
                return
