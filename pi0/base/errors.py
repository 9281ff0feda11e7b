"""The errors that a user can mend; commands print their message without a traceback."""

from collections.abc import Callable


class InputError(Exception):
    """Something outside the program is wrong: a file, a value, the machine. The message says what and the mend."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named is not there."""


class OutputError(InputError):
    """A folder or file of results cannot be written."""


class CheckpointError(InputError, ValueError):
    """A checkpoint that cannot be used as it is; the message names the file and what is wrong."""


def attempt(function: Callable[..., object], *arguments: object) -> str | None:
    """Call a function whose failure is to be reported and not to end the program: what went wrong, or None.

    Only refusals are taken that a user can mend (`InputError`) or the system makes (`OSError`: a full disk).
    """
    try:
        function(*arguments)
    except (InputError, OSError) as error:
        return str(error)
    return None


def report_failure(failure: str, function: Callable[..., object], *arguments: object) -> None:
    """Call a function whose failure is printed, as "failure: reason", and does not end the program."""
    if (reason := attempt(function, *arguments)) is not None:
        print(f"{failure}: {reason}")
