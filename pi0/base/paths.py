"""Where this project keeps what it makes: one cache folder, never the user's home."""

import os
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent.parent


def cache_dir() -> Path:
    """Return the folder for everything that can be made again; it is created on first use.

    `PI0_CACHE_DIR` names it; without that it is `.cache` in the repository.
    """
    configured = os.environ.get("PI0_CACHE_DIR")
    path = Path(configured).resolve() if configured else REPO_ROOT / ".cache"
    path.mkdir(parents=True, exist_ok=True)
    return path
