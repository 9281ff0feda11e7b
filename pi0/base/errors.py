"""Errors that a user can repair; commands print their message without a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(Exception):
    """Something outside the program is wrong: a file, a value, the machine. The message names it and its remedy.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 1


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder does not exist."""


class OutputError(InputError):
    """A folder or file of results cannot be written, or a result is not there."""


class MachineError(InputError):
    """The machine breaks what a command runs, so results would be about the machine."""

    status = 3


class CheckpointError(InputError, ValueError):
    """A checkpoint or policy folder cannot be used as it is; the message names the file and what is wrong."""


def exit_with(error: InputError) -> NoReturn:
    """End the program with the error's message on standard error and its exit status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.status)


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
