"""A worker that knows no simulator: it counts, draws, and fails in every way that a test asks for."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from pi0.base.errors import InputError


class Tiny:
    """What `pi0.workers.serve` holds in the tests of the room; `spec` is a folder, which `close` marks."""

    def __init__(self, spec, arrays, random):
        if spec == "no such game":
            raise FileNotFoundError(spec)
        self.spec = spec
        self.arrays = arrays
        self.random = random
        self.count = 0

    def report(self) -> int:
        return self.count

    def close(self) -> None:
        Path(self.spec, f"closed-{os.getpid()}").touch()

    # What a trainer might ask for ------------------------------------------------------------------

    def add(self, first, second):
        self.count += 1
        return first + second

    def double(self) -> float:
        """Twice the numbers, in place; their sum before."""
        before = float(self.arrays["numbers"].sum())
        self.arrays["numbers"] *= 2
        return before

    def draw(self, count: int) -> list[int]:
        return self.random.integers(2**63, size=count).tolist()

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def environment(self) -> dict:
        return {"variables": dict(os.environ), "modules": list(sys.modules), "group": os.getpgrp()}

    # What it should not do -------------------------------------------------------------------------

    def fail(self) -> None:
        raise ValueError("no such level")

    def refuse(self) -> None:
        raise InputError("no such disk; mount it")

    def write_to_a_full_disk(self) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"0")

    def give_back_what_cannot_be_sent(self):
        return lambda: None

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def exit(self) -> None:
        sys.exit(7)

    def close_the_socket_and_stay(self) -> None:
        socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_RDWR)
        time.sleep(600)

    def send_garbage(self) -> None:
        self._write(b"?")

    def send_what_is_not_there(self) -> None:
        self._write(b"cno_such_module\nno_such_name\n.")

    def die_within_the_answer(self) -> None:
        self._write(b"the first of 1000 bytes", length=1000)
        self.die()

    def hang_within_the_answer(self) -> None:
        self._write(b"the first of 1000 bytes", length=1000)
        self.hang()

    def the_first_time(self, method: str, path: str) -> str:
        """Call `method`, unless `path` says that it was called before; `path` then."""
        if not Path(path).exists():
            Path(path).touch()
            getattr(self, method)()
        return path

    def _write(self, content: bytes, length: int | None = None) -> None:
        """Write a message to the trainer behind the back of whoever sends answers."""
        os.write(int(sys.argv[1]), struct.pack("!i", length or len(content)) + content)


def count_of(worker: Tiny, more: int) -> int:
    """A function, not a method, that is called with a worker."""
    return worker.count + more
