"""Writes demonstrations as a LeRobot data set, layout v3.0.

Today's LeRobot opens only v3.0 (huggingface/lerobot v0.4.0 and later refuse v2.1, see
src/lerobot/datasets/utils.py, `check_version_compatibility`). Its few large files also suit short episodes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.data.demonstrations import DataError, Demonstration, Observation, Orientation
from pi0.data.frames import VideoWriter, encode_png
from pi0.data.lerobot_layout import (
    DATA_FILE_MB,
    DATA_PATH,
    EPISODES_PARQUET,
    FILES_IN_CHUNK,
    INDEX_FEATURES,
    INFO,
    LAST_OBSERVATIONS,
    LEROBOT_NAMES,
    SHARED_FILES,
    STATS,
    TASKS_PARQUET,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    FeatureNames,
)
from pi0.data.lerobot_statistics import DatasetStatistics

_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class LeRobotWriter:
    """Writes demonstrations one by one, and the data set's meta files at the end; one episode is in memory.

    The whole set appears at `root` when the writer is closed. Before that, and after an error, `root` holds
    nothing. Use it as a context manager.

    Args:
        root: folder of the data set; it must not exist yet, or be empty.
        fps: control steps a second.
        names: names of its features.
        orientation: orientation of the stored images; by default that of LeRobot's and openpi's LIBERO sets.
        video: write images as H.264 videos, with a tenth of the size and some loss; else as PNG.
        robot_type: value for meta/info.json.

    Raises:
        DataError: `root` is not empty, or cannot be written to.
    """

    def __init__(
        self,
        root: str | Path,
        fps: int,
        names: FeatureNames = LEROBOT_NAMES,
        orientation: Orientation = Orientation.ROTATED,
        video: bool = False,
        robot_type: str = "panda",
    ):
        self.root, self.names, self._fps, self._video = Path(root), names, fps, video
        self._orientation, self._robot_type = Orientation(orientation), robot_type
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise DataError(f"{self.root} exists; name a new folder for the data set, or remove that one")
        self._partial = self.root.with_name(f".{self.root.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            (self._partial / "meta").mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"cannot write to {self.root}: {error.strerror}; choose another folder"
            ) from error
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._statistics = DatasetStatistics()
        self._data = _Shards(DATA_PATH, DATA_FILE_MB)
        self._parquet: pq.ParquetWriter | None = None
        self._last: pq.ParquetWriter | None = None
        self._videos = {
            name: _Shards(VIDEO_PATH.replace("{video_key}", name), VIDEO_FILE_MB)
            for name in names.cameras.values()
        }
        self._films: dict[str, VideoWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, demonstration: Demonstration) -> None:
        """Append an episode.

        Raises:
            DataError: images of some steps or cameras are missing, shapes differ from earlier episodes', or
                images for a video have odd sides. The episode is left out.
        """
        steps, names = len(demonstration), self.names
        if len(demonstration.image_steps) != steps or demonstration.images.keys() != names.cameras.keys():
            raise DataError(
                f"an episode of {demonstration.prompt!r} has images of "
                f"{', '.join(demonstration.images) or 'no camera'} at {len(demonstration.image_steps)} of {steps} steps; "
                f"a data set needs those of {', '.join(names.cameras)} at every step"
            )
        images = {
            feature: self._orientation.convert(demonstration.images[camera])
            for camera, feature in names.cameras.items()
        }
        numbers = self._number_columns(demonstration)
        features = self._describe(numbers, images)
        if self._features and features != self._features:
            differing = [
                name for name in features | self._features if features.get(name) != self._features.get(name)
            ]
            raise DataError(
                f"an episode of {demonstration.prompt!r} differs from earlier ones in {', '.join(differing)}"
            )
        self._features = features
        self._tasks.setdefault(demonstration.prompt, len(self._tasks))
        episode = {
            "episode_index": len(self._episodes),
            "tasks": [demonstration.prompt],
            "length": steps,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + steps,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        if self._video:
            for name, frames in images.items():
                episode |= self._write_video(name, frames)
        episode |= self._write_rows(numbers, {} if self._video else images)
        if demonstration.last is not None:
            self._write_last(demonstration.last)
        for name, statistics in self._statistics.add(numbers, images).items():
            episode |= {f"stats/{name}/{key}": values for key, values in statistics.items()}
        self._episodes.append(episode)
        self._frames += steps

    def close(self) -> None:
        """Write the meta files and move the data set to its place.

        Raises:
            DataError: no demonstration was added.
        """
        if not self._episodes:
            self.discard()
            raise DataError(f"there is no demonstration to write to {self.root}")
        self._close_files()
        for name in self._videos if self._video else ():
            self._features[name]["info"] = self._video_info(self._features[name]["shape"])
        episodes = self._partial / EPISODES_PARQUET.format(chunk_index=0, file_index=0)
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes)
        _write_tasks(list(self._tasks), self._partial / TASKS_PARQUET)
        _write_json(self._partial / STATS, self._statistics.total())
        _write_json(self._partial / INFO, self._info())
        if self.root.exists():
            self.root.rmdir()
        os.replace(self._partial, self.root)

    def discard(self) -> None:
        """Remove all that was written."""
        self._close_files()
        shutil.rmtree(self._partial, ignore_errors=True)

    # One episode

    def _number_columns(self, demonstration: Demonstration) -> dict[str, np.ndarray]:
        """All columns but images, [T] or [T, D], in the order of the file."""
        steps, names = len(demonstration), self.names
        task = self._tasks.get(demonstration.prompt, len(self._tasks))
        columns = {
            names.state: np.asarray(demonstration.states, np.float32),
            names.actions: np.asarray(demonstration.actions, np.float32),
            names.executed: np.asarray(demonstration.executed, np.float32),
        }
        if demonstration.rewards is not None:
            columns[names.reward] = np.asarray(demonstration.rewards, np.float32)
        for name, flags in (
            (names.done, demonstration.dones),
            (names.success, demonstration.successes),
            (names.truncated, demonstration.truncated),
        ):
            if flags is not None:
                columns[name] = np.asarray(flags, bool)
        frame = np.arange(steps)
        return columns | {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(steps, len(self._episodes)),
            "index": self._frames + frame,
            "task_index": np.full(steps, task),
        }

    def _describe(self, numbers: dict[str, np.ndarray], images: dict[str, np.ndarray]) -> dict[str, dict]:
        """The features of meta/info.json."""
        kind = "video" if self._video else "image"
        features: dict[str, dict] = {
            name: {"dtype": kind, "shape": list(frames.shape[1:]), "names": ["height", "width", "channels"]}
            for name, frames in images.items()
        }
        for name, values in numbers.items():
            shape = list(values.shape[1:]) or [1]
            features[name] = {"dtype": str(values.dtype), "shape": shape, "names": None}
        return features | INDEX_FEATURES

    def _write_rows(self, numbers: dict[str, np.ndarray], images: dict[str, np.ndarray]) -> dict[str, int]:
        columns: dict[str, pa.Array] = {}
        for name, frames in images.items():
            columns[name] = pa.array(
                [
                    {"bytes": encode_png(np.ascontiguousarray(frame)), "path": f"frame-{step:06d}.png"}
                    for step, frame in enumerate(frames)
                ],
                _IMAGE_TYPE,
            )
        for name, values in numbers.items():
            flat = pa.array(values.ravel())
            columns[name] = (
                pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim > 1 else flat
            )
        table = pa.table(columns)
        if self._data.is_full and self._parquet is not None:
            self._parquet.close()
            self._parquet = None
            self._data.advance()
        path = self._data.path(self._partial)
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._parquet.write_table(
            table, row_group_size=len(table)
        )  # an episode is one row group, so it can be read without the others
        return {"data/chunk_index": self._data.chunk, "data/file_index": self._data.file}

    def _write_last(self, last: Observation) -> None:
        """A row of what was seen after the episode's last action, images as PNG."""
        state = pa.array(np.asarray(last.state, np.float32))
        columns: dict[str, pa.Array] = {
            "episode_index": pa.array([len(self._episodes)]),
            self.names.state: pa.FixedSizeListArray.from_arrays(state, len(state)),
        }
        for camera, feature in self.names.cameras.items():
            frame = np.ascontiguousarray(self._orientation.convert(last.images[camera]))
            columns[feature] = pa.array([encode_png(frame)], pa.binary())
        table = pa.table(columns)
        if self._last is None:
            self._last = pq.ParquetWriter(self._partial / LAST_OBSERVATIONS, table.schema)
        self._last.write_table(table)

    def _write_video(self, name: str, frames: np.ndarray) -> dict[str, float]:
        shards = self._videos[name]
        if shards.is_full and name in self._films:
            self._films.pop(name).close()
            shards.advance()
        if name not in self._films:
            height, width = frames.shape[1:3]
            self._films[name] = VideoWriter(shards.path(self._partial), self._fps, height, width)
        film = self._films[name]
        start = film.seconds
        film.write(frames)
        return {
            f"videos/{name}/chunk_index": shards.chunk,
            f"videos/{name}/file_index": shards.file,
            f"videos/{name}/from_timestamp": start,
            f"videos/{name}/to_timestamp": film.seconds,
        }

    # The whole set

    def _close_files(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
        if self._last is not None:
            self._last.close()
            self._last = None
        while self._films:
            self._films.popitem()[1].close()

    def _video_info(self, shape: list[int]) -> dict[str, Any]:
        """LeRobot's description of its videos (src/lerobot/datasets/video_utils.py, `get_video_info`)."""
        return {
            "video.height": shape[0],
            "video.width": shape[1],
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.fps": self._fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        }

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": SHARED_FILES,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_IN_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._video else None,
            "features": self._features,
        }


class _Shards:
    """Numbers the files of limited size and knows the current one."""

    def __init__(self, template: str, limit_mb: float):
        self._template, self._limit_mb = template, limit_mb
        self.chunk = self.file = 0
        self._current: Path | None = None

    @property
    def is_full(self) -> bool:
        """Whether the next episode needs a new file."""
        return self._current is not None and self._current.stat().st_size >= self._limit_mb * 2**20

    def advance(self) -> None:
        """Continue with the next file."""
        self.file += 1
        if self.file == FILES_IN_CHUNK:
            self.chunk, self.file = self.chunk + 1, 0

    def path(self, root: Path) -> Path:
        """The current file; its folder is made."""
        self._current = root / self._template.format(chunk_index=self.chunk, file_index=self.file)
        self._current.parent.mkdir(parents=True, exist_ok=True)
        return self._current


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4))


def _write_tasks(tasks: list[str], path: Path) -> None:
    """Write the instructions as the data frame that LeRobot reads with pandas, indexed by instruction."""
    table = pa.table(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())}
    )
    columns = [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {
            "name": "task",
            "field_name": "task",
            "pandas_type": "unicode",
            "numpy_type": "object",
            "metadata": None,
        },
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
