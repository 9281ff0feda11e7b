"""Files and features of a LeRobot data set.

Source: huggingface/lerobot, src/lerobot/datasets/utils.py of v0.3.3 (layout v2.1) and of v0.6.1 (layout v3.0). v2.0
and v2.1 differ only in the place of their statistics, which are not read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.base.errors import MissingFileError
from pi0.base.files import read_json
from pi0.data.demonstrations import DataError
from pi0.policy.cameras import BASE, LEFT_WRIST, CameraNameError, How, choose_cameras, is_told

EPISODE_FILES = ("v2.0", "v2.1")  # each episode has one parquet file and one video a camera
SHARED_FILES = "v3.0"  # a file holds many episodes, found through meta/episodes

INFO = "meta/info.json"
STATS = "meta/stats.json"
EPISODES_JSONL = "meta/episodes.jsonl"  # v2
TASKS_PARQUET = "meta/tasks.parquet"
# This project's own: what was seen after the last action. A row for it among the others would need a false action.
LAST_OBSERVATIONS = "meta/last_observations.parquet"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PARQUET = f"meta/episodes/{CHUNK_FILE}.parquet"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
FILES_IN_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200

# Columns that every data set has beside its own features.
INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclass(frozen=True)
class FeatureNames:
    """Names of a data set's features. The last five are optional.

    Attributes:
        cameras: policy camera name to feature.
        state, actions: features for `Demonstration.states` and `actions`.
        executed, reward, done, success, truncated: features for `Demonstration.executed`, `rewards`, `dones`,
            `successes` and `truncated`. LeRobot's done holds for both ends (src/lerobot/utils/constants.py of v0.6.1
            has the names).
    """

    cameras: Mapping[str, str]
    state: str
    actions: str
    executed: str = "executed_action"
    reward: str = "next.reward"
    done: str = "next.done"
    success: str = "next.success"
    truncated: str = "next.truncated"

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> FeatureNames:
        """Names from a command line, NAME=FEATURE each: NAME is a policy camera or a field of this class.

        Raises:
            DataError: a pair has another form, or state, actions or all cameras are missing.
        """
        fields = ("state", "actions", "executed", "reward", "done", "success", "truncated")
        given = dict(pair.partition("=")[::2] for pair in pairs)
        cameras = {name: feature for name, feature in given.items() if name not in fields}
        if not all(given.values()) or not cameras or not {"state", "actions"} <= given.keys():
            raise DataError(
                f"features {' '.join(pairs)}: "
                "give state=FEATURE, actions=FEATURE and CAMERA=FEATURE for each camera"
            )
        return cls(cameras, **{name: feature for name, feature in given.items() if name in fields})

    def required(self) -> list[str]:
        """The names that a data set must have."""
        return [*self.cameras.values(), self.state, self.actions]


# huggingface/lerobot, src/lerobot/envs/configs.py (`LiberoEnv.features_map`) and utils/constants.py.
LEROBOT_NAMES = FeatureNames(
    {"base_0_rgb": "observation.images.image", "left_wrist_0_rgb": "observation.images.image2"},
    "observation.state",
    "action",
)
# Physical-Intelligence/openpi, examples/libero/convert_libero_data_to_lerobot.py.
OPENPI_NAMES = FeatureNames(
    {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}, "state", "actions", "executed_actions"
)
# Pairs of features that hold state and actions, and the executed actions beside them.
_VECTORS = tuple((names.state, names.actions, names.executed) for names in (LEROBOT_NAMES, OPENPI_NAMES))


@dataclass(frozen=True)
class DatasetInfo:
    """The checked content of meta/info.json.

    Attributes:
        path: path of info.json.
        version: codebase_version.
        fps: frames a second.
        robot_type: the robot; None: not recorded.
        features: name to {dtype, shape, ...}.
        episodes: number of episodes.
        chunk_size: episodes in a folder, for v2.
        data_path, video_path: templates of file names; the second is None without videos.
    """

    path: Path
    version: str
    fps: float
    robot_type: str | None
    features: dict[str, dict[str, Any]]
    episodes: int
    chunk_size: int
    data_path: str
    video_path: str | None

    @classmethod
    def read(cls, root: Path) -> DatasetInfo:
        """Read meta/info.json below `root`.

        Raises:
            MissingFileError: no such folder or file.
            DataError: not JSON, an unknown layout, or a key is missing or has the wrong type.
        """
        path = root / INFO
        if not path.is_file():
            raise MissingFileError(f"{path} not found: {root} is no LeRobot data set")
        content = read_json(path, DataError)
        version = content.get("codebase_version") if isinstance(content, dict) else None
        if version not in (*EPISODE_FILES, SHARED_FILES):
            raise DataError(
                f"{path}: codebase_version is {version!r}; "
                f"{', '.join(EPISODE_FILES)} and {SHARED_FILES} can be read. LeRobot's own scripts convert older sets"
            )
        features = _value(content, "features", dict, path)
        for name, feature in features.items():
            if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
                raise DataError(f"{path}: features.{name} needs dtype and shape")
        return cls(
            path=path,
            version=version,
            fps=_value(content, "fps", (int, float), path),
            robot_type=_value({"robot_type": None} | content, "robot_type", (str, type(None)), path),
            features=features,
            episodes=_value(content, "total_episodes", int, path),
            chunk_size=_value(content, "chunks_size", int, path),
            data_path=_value(content, "data_path", str, path),
            video_path=_value(content, "video_path", (str, type(None)), path),
        )

    def find_names(self, names: FeatureNames | None) -> FeatureNames:
        """The given names, or those that the features' own names tell.

        State and actions are called as LeRobot or openpi call them, cameras as `pi0.policy.cameras` knows them. Images
        beside a base and a wrist camera are left out if no word tells what they show.

        Raises:
            DataError: a feature is missing or of another kind, or names do not tell; the message lists the features.
        """
        names = names or self._named()
        missing = [name for name in names.required() if name not in self.features]
        if missing:
            raise DataError(f"{self.path}: has no feature {', '.join(missing)}. {self._there()}")
        for name in names.cameras.values():
            dtype, shape = self.features[name]["dtype"], self.features[name]["shape"]
            if dtype not in ("image", "video") or len(shape) != 3 or 3 not in (shape[0], shape[-1]):
                raise DataError(
                    f"{self.path}: features.{name} is {dtype} {shape}, not an image or video of 3 colours"
                )
            if dtype == "video" and self.video_path is None:
                raise DataError(f"{self.path}: features.{name} is a video, but there is no video_path")
        for name in (names.state, names.actions):
            dtype, shape = self.features[name]["dtype"], self.features[name]["shape"]
            if dtype not in ("float32", "float64") or len(shape) != 1:
                raise DataError(f"{self.path}: features.{name} is {dtype} {shape}, not a vector of floats")
        return names

    def _named(self) -> FeatureNames:
        vectors = [found for found in _VECTORS if self.features.keys() >= set(found[:2])]
        images = {
            name.rsplit(".", 1)[-1]: name
            for name, feature in self.features.items()
            if feature["dtype"] in ("image", "video") or name.startswith("observation.image")
        }
        mend = "--dataset-features, algo.cotraining_features or data.features (pi0.acrlpd), each with state=, actions= and CAMERA=FEATURE"
        if not vectors or not images:
            known = " nor ".join(f"{state} and {actions}" for state, actions, _ in _VECTORS)
            what = f"neither {known}" if not vectors else "no image"
            raise DataError(f"{self.path}: has {what}. {self._there()}: {mend}")
        told = [image for image in images if is_told(image)]
        try:
            choices = choose_cameras(told, str(self.path), mend)
        except CameraNameError as error:
            raise DataError(str(error)) from error
        for choice in choices:
            if choice.how is How.WORDS:
                print(f"{self.path}: {choice}")
        cameras = {choice.camera: images[choice.image] for choice in choices}
        left = [images[image] for image in images if image not in told]
        if left and not cameras.keys() >= {BASE, LEFT_WRIST}:
            raise DataError(
                f"{self.path}: the name of {', '.join(left)} does not tell which camera it is. {self._there()}: {mend}"
            )
        return FeatureNames(cameras, *vectors[0])

    def _there(self) -> str:
        own = ", ".join(name for name in self.features if name not in INDEX_FEATURES)
        return f"Its features are {own}; name those to use"

    def image_size(self, name: str) -> tuple[int, int]:
        """Height and width of an image feature in pixels; the colours come first or last."""
        shape = tuple(self.features[name]["shape"])
        return shape[:2] if shape[-1] == 3 else shape[1:]


def _value(content: dict, key: str, kinds: Any, path: Path) -> Any:
    if key not in content:
        raise DataError(f"{path}: missing {key}")
    if not isinstance(content[key], kinds) or isinstance(content[key], bool):
        raise DataError(f"{path}: {key} is {content[key]!r}, which is of the wrong type")
    return content[key]
