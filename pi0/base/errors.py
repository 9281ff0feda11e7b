"""Errors that a user can repair; commands print their message without a traceback."""

from collections.abc import Callable


class InputError(Exception):
    """Something outside the program is wrong: a file, a value, the machine. The message names it and its remedy."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder does not exist."""


class OutputError(InputError):
    """A folder or file of results cannot be written."""


class CheckpointError(InputError, ValueError):
    """A checkpoint or policy folder cannot be used as it is; the message names the file and what is wrong."""


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
