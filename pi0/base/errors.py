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
    """A folder or file of results cannot be written."""


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


def report_failure(failure: str, function: Callable[..., object], *arguments: object) -> None:
    """Call a function whose failure must not end the program; print a failure as "failure: reason"."""
    if (reason := attempt(function, *arguments)) is not None:
        print(f"{failure}: {reason}")
