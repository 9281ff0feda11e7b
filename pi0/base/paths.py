"""Where this project is, and where it keeps what it makes: one cache folder."""

import errno
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pi0.base.errors import OutputError

# The checkout; the folder of packages where the project has been installed.
REPO_ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = not (REPO_ROOT / "pyproject.toml").is_file()
# Stage scripts, configurations, the warm-started policy and the lock file.
DATA_ROOT = Path(sysconfig.get_path("data")) / "share" / "ript-pi0" if INSTALLED else REPO_ROOT


def cache_dir() -> Path:
    """Return the folder for everything that can be made again; it is created on first use.

    `PI0_CACHE_DIR` names it. Without that it is `.cache` in the checkout, never in the user's home; where the project has
    been installed there is no checkout, and it is the user's own cache folder (`XDG_CACHE_HOME`, `~/.cache`). Where it
    cannot be written, no other place is taken: the user says where gigabytes go, and nobody has to look for them.

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
    if configured:
        return Path(configured).expanduser().resolve()
    if not INSTALLED:
        return REPO_ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ript-pi0"


def _refused(reason: str) -> OutputError:
    configured = os.environ.get("PI0_CACHE_DIR")
    given = f"PI0_CACHE_DIR = {configured}" if configured else str(_cache_path())
    return OutputError(
        f"{given} cannot be the folder of the cache: {reason}; set PI0_CACHE_DIR to a writable folder with room"
    )
