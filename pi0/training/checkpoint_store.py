"""A folder of training checkpoints that survives kills, power cuts and full disks.

    step-000012/manifest.json     size and SHA-256 of every file, the step, its score, facts
    step-000012/...               the caller's files
    .step-000012.tmp              being written
    .step-000012.replaced         the step's earlier checkpoint, until the new one has taken its place
    .step-000012.pruned           being deleted

A checkpoint gets its name in one rename, after all of it has reached the disk. It loses the name in one rename,
before any of it is deleted. One run at a time writes to a folder. Hidden folders that `begin` finds belong to an
earlier, dead run and are removed. Reading changes nothing, so every rank may read at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pi0.base.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"step-(\d{6,})|\.step-(\d{6,})\.replaced")
_HIDDEN = re.compile(r"\.(step-\d{6,})\.(tmp|replaced|pruned)")


class CheckpointStore:
    """The checkpoints of one run.

    Rank 0 calls `begin`. Then every rank writes its own files into `temporary(step)`, with a barrier before and
    after. Then rank 0 calls `seal`, or `abandon` if a rank could not write.

    Args:
        folder: the folder; it is made when the first checkpoint begins.
        keep: how many of the newest checkpoints stay, beside the one being written.
        keep_best: keep the checkpoint with the best score as well.
        every: steps from one checkpoint to the next.
        last: the last step of the run; None if it is unknown.

    Raises:
        CheckpointError: `keep` is below 1.
    """

    def __init__(
        self, folder: Path, keep: int, keep_best: bool = True, every: int = 1, last: int | None = None
    ):
        if keep < 1:
            raise CheckpointError(f"{keep} checkpoints to keep: at least one must stay")
        self.folder = Path(folder)
        self.keep = keep
        self.keep_best = keep_best
        self.every = every
        self.last = last
        self._damaged: set[Path] = set()
        self._last: int | None = None  # step of the checkpoint that `newest_valid` found

    def is_due(self, step: int, score: float | None = None, asked: bool = False) -> bool:
        """Whether a checkpoint must be made after `step`.

        Args:
            step: iterations done.
            score: score of this step, as for `seal`; it may be the best.
            asked: somebody has requested a checkpoint.
        """
        regular = step % self.every == 0 or step == self.last
        return asked or regular or (self.keep_best and score is not None)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step, whether it is there or not."""
        return self._path(step)

    def temporary(self, step: int) -> Path:
        """Folder for the files of the checkpoint that is being written; it is not made here."""
        return self._path(step, "tmp")

    def begin(self, step: int) -> Path:
        """Remove what a kill left behind and make an empty `temporary(step)`.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are unchanged.
        """
        with self._refusals_named(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            self.temporary(step).mkdir()
        return self.temporary(step)

    def abandon(self, step: int) -> None:
        """Remove `temporary(step)` to free its space; what cannot be removed now, the next `begin` removes."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def seal(self, step: int, score: float | None = None, facts: dict | None = None) -> Path:
        """Turn `temporary(step)` into a checkpoint, replace an earlier one of the step, and prune.

        The newest `keep` stay, and the one with the best score (the newest of equal ones), and this one. Damaged
        ones that `newest_valid` skipped are removed and not counted. Later steps are removed too: the run has
        returned to an earlier step.

        Args:
            step: iterations done.
            score: higher is better; None never counts as best.
            facts: anything that JSON can hold, for `facts`.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are unchanged and `temporary(step)` is removed. Or
                this checkpoint is saved but another could not be removed; the message tells which.
        """
        temporary, final, replaced = self.temporary(step), self._path(step), self._path(step, "replaced")
        if not temporary.is_dir():
            raise CheckpointError(f"{temporary} does not exist; call begin({step}) before seal({step})")
        if score is not None and not math.isfinite(score):
            raise CheckpointError(f"score of step {step} is {score}; give a finite number, or None for none")
        with self._refusals_named(step):
            (temporary / MANIFEST).unlink(missing_ok=True)
            files = {
                name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
                for name in _files(temporary)
            }
            content = {"format": _FORMAT, "step": step, "score": score, "facts": facts or {}, "files": files}
            content = json.loads(json.dumps(content))  # as it will be read back: keys are strings
            content["sha256"] = _sha256_of_json(content)
            (temporary / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            _sync(self.folder)
        try:
            self._damaged.discard(final)
            if replaced.exists():
                self._remove(replaced)
            self._prune(step)
        except OSError as error:
            raise CheckpointError(
                f"{final} is saved, but an older checkpoint cannot be removed: {error}; remove it by hand"
            ) from error
        return final

    def resume_point(self, step: int) -> str:
        """Describe where a run that has done `step` iterations would resume, and what it must repeat."""
        checkpoints = self._sound()
        if not checkpoints:
            return "the start, since there is no checkpoint"
        lost = step - max(checkpoints)
        again = f"; {lost} iterations after it must be repeated" if lost > 0 else ""
        return f"{checkpoints[max(checkpoints)]}{again}"

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of `step` that `newest_valid` has not skipped; it is not verified here."""
        return step in self._sound()

    def newest_valid(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest valid checkpoint, or None; and the newer damaged ones with their faults, newest first."""
        damaged: list[tuple[Path, str]] = []
        newest = self._last = None
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            reason = self.verify(path)
            if reason is None:
                newest, self._last = path, step
                break
            damaged.append((path, reason))
        self._damaged.update(path for path, _ in damaged)
        return newest, damaged

    def drop_last(self) -> None:
        """Remove the checkpoint that `newest_valid` last found, and newer ones, if an earlier one is valid.

        A run does so if it fails again after that checkpoint.

        Raises:
            OSError: the disk refuses.
        """
        checkpoints, last = self._checkpoints(), self._last
        if last is None or all(self.verify(path) for step, path in checkpoints.items() if step < last):
            return
        for step in checkpoints:
            if step >= last:
                self._remove(checkpoints[step])

    def verify(self, path: Path) -> str | None:
        """The fault of a checkpoint, or None if it is valid; reads all of it."""
        try:
            written = _read_manifest(path)["files"]
            found = set(_files(path)) - {MANIFEST}
            for name in sorted(written.keys() - found):
                return f"{name} is missing"
            for name in sorted(found - written.keys()):
                return f"{name} is a surplus file"
            for name, entry in written.items():
                size = (path / name).stat().st_size
                if size != entry["size"]:
                    return f"{name} has {size} bytes, {entry['size']} were written"
            for name, entry in written.items():
                if _sha256(path / name) != entry["sha256"]:
                    return f"{name}: its checksum differs from what was written"
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error}"
        return None

    def facts(self, path: Path) -> dict:
        """The facts that were given to `seal`.

        Raises:
            CheckpointError: the checkpoint's manifest is missing or damaged.
        """
        try:
            return _read_manifest(path)["facts"]
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; use an older checkpoint") from error

    def _path(self, step: int, state: str | None = None) -> Path:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return self.folder / (f".step-{step:06d}.{state}" if state else f"step-{step:06d}")

    def _checkpoints(self) -> dict[int, Path]:
        """Checkpoints by step. After a kill between the two renames of `seal`, the old one still counts."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for path in sorted(self.folder.iterdir()):  # hidden names come first, so that others replace them
            match = _CHECKPOINT.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1] or match[2])] = path
        return found

    def _sound(self) -> dict[int, Path]:
        return {step: path for step, path in self._checkpoints().items() if path not in self._damaged}

    def _prune(self, sealed: int) -> None:
        checkpoints = self._checkpoints()
        sound = sorted(step for step in self._sound() if step <= sealed)
        scores = []
        for step in sound if self.keep_best else []:
            try:
                score = _read_manifest(checkpoints[step])["score"]
            except CheckpointError:
                continue  # a checkpoint without a readable score cannot be the best
            if score is not None:
                scores.append((score, step))
        best = {max(scores)[1]} if scores else set()
        for step in checkpoints.keys() - best - {sealed, *sound[-self.keep :]}:
            self._remove(checkpoints[step])

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".{path.name.removeprefix('.').removesuffix('.replaced')}.pruned")
        path.rename(doomed)
        _sync(self.folder)
        shutil.rmtree(doomed)

    def _clear_leftovers(self) -> None:
        for path in sorted(self.folder.iterdir()):
            match = _HIDDEN.fullmatch(path.name)
            if match and match[2] == "replaced" and not (self.folder / match[1]).exists():
                path.rename(self.folder / match[1])
            elif match and match[2] == "replaced":
                self._remove(path)
            elif match:
                shutil.rmtree(path)

    @contextmanager
    def _refusals_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon(step)
            raise CheckpointError(
                f"checkpoint of step {step} is not saved: {error}; make room in {self.folder} or make it "
                "writable. Earlier checkpoints are unchanged"
            ) from error


def save_state(path: Path, state: dict) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries with torch.save.

    Raises:
        CheckpointError: the disk refuses; nothing is left at `path`.
        TypeError: the state holds a class that `load_state` does not trust.
    """
    try:
        with path.open("wb") as stream:
            torch.save(state, stream)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError about file positions; its context is the disk's error.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} is not written: {reason}; make room or choose another folder"
        ) from error
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        path.unlink()
        raise TypeError(f"{path}: {', '.join(unsafe)} cannot be read back; save tensors, numbers and strings")


def load_state(path: Path, mapped: bool = False) -> dict:
    """Read what `save_state` wrote, with tensors on the CPU; no code from the file is run.

    Args:
        path: the file.
        mapped: a tensor is read when it is used, and takes no memory of its own.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(
            f"{path} cannot be read ({reason}); remove {path.parent} to use an older checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state; save it with save_state")
    return state


def _read_manifest(checkpoint: Path) -> dict:
    """Read and check a manifest; raises CheckpointError with only the reason."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{MANIFEST} has the unknown format {found}; this program reads {_FORMAT}")
    if content.pop("sha256", None) != _sha256_of_json(content):
        raise CheckpointError(f"{MANIFEST}: its checksum differs from what was written")
    return content


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of_json(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
