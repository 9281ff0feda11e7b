"""The meshes and textures that LIBERO uses, and how results describe them.

LIBERO's package holds tasks and initial states, but no geometry. This module searches in this order: a configured
path (or `LIBERO_ASSETS`), the installed package, the model hub if it can be reached, the built-in stand-ins.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.base.errors import InputError
from pi0.base.files import LFS_MEND, LFS_POINTER_BYTES, is_lfs_pointer, locked
from pi0.base.paths import cache_dir, writing_cache
from pi0.libero import standins
from pi0.libero.libero_import import libero_package_root, prepare_libero

logger = logging.getLogger(__name__)

EXPECTED_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
HUB_TIMEOUT_S = 2.0

_announced: set["Assets"] = set()


class AssetsError(InputError, RuntimeError):
    """LIBERO cannot use the configured assets folder."""


@dataclass(frozen=True)
class Assets:
    """A folder that LIBERO can load its objects and scenes from.

    source: "configured", "installed", "hub" or "standins".
    path: the folder.
    """

    source: str
    path: Path

    def describe(self) -> dict[str, str]:
        """Return the description of the geometry for results.

        Stand-ins have a hash of their content, so that two machines can compare them. A folder of LIBERO's own
        assets has its path and a hash of the names and sizes in it.
        """
        if self.source == "standins":
            return {"source": self.source, "fingerprint": standins.fingerprint(self.path)}
        return {"source": self.source, "path": str(self.path), "fingerprint": _fingerprint(self.path)}


def resolve_assets(configured: str | None = None) -> Assets:
    """Return the first assets available in the documented order.

    Args:
        configured: a folder, or "standins" for the built-in ones; None reads `LIBERO_ASSETS`.

    Raises:
        AssetsError: the configured folder does not exist, lacks folders that LIBERO reads, or holds Git LFS pointers.
    """
    configured = configured or os.environ.get("LIBERO_ASSETS")
    if configured == "standins":
        return Assets("standins", standins.standins_path())
    if configured:
        path = Path(configured).expanduser().resolve()
        if not path.is_dir():
            raise AssetsError(
                f"the assets folder {path} does not exist (it comes from the configuration or from "
                f"LIBERO_ASSETS; 'standins' selects the built-in ones)"
            )
        missing = _missing_folders(path)
        if missing:
            raise AssetsError(f"the assets folder {path} lacks {', '.join(missing)}")
        if pointer := _lfs_pointer_in(path):
            raise AssetsError(f"the assets folder {path}: {pointer} is a {LFS_MEND}")
        return Assets("configured", path)
    installed = libero_package_root() / "assets"
    if installed.is_dir():
        missing = _missing_folders(installed)
        if not missing:
            return Assets("installed", installed)
        logger.warning("LIBERO's own assets at %s are incomplete (no %s)", installed, ", ".join(missing))
    downloaded = _hub_assets()
    if downloaded is not None:
        return Assets("hub", downloaded)
    return Assets("standins", standins.standins_path())


def use_assets(assets: Assets) -> None:
    """Make LIBERO build every later environment of this process from `assets`, and log it once."""
    libero: Any = prepare_libero()
    libero._assets_path_cache = str(assets.path)
    if assets not in _announced:
        _announced.add(assets)
        logger.info("LIBERO assets: %s (%s)", assets.source, assets.path)


def _missing_folders(path: Path) -> list[str]:
    return [name for name in EXPECTED_FOLDERS if not (path / name).is_dir()]


def _lfs_pointer_in(folder: Path) -> Path | None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= LFS_POINTER_BYTES and is_lfs_pointer(path):
            return path.relative_to(folder)
    return None


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:12]


def _hub_assets() -> Path | None:
    """Return LIBERO's assets from the model hub, downloading them once, or None without a hub."""
    folder = cache_dir() / "libero" / "hub_assets"
    if folder.is_dir() and not _missing_folders(folder):
        return folder
    if importlib.util.find_spec("huggingface_hub") is None:
        logger.info("no LIBERO assets from the hub: the package huggingface_hub is not installed")
        return None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        logger.info("no LIBERO assets from the hub: HF_HUB_OFFLINE is set")
        return None
    if not _reachable(endpoint, HUB_TIMEOUT_S):
        logger.info("no LIBERO assets from the hub: no answer from %s in %g s", endpoint, HUB_TIMEOUT_S)
        return None
    os.environ.setdefault("HF_HOME", str(cache_dir() / "huggingface"))
    prepare_libero()
    download_utils = importlib.import_module("libero.libero.utils.download_utils")
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock")
        lock.touch()
    with locked(lock):
        if folder.is_dir() and not _missing_folders(folder):
            return folder
        # LIBERO's downloader treats a half-finished folder as finished, so it gets an empty one.
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="hub_assets."))
        try:
            download_utils.download_assets_from_huggingface(str(temporary))
            missing = _missing_folders(temporary)
            if missing:
                raise AssetsError(f"the hub's assets lack {', '.join(missing)}")
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except Exception as error:  # noqa: BLE001 - after a failed download the next source is used
            logger.warning("LIBERO assets could not be downloaded from the hub: %s", error)
            shutil.rmtree(temporary, ignore_errors=True)
            return None
    return folder


def _reachable(url: str, timeout_s: float) -> bool:
    """Tell whether an HTTP server answers within `timeout_s`, name resolution included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer
        except (OSError, ValueError):
            return
        answered.set()

    # A name lookup has no time-out, so it stays behind in a daemon thread.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(timeout_s)
