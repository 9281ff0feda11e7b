"""What decides a run's results but lies outside its folder: remembered in its checkpoints, compared on resume."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pi0.base.errors import OutputError

# Larger files count by their size and both ends; to read a data set of 30 GB would take a minute.
WHOLE_BYTES, END_BYTES = 64 << 20, 1 << 20


def fingerprint(path: str | Path | None) -> str | None:
    """A hash of a file, or of the names and contents of a folder; None if there is nothing, "missing" if it is gone."""
    if path is None:
        return None
    path = Path(path)
    if not path.exists():
        return "missing"
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_files(path)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE_BYTES:
                digest.update(hashlib.file_digest(content, "sha256").digest())
            else:
                digest.update(content.read(END_BYTES))
                content.seek(-END_BYTES, os.SEEK_END)
                digest.update(content.read())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in folder.walk() if hasattr(folder, "walk") else os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".")
        ]  # caches and what is being written
        yield from (Path(root) / name for name in names if not name.startswith("."))


def compare(earlier: Mapping[str, str | None], now: Mapping[str, str | None], fixed: Collection[str]) -> None:
    """Compare what a run stands on with what it stood on; prints what differs.

    Args:
        earlier, now: fingerprints and versions by name; a name that only one of them has is left out.
        fixed: names of those that must not differ.

    Raises:
        OutputError: one of them differs.
    """
    changed = {name: (earlier[name], now[name]) for name in now if earlier.get(name, now[name]) != now[name]}
    if refused := {name: pair for name, pair in changed.items() if name in fixed}:
        texts = "; ".join(f"{name} was {was} and is {new}" for name, (was, new) in refused.items())
        raise OutputError(
            f"the run cannot be resumed, because scores before and after would not be of the same simulation ({texts}); "
            "restore what it began with, or start a new run"
        )
    for name, (was, new) in changed.items():
        print(f"resuming with other {name}: it was {was} and is {new}")
