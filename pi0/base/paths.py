"""Where this project keeps what it makes: one cache folder, never the user's home."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pi0.base.errors import OutputError

REPO_ROOT = Path(__file__).resolve().parent.parent.parent


def cache_dir() -> Path:
    """Return the folder for everything that can be made again; it is created on first use.

    `PI0_CACHE_DIR` names it; without that it is `.cache` in the repository. Where that cannot be written, as in a
    read-only checkout, no other place is taken: the user says where gigabytes go, and nobody has to look for them.

    Raises:
        OutputError: it cannot be made or written.
    """
    path = _cache_path()
    with writing_cache():
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _refused("it is read-only")
    return path


@contextmanager
def writing_cache() -> Iterator[None]:
    """Where the disk refuses to write to the cache, raise `OutputError`, which names the cache and the mend.

    Errors of files elsewhere are not changed. A full disk is the cache's, unless the error names another file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            ours = error.errno in (errno.ENOSPC, errno.EDQUOT)
        else:
            ours = Path(os.fsdecode(error.filename)).is_relative_to(_cache_path())
        if not ours:
            raise
        raise _refused(error.strerror or str(error)) from error


def _cache_path() -> Path:
    configured = os.environ.get("PI0_CACHE_DIR")
    return Path(configured).expanduser().resolve() if configured else REPO_ROOT / ".cache"


def _refused(reason: str) -> OutputError:
    configured = os.environ.get("PI0_CACHE_DIR")
    given = f"PI0_CACHE_DIR = {configured}" if configured else str(REPO_ROOT / ".cache")
    return OutputError(
        f"{given} cannot be the folder of the cache: {reason}; set PI0_CACHE_DIR to a writable folder with room"
    )
