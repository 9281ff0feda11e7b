"""Where this project keeps what it makes: one cache folder, never the user's home."""

import os
from pathlib import Path

from pi0.base.errors import OutputError

REPO_ROOT = Path(__file__).resolve().parent.parent.parent


def cache_dir() -> Path:
    """Return the folder for everything that can be made again; it is created on first use.

    `PI0_CACHE_DIR` names it; without that it is `.cache` in the repository.

    Raises:
        OutputError: it cannot be made.
    """
    configured = os.environ.get("PI0_CACHE_DIR")
    path = Path(configured).expanduser().resolve() if configured else REPO_ROOT / ".cache"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"PI0_CACHE_DIR = {configured}" if configured else str(path)
        raise OutputError(
            f"{given} cannot be the folder of the cache: {error.strerror}; set PI0_CACHE_DIR to a writable folder"
        ) from error
    return path
