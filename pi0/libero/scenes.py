"""A disk cache of compiled scenes: compiling a task's meshes and textures takes seconds, loading the result does not."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from pathlib import Path

import mujoco
import numpy as np

from pi0.base.files import write_whole
from pi0.base.paths import cache_dir

logger = logging.getLogger(__name__)

# A scene takes 40 to 80 MB, most of it the robot's meshes; the least recently used ones are removed first.
MAX_CACHE_BYTES = 2_000_000_000
_DIGEST_BYTES = hashlib.sha256().digest_size


def compile_scene(xml: str) -> mujoco.MjModel:
    """The result of `mujoco.MjModel.from_xml_string`, from the cache if it has been compiled before.

    Entries depend on the XML, on path, size and time of every file that it names, and on MuJoCo's version. A damaged
    entry is made again. If the cache cannot be written, this only costs time.
    """
    file = cache_dir() / "scenes" / f"{_key(xml)}.mjb"
    model = _load(file)
    if model is None:
        model = mujoco.MjModel.from_xml_string(xml)
        try:
            _save(file, model)
        except OSError as error:
            logger.warning("a compiled scene could not be kept in %s: %s", file.parent, error)
    return model


def _key(xml: str) -> str:
    digest = hashlib.sha256(f"{mujoco.__version__}\n{xml}".encode())
    for name in sorted(set(re.findall(r'\bfile="([^"]+)"', xml))):
        stat = os.stat(name)
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _load(file: Path) -> mujoco.MjModel | None:
    """Read a cached file: a digest, then MuJoCo's binary format, which MuJoCo itself hardly checks."""
    try:
        with file.open("rb") as stream:
            digest, binary = stream.read(_DIGEST_BYTES), stream.read()
    except OSError:
        return None
    if hashlib.sha256(binary).digest() != digest:
        logger.warning("the compiled scene %s is damaged; it is made again", file)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # used now
    return mujoco.MjModel.from_binary_path(file.name, {file.name: binary})


def _save(file: Path, model: mujoco.MjModel) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    binary = buffer.tobytes()
    write_whole(file, hashlib.sha256(binary).digest() + binary)
    _drop_oldest(file.parent)


def _drop_oldest(folder: Path) -> None:
    """Keep the cache within its size limit; other processes may do the same."""
    with contextlib.suppress(FileNotFoundError):
        entries = sorted(((file.stat().st_mtime, file) for file in folder.glob("*.mjb")), reverse=True)
        total = 0
        for _, file in entries:
            total += file.stat().st_size
            if total > MAX_CACHE_BYTES:
                file.unlink(missing_ok=True)
