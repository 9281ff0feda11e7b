"""Demonstrations from a LeRobot data set on disk, layouts v2.0, v2.1 and v3.0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi0.base.errors import MissingFileError
from pi0.base.files import why_unreadable
from pi0.data.demonstrations import (
    DataError,
    Demonstration,
    DemonstrationSet,
    Description,
    Gripper,
    Observation,
    Orientation,
)
from pi0.data.description import feature_names
from pi0.data.frames import decode_image, read_video
from pi0.data.lerobot_layout import (
    EPISODE_FILES,
    EPISODES_JSONL,
    LAST_OBSERVATIONS,
    DatasetInfo,
    FeatureNames,
)


@dataclass(frozen=True)
class _Episode:
    """The place of one episode: its parquet file, and each camera's video with the second where it begins."""

    number: int
    prompt: str
    length: int
    data: Path
    videos: dict[str, tuple[Path, float]]


class LeRobotDemonstrations(DemonstrationSet):
    """The episodes of a LeRobot data set; memory holds one episode and its row groups of the file.

    Args:
        root: folder of the data set.
        names: names of its features; None finds them (`DatasetInfo.find_names`).
        orientation: orientation of its images, which the files do not record. By openpi's and LeRobot's convention
            images of LIBERO are turned by 180 degrees.
        tolerance_s: largest distance of a video frame from its time stamp, seconds; the default is LeRobot's.
        gripper: what 1 means for the gripper, a `Gripper`; the files do not record it.

    Attributes:
        info: the content of meta/info.json.
        names: names of its features.

    Raises:
        MissingFileError: no such folder, or its meta files are missing.
        DataError: an unknown layout or unfit features; the message names what was found and what was expected.
    """

    def __init__(
        self,
        root: str | Path,
        names: FeatureNames | None = None,
        orientation: Orientation = Orientation.ROTATED,
        tolerance_s: float = 1e-4,
        gripper: str = Gripper.CLOSE_IS_1,
    ):
        self.root = Path(root)
        self.info = DatasetInfo.read(self.root)
        self.names = self.info.find_names(names)
        self.cameras = tuple(self.names.cameras)
        self.description = Description(
            self.info.fps,
            self.info.robot_type,
            *(
                feature_names(self.info.features[name].get("names"))
                for name in (self.names.state, self.names.actions)
            ),
        )
        self._orientation = Orientation(orientation)
        self._gripper = Gripper(gripper)
        self._tolerance_s = tolerance_s
        features = self.info.features
        self._video_cameras = {
            camera: name for camera, name in self.names.cameras.items() if features[name]["dtype"] == "video"
        }
        listed = (
            self._separate_episodes()
            if self.info.version in EPISODE_FILES
            else self._episodes_in_shared_files()
        )
        self._episodes = sorted(listed, key=lambda episode: episode.number)
        if len(self._episodes) != self.info.episodes or not self._episodes:
            raise DataError(
                f"{self.info.path}: total_episodes is {self.info.episodes}, "
                f"but {len(self._episodes)} are listed in meta"
            )
        numbers = [episode.number for episode in self._episodes]
        if numbers != list(range(len(numbers))):
            twice = sorted({number for number in numbers if numbers.count(number) > 1})
            missing = sorted(set(range(len(numbers))) - set(numbers))
            raise DataError(
                f"{self.root / 'meta'}: the episodes listed are not 0 to {len(numbers) - 1}: "
                f"listed twice {twice or 'none'}, missing {missing}; perhaps data sets were merged by hand"
            )
        self.prompts = [episode.prompt for episode in self._episodes]
        self.lengths = [episode.length for episode in self._episodes]
        # A row group may hold many episodes, and the next episode is often a neighbour.
        self._cached: tuple[Any, pa.Table] | None = None

    def read(self, index: int, image_steps: Sequence[int] | None = None) -> Demonstration:
        """One demonstration: see `DemonstrationSet.read`."""
        episode = self._episodes[index]
        steps = self._image_steps(index, image_steps)
        names = self.names
        columns = [names.state, names.actions, "timestamp"]
        columns += [
            name
            for name in (names.executed, names.reward, names.done, names.success, names.truncated)
            if name in self.info.features
        ]
        stored_images = set(self.names.cameras.values()) - set(self._video_cameras.values())
        table = self._rows(episode, columns + (sorted(stored_images) if len(steps) else []))
        actions = self._actions(table, self.names.actions, episode)
        executed = (
            self._actions(table, self.names.executed, episode) if self.names.executed in columns else actions
        )
        rewards, *flags = (
            self._numbers(table, name, episode) if name in columns else None
            for name in (names.reward, names.done, names.success, names.truncated)
        )
        dones, successes, truncated = (None if each is None else each.astype(bool) for each in flags)
        return Demonstration(
            prompt=episode.prompt,
            states=self._numbers(table, self.names.state, episode),
            actions=actions,
            image_steps=steps,
            images={
                camera: np.ascontiguousarray(
                    self._orientation.convert(self._frames(table, camera, episode, steps))
                )
                for camera in self.names.cameras
            }
            if len(steps)
            else {},
            executed=executed,
            rewards=rewards,
            dones=dones,
            successes=successes,
            truncated=truncated,
            last=self._last(episode) if len(steps) else None,
        )

    # Where episodes are

    def _separate_episodes(self) -> list[_Episode]:
        path = self.root / EPISODES_JSONL
        if not path.is_file():
            raise MissingFileError(f"{path} not found; perhaps the data set was not copied completely")
        episodes = []
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not text.strip():
                continue
            where = f"{path}, line {line}"
            try:
                record = json.loads(text)
                number, length = int(record["episode_index"]), int(record["length"])
            except (ValueError, KeyError, TypeError) as error:
                why = why_unreadable(path, error)
                raise DataError(f"{where}: needs JSON with episode_index, tasks and length: {why}") from error
            fields = {"episode_index": number, "episode_chunk": number // self.info.chunk_size}
            videos = {
                camera: (self.root / self._format(self.info.video_path, video_key=name, **fields), 0.0)
                for camera, name in self._video_cameras.items()
            }
            data = self.root / self._format(self.info.data_path, **fields)
            episodes.append(_Episode(number, _prompt(record.get("tasks"), where), length, data, videos))
        return episodes

    def _episodes_in_shared_files(self) -> list[_Episode]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise MissingFileError(
                f"no parquet file in {self.root / 'meta/episodes'}; perhaps the data set was not copied completely"
            )
        columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
        for name in self._video_cameras.values():
            columns += [f"videos/{name}/{what}" for what in ("chunk_index", "file_index", "from_timestamp")]
        episodes = []
        for file in files:
            for record in _read_table(file, columns).to_pylist():
                videos = {}
                for camera, name in self._video_cameras.items():
                    chunk, part, start = (
                        record[f"videos/{name}/{what}"]
                        for what in ("chunk_index", "file_index", "from_timestamp")
                    )
                    template = self.info.video_path
                    path = self._format(template, video_key=name, chunk_index=chunk, file_index=part)
                    videos[camera] = (self.root / path, float(start))
                data = self._format(
                    self.info.data_path,
                    chunk_index=record["data/chunk_index"],
                    file_index=record["data/file_index"],
                )
                number = record["episode_index"]
                prompt = _prompt(record["tasks"], f"{file}, episode {number}")
                episodes.append(_Episode(number, prompt, record["length"], self.root / data, videos))
        return episodes

    def _format(self, template: str | None, **fields: Any) -> str:
        assert template is not None  # find_names refuses videos without a template
        try:
            return template.format(**fields)
        except (KeyError, ValueError, IndexError) as error:
            known = ", ".join(fields)
            raise DataError(f"{self.info.path}: {template!r} is not a template of {known}") from error

    # What is in them

    def _rows(self, episode: _Episode, columns: list[str]) -> pa.Table:
        """The episode's rows of these columns, in order of time."""
        if not episode.data.is_file():
            raise MissingFileError(
                f"{episode.data} not found; perhaps the data set was not copied completely"
            )
        with _parquet(episode.data) as file:
            names = file.schema_arrow.names
            missing = [name for name in (*columns, "episode_index") if name not in names]
            if missing:
                raise DataError(f"{episode.data}: no column {', '.join(missing)}; it has {', '.join(names)}")
            groups = _row_groups_with(file, episode.number)
            key = (episode.data, groups, tuple(columns))
            if self._cached is None or self._cached[0] != key:
                self._cached = None  # released first, so that memory holds one table at a time
                self._cached = key, file.read_row_groups(list(groups), [*columns, "episode_index"])
        table = self._cached[1]
        table = table.filter(pc.equal(table["episode_index"], episode.number))
        if len(table) != episode.length:
            raise DataError(
                f"{episode.data}: {len(table)} frames of episode {episode.number}, "
                f"but meta lists {episode.length}"
            )
        return table.combine_chunks()

    def _numbers(self, table: pa.Table, name: str, episode: _Episode) -> np.ndarray:
        """A column of numbers or vectors as float32 [T] or [T, D]."""
        where = f"{episode.data}, episode {episode.number}: column {name}"
        shape = list(self.info.features[name]["shape"]) if name in self.info.features else [1]
        column = table[name]
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            values = pc.list_flatten(column)
        else:
            values = column
        if column.null_count or values.null_count:
            raise DataError(f"{where} has gaps")
        if not (
            pa.types.is_floating(values.type)
            or pa.types.is_integer(values.type)
            or pa.types.is_boolean(values.type)
        ):
            raise DataError(f"{where} is {column.type}, not numbers")
        width = int(np.prod(shape))
        lengths = [] if values is column else pc.unique(pc.list_value_length(column)).to_pylist()
        if (lengths or [1]) != [width]:
            raise DataError(f"{where} has {lengths or 1} values a frame; meta/info.json has {shape}")
        numbers = values.to_numpy().astype(np.float32)
        if not np.isfinite(numbers).all():
            raise DataError(f"{where} has values that are not finite")
        return numbers if shape == [1] and values is column else numbers.reshape(-1, width)

    def _actions(self, table: pa.Table, name: str, episode: _Episode) -> np.ndarray:
        """A column of actions in LIBERO's convention, float32 [T, A]."""
        where = f"{episode.data}, episode {episode.number}: column {name}"
        return self._gripper.convert(self._numbers(table, name, episode), where)

    def _frames(self, table: pa.Table, camera: str, episode: _Episode, steps: np.ndarray) -> np.ndarray:
        """The stored frames of a camera at some steps, uint8 [F, height, width, 3]."""
        name = self.names.cameras[camera]
        if camera in self._video_cameras:
            path, start = episode.videos[camera]
            times = start + self._numbers(table, "timestamp", episode)[steps].astype(np.float64)
            frames = read_video(path, times, self._tolerance_s)
        else:
            where = f"{episode.data}, episode {episode.number}: column {name}"
            kept = table[name].take(pa.array(steps)).to_pylist()
            frames = np.stack([self._decode(image, where) for image in kept])
        size = self.info.image_size(name)
        if frames.shape[1:3] != size:
            raise DataError(
                f"{self.info.path}: features.{name} is {size[0]} x {size[1]} pixels, "
                f"but episode {episode.number} has {frames.shape[1]} x {frames.shape[2]}"
            )
        return frames

    def _last(self, episode: _Episode) -> Observation | None:
        """What was seen after an episode's last action; None where the set does not hold it."""
        path = self.root / LAST_OBSERVATIONS
        if not path.is_file():
            return None
        names = self.names
        columns = ["episode_index", names.state, *names.cameras.values()]
        with _parquet(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}")
            table = file.read_row_groups(list(_row_groups_with(file, episode.number)), columns)
        rows = table.filter(pc.equal(table["episode_index"], episode.number)).to_pylist()
        if not rows:
            return None
        (row,) = rows
        where = f"{path}, episode {episode.number}"
        images = {
            camera: np.ascontiguousarray(
                self._orientation.convert(decode_image(row[feature], f"{where}: column {feature}"))
            )
            for camera, feature in names.cameras.items()
        }
        return Observation(images, np.asarray(row[names.state], np.float32))

    def _decode(self, image: Any, where: str) -> np.ndarray:
        """Decode a value of an image column, {bytes, path}; one of them may be empty (Hugging Face's `Image`)."""
        if isinstance(image, dict) and image.get("bytes"):
            return decode_image(image["bytes"], where)
        if isinstance(image, dict) and image.get("path"):
            return decode_image(self.root / image["path"], where)
        raise DataError(f"{where} holds no image")


def _prompt(tasks: Any, where: str) -> str:
    if not isinstance(tasks, list) or len(tasks) != 1 or not isinstance(tasks[0], str):
        raise DataError(f"{where}: tasks is {tasks!r}; an episode needs exactly one instruction")
    return tasks[0]


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        why = why_unreadable(path, error)
        raise DataError(f"{path}: not a parquet file that can be read: {why}") from error


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    with _parquet(path) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}")
        return file.read(columns)


def _row_groups_with(file: pq.ParquetFile, episode: int) -> tuple[int, ...]:
    """The row groups that may hold rows of an episode, by their statistics if they have any."""
    metadata = file.metadata
    # Nested columns have several leaves, so the leaf of episode_index must be found by its path.
    leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "episode_index")
    groups = []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(leaf).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= episode <= statistics.max:
            groups.append(group)
    return tuple(groups)
