"""Episodes of an evaluation, kept in a file while it runs: a rerun reads them and goes on with the others."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any, Self

from pi0.base.errors import OutputError
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.films import write_film


class KeptEpisodes:
    """A file of finished episodes, a line each. Its first line are the terms under which all of them were run.

    Episodes that broke are written, too, but a rerun tries them again.

    Args:
        folder: for the file, and for the videos of episodes that were filmed.
        terms: everything that an episode's outcome depends on, besides its task, for JSON.

    Raises:
        OutputError: the file is of other terms or damaged, or another process is writing it.
    """

    NAME = "episodes.jsonl"

    def __init__(self, folder: Path, terms: dict[str, Any]):
        self._folder, self._file = folder, folder / self.NAME
        self._stream = self._file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise OutputError(
                f"{self._file} is being written by another evaluation; wait for it, or choose another --output"
            ) from None
        self._outlines = self._read(json.loads(json.dumps(terms)))

    def outline(self, rollout: Rollout) -> dict[str, Any] | None:
        """What is known of a rollout (`success`, `steps`, `conditions`); None if it is still to be run."""
        return self._outlines.get(_name(rollout))

    def add(self, episode: Episode) -> Episode:
        """Write an episode, and its film if it has one; it is returned without them."""
        line = {
            "name": _name(episode.rollout),
            "success": episode.success,
            "steps": episode.steps,
            "failure": episode.failure,
            "conditions": episode.conditions,
        }
        self._write(line)
        write_film(episode, self._folder)
        return episode.outline()

    def close(self) -> None:
        """Let others write the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, terms: dict[str, Any]) -> dict[str, dict[str, Any]]:
        self._stream.seek(0)
        # The end of a line that was being written when the machine stopped.
        whole, newline, _ = self._stream.read().rpartition(b"\n")
        self._stream.truncate(len(whole) + len(newline))
        if not whole:
            self._write(terms)
            return {}
        try:
            kept, *lines = (json.loads(line) for line in whole.decode().split("\n"))
            outlines = {line["name"]: line for line in lines if line["failure"] is None}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self._file} is damaged ({error}); remove it, or choose another --output"
            ) from error
        if kept != terms:
            raise OutputError(
                f"{self._file} holds an evaluation of another kind: {_difference(kept, terms)}; choose another --output, or "
                "remove the file"
            )
        return outlines

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()


def _name(rollout: Rollout) -> str:
    return f"{rollout.task.name} {rollout.init_index}"


def _difference(kept: Any, now: Any, where: str = "") -> str:
    """The first entry in which two dictionaries differ."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in [*kept, *now]:
            if kept.get(key) != now.get(key):
                return _difference(kept.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    return f"{where} was {kept!r} and is {now!r}"
