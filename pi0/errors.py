"""The errors that a user can mend; commands print their message without a traceback."""


class InputError(Exception):
    """Something outside the program is wrong: a file, a value, the machine. The message says what and the mend."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named is not there."""
