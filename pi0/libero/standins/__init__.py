"""Built-in stand-ins for LIBERO's geometry: every object, fixture and scene of its suites, generated
from primitives, in the folder layout and with the names that LIBERO's code asks for; and what LIBERO-PRO and
LIBERO-plus add to them.
"""

import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from pi0.base.files import locked
from pi0.base.paths import cache_dir, writing_cache
from pi0.libero.standins.added import CHANGED, THINGS
from pi0.libero.standins.fixtures import FIXTURES
from pi0.libero.standins.mjcf import write_item
from pi0.libero.standins.objects import OBJECTS
from pi0.libero.standins.scenes import SCENES, write_textures

MANIFEST = "manifest.json"
FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


def build(directory: Path) -> None:
    """Generate an assets folder for LIBERO in `directory` (created when missing)."""
    directory = Path(directory)
    for name in FOLDERS:
        (directory / name).mkdir(parents=True, exist_ok=True)
    for make in (*OBJECTS, *FIXTURES, *(changed.make for changed in CHANGED), *THINGS):
        write_item(make(), directory)
    for write_scene in SCENES:
        write_scene(directory)
    write_textures(directory)
    (directory / MANIFEST).write_text(json.dumps(_hashes(directory), indent=1, sort_keys=True) + "\n")


def fingerprint(folder: Path) -> str:
    """Return a hash of what was generated into `folder`: the same on every machine with the same geometry."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12]


def standins_path() -> Path:
    """Return the generated assets folder, generating it when it is missing or damaged.

    Processes that start together wait for the first one; a folder is complete from when it has its name.
    """
    parent = cache_dir() / "standins"
    folder = parent / _source_hash()
    if _is_intact(folder):
        return folder
    with writing_cache():
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent / "lock"):
            if not _is_intact(folder):
                shutil.rmtree(folder, ignore_errors=True)
                temporary = Path(tempfile.mkdtemp(dir=parent, prefix="building."))
                try:
                    build(temporary)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    return folder


@cache
def _source_hash() -> str:
    """Return the hash of the generator's source, under which its output is kept."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def _is_intact(folder: Path) -> bool:
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return wanted == _hashes(folder)
