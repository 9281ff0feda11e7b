"""A log file of the console's output."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class LogFile:
    """A log of whole lines in their final state: a progress bar that redraws its line leaves only its last state.

    What is written before the file is opened is kept for it. If the disk refuses, the file ends, but never the run.
    Threads may write at the same time.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        # Lines that the file does not have yet; None after it has ended.
        self._kept: list[bytes] | None = []
        self._line = b""  # the unfinished line
        self._lock = threading.Lock()

    def open(self, path: Path) -> bytes:
        """Append to the file at `path`, first what was written before; returns what `write` returns."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self.write(b"")

    def write(self, data: bytes) -> bytes:
        """Write the lines that `data` completes; returns text for the console: nothing, or why the file ends here."""
        with self._lock:
            *lines, self._line = (self._line + data).split(b"\n")
            # The last byte may be the first half of "\r\n".
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]
            if self._kept is None:
                return b""
            shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
            self._kept += [line + b"\n" for line in shown if line]
            if self._file is not None and self._kept:
                try:
                    os.write(self._file, b"".join(self._kept))
                    self._kept = []
                except OSError as error:
                    self._kept = None
                    return f"the log file ends here: {error.strerror}\n".encode()
        return b""

    def end_line(self) -> None:
        """Write the unfinished line."""
        self.write(b"\n" if self._line else b"")
