"""Files that several processes read and write: whole or not at all, and one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pi0.base.errors import InputError, MissingFileError, OutputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LFS_POINTER_BYTES = 1024  # at most, by that specification
LFS_MEND = "Git LFS pointer, not the file that was meant: run git lfs pull where it was cloned"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole: readers see the old content or the new, also after a power cut.

    If several processes write it at once, the last one wins.

    Raises:
        OSError: the disk refuses; nothing new is left behind.
    """
    # A random name: a process of another host or container that shares the folder may have the same process id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name with nothing behind it
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # which a full disk does not tell
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OSError: the disk refuses; nothing new is left behind.
    """
    write_whole(path, json.dumps(content, indent=1))


def writable_dir(path: str | Path) -> Path:
    """Make a folder that results can be written to; a failure now is better than one after an hour.

    Raises:
        OutputError: it cannot be made or written.
    """
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}; choose a writable folder") from error
    return path


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a few lines that Git left in place of a large file. False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def read_json(path: Path, error: type[InputError] = InputError) -> Any:
    """The content of a JSON file.

    Raises:
        MissingFileError: no such file.
        InputError: it is not JSON; as `error`, whose message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as missing:
        raise MissingFileError(f"{path} not found") from missing
    except ValueError as why:
        raise error(f"{path}: not valid JSON: {why_unreadable(path, why)}") from why


def why_unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be read, for a message: it is a Git LFS pointer, else the words of the `error` that it gave."""
    return f"it is a {LFS_MEND}" if is_lfs_pointer(path) else str(error)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; the system releases it for a process that dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
