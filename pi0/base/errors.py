"""Errors that a user can repair, and how a command ends: with one line at most, without a traceback."""

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# What the system says of a disk that is full, or of a file that may not be read or written, and the mend.
_ROOM, _RIGHTS = "make room, or choose another folder", "mend its permissions, or choose another folder"
_REFUSALS = {number: _ROOM for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)} | {
    number: _RIGHTS for number in (errno.EROFS, errno.EACCES, errno.EPERM)
}


class InputError(Exception):
    """Something outside the program is wrong: a file, a value, the machine. The message names it and its remedy.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 1


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder does not exist."""


class MissingPackageError(InputError, ModuleNotFoundError):
    """A package that is installed only where it is wanted is not there."""


class OutputError(InputError):
    """A folder or file of results cannot be written, or a result is not there."""


class MachineError(InputError):
    """The machine breaks what a command runs, so results would be about the machine."""

    status = 3


class CheckpointError(InputError, ValueError):
    """A checkpoint or policy folder cannot be used as it is; the message names the file and what is wrong."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call the `main` of a program and end the process with the status that it returns; None is 0.

    * `InputError`: its message, its status.
    * A full disk, or a file that may not be read or written: the system's words, and the mend.
    * Ctrl+C: "interrupted", status 130, as shells have it. A second one ends the process at once. One that comes
      while packages are still being imported does not get here: Python prints a traceback.
    * A reader of the output that has gone, as in `... | head -1`: nothing, status 141, as for SIGPIPE. The signal
      itself stays ignored, since a worker that dies must not end its trainer by it.
    * A file's name or content that the locale cannot express (LC_ALL=C without UTF-8): what to set.

    Before, it mends the standard streams. Characters that a terminal cannot show are printed as escapes; a line
    is written at once; a stream that is closed (`>&-`) drops what is written.
    """
    _mend_streams()
    status: object
    try:
        try:
            status = main()
        except SystemExit as end:  # of argparse
            status = end.code
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = error.status
        except UnicodeError as error:
            if sys.getfilesystemencoding() == "utf-8":
                raise
            print(f"error: the locale does not know a character ({error}); set PYTHONUTF8=1", file=sys.stderr)
            status = 1
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks get it
            print("\ninterrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        gone = [descriptor for descriptor in (1, 2) if _reader_has_gone(descriptor)]
        if not gone:  # a pipe of the program's own
            raise
        _drop_output(*gone)
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        print(f"error: {error}; {_REFUSALS[error.errno]}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output(1)
        status = 1
    sys.exit(status)  # type: ignore[arg-type]


@contextmanager
def interrupt_afterwards() -> Iterator[None]:
    """Ctrl+C within the block raises KeyboardInterrupt at its end: for what must be done whole or not at all.

    Where the program has a handler of its own, or in another thread, nothing changes: no KeyboardInterrupt comes there.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if heard:
            raise KeyboardInterrupt


def attempt(function: Callable[..., object], *arguments: object) -> str | None:
    """Call a function whose failure must not end the program; return the reason of the failure, or None.

    It catches only errors that a user can repair (`InputError`) and errors of the system (`OSError`: a full disk).
    """
    try:
        function(*arguments)
    except (InputError, OSError) as error:
        return str(error)
    return None


class Outputs:
    """Results that are written one by one. A failure does not end the run, but the run must not end as if all were there.

    Attributes:
        missing: name of each result whose last writing failed, with the reason.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def write(self, name: str, function: Callable[..., object], *arguments: object) -> None:
        """Call what writes the result `name`; print and remember a failure, until the same result is written."""
        self.missing.pop(name, None)
        if (reason := attempt(function, *arguments)) is not None:
            self.missing[name] = reason
            print(f"{name} not written: {reason}")

    def check(self) -> None:
        """Raise `OutputError` if a result is missing; what the run's folder holds of that name is older."""
        if self.missing:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in self.missing.items())
            raise OutputError(f"these results are not written, or not the last of them:\n{reasons}")


def report_failure(failure: str, function: Callable[..., object], *arguments: object) -> None:
    """Call a function whose failure must not end the program; print a failure as "failure: reason"."""
    if (reason := attempt(function, *arguments)) is not None:
        print(f"{failure}: {reason}")


def _mend_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed when Python started
            descriptor = os.open(
                os.devnull, os.O_RDWR
            )  # has its number, which other files could get otherwise
            os.set_inheritable(descriptor, True)
            stream = open(descriptor, mode)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for output in (sys.stdout, sys.stderr):
        # Whole lines at once, also with PYTHONUNBUFFERED, which writes a line's end by itself: the lines of ranks
        # that share a terminal would join.
        output.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)  # type: ignore[union-attr]


def _drop_output(*descriptors: int) -> None:
    """What is still buffered for them shall not fail at the end of the process."""
    for descriptor in descriptors:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _reader_has_gone(descriptor: int) -> bool:
    events = select.poll()
    events.register(descriptor, 0)  # an error is always told
    return any(event & select.POLLERR for _, event in events.poll(0))
