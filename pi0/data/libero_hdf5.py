"""Demonstrations from LIBERO's HDF5 files, one file a task.

Sources: Lifelong-Robot-Learning/LIBERO (scripts/create_dataset.py, scripts/get_dataset_info.py,
libero/libero/benchmark/__init__.py), and openvla/openvla (experiments/robot/libero/regenerate_libero_dataset.py),
whose replayed files have the same layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pi0.base.errors import MissingFileError
from pi0.base.files import why_unreadable
from pi0.data.demonstrations import (
    DataError,
    Demonstration,
    DemonstrationSet,
    Description,
    Gripper,
    Orientation,
)
from pi0.data.instructions import instruction_in

# Policy camera names and LIBERO's names of their images.
CAMERAS = {"base_0_rgb": "agentview_rgb", "left_wrist_0_rgb": "eye_in_hand_rgb"}
SUFFIXES = (".hdf5", ".h5")


class LiberoDemonstrations(DemonstrationSet):
    """The demonstrations of one of LIBERO's HDF5 files, or of all in a folder, ordered by file and number.

    `data/demo_i` holds `actions` [T, 7], `rewards` and `dones` [T] and, below `obs`, `agentview_rgb` and
    `eye_in_hand_rgb` [T, h, w, 3] upside down, `ee_states` [T, 6] (position, axis-angle) and `gripper_states`
    [T, 2].

    In LIBERO's own files the observation at index j was made after action j (scripts/create_dataset.py steps,
    then records). Here it is paired with action j + 1, and the first action and last observation are left out.
    Replayed files record before they step, so equal indices are paired. Only LIBERO's own files have the attribute
    `problem_info`.

    Args:
        path: a file, or a folder with files.
        cameras: policy camera name to a key of `obs`.
        observed_after_action: whether an observation was made after the action of its index; None: the file's
            attributes decide. LIBERO's own training pairs equal indices, which is False.
        gripper: what 1 means for the gripper, a `Gripper`.

    Raises:
        MissingFileError: no such file, or a folder without any.
        DataError: not HDF5, or another layout; the message names the file and the key.
    """

    def __init__(
        self,
        path: str | Path,
        cameras: Mapping[str, str] = CAMERAS,
        observed_after_action: bool | None = None,
        gripper: str = Gripper.CLOSE_IS_1,
    ):
        path = Path(path)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        else:
            files = [path] if path.is_file() else []
        if not files:
            raise MissingFileError(
                f"{path} is neither an HDF5 file, nor a folder with any, "
                "nor a LeRobot data set with its meta/info.json"
            )
        self._keys = dict(cameras)
        self._gripper = Gripper(gripper)
        self.cameras = tuple(cameras)
        self._places: list[tuple[Path, str, bool]] = []  # file, group, observed after the action
        self.prompts, self.lengths = [], []
        self.description = Description()
        for file in files:
            with _open(file) as content:
                data = _child(content, "data", h5py.Group, file)
                prompt = _instruction(data, file)
                self._describe(data, file)
                late = (
                    "problem_info" in data.attrs if observed_after_action is None else observed_after_action
                )
                for name in sorted(data, key=_demo_number(file)):
                    actions = _child(data[name], "actions", h5py.Dataset, file)
                    self._places.append((file, name, late))
                    self.prompts.append(prompt)
                    self.lengths.append(len(actions) - late)
        if not self._places:
            raise DataError(f"{path}: no demonstration in it")

    def _describe(self, data: h5py.Group, file: Path) -> None:
        """Take in what robosuite recorded of the environment of a file; all files must say the same.

        Source: robosuite 1.4, scripts/collect_human_demonstrations.py, and LIBERO's scripts/create_dataset.py.
        """
        try:
            given = json.loads(data.attrs["env_args"])["env_kwargs"]
            robots = given.get("robots")
            robot = robots[0] if isinstance(robots, list) else robots
            fps = float(given["control_freq"]) if "control_freq" in given else None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return  # replayed files do not hold it
        found = Description(fps, None if robot is None else str(robot))
        if self.description != Description() and self.description != found:
            raise DataError(
                f"{file}: recorded of {found}, but other files of the folder are of {self.description}"
            )
        self.description = found

    def read(self, index: int, image_steps: Sequence[int] | None = None) -> Demonstration:
        """One demonstration: see `DemonstrationSet.read`."""
        file, name, late = self._places[index]
        steps = self._image_steps(index, image_steps)
        with _open(file) as content:
            demo = content["data"][name]
            obs = _child(demo, "obs", h5py.Group, file)
            recorded = self.lengths[index] + late
            seen, done = slice(0, recorded - late), slice(int(late), recorded)
            states = [
                _array(obs, key, (recorded, width), file)[seen]
                for key, width in (("ee_states", 6), ("gripper_states", 2))
            ]
            actions = _array(demo, "actions", (recorded, 7), file)[done].astype(np.float32)
            actions = self._gripper.convert(actions, f"{file}: {demo.name}/actions")
            images = {}
            for camera, key in self._keys.items() if len(steps) else ():
                frames = _child(obs, key, h5py.Dataset, file)
                if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[::3] != (recorded, 3):
                    raise DataError(
                        f"{file}: {frames.name} is {frames.dtype} {frames.shape}, "
                        f"not uint8 ({recorded}, height, width, 3)"
                    )
                images[camera] = np.ascontiguousarray(Orientation.FLIPPED.convert(frames[_selection(steps)]))
            rewards, dones = (
                _array(demo, key, (recorded,), file)[done] if key in demo else None
                for key in ("rewards", "dones")
            )
        return Demonstration(
            prompt=self.prompts[index],
            states=np.concatenate(states, axis=1).astype(np.float32),
            actions=actions,
            image_steps=steps,
            images=images,
            executed=actions,
            rewards=None if rewards is None else rewards.astype(np.float32),
            dones=None if dones is None else dones.astype(bool),
        )


def read_starts(file: Path, state_dim: int) -> list[tuple[np.ndarray, str]]:
    """First state of each demonstration in a file: simulation state, float64 [state_dim], and scene as MJCF.

    Raises:
        DataError: not HDF5, another layout, or states of another size.
    """
    with _open(file) as content:
        data = _child(content, "data", h5py.Group, file)
        starts = []
        for name in sorted(data, key=_demo_number(file)):
            states = _child(data[name], "states", h5py.Dataset, file)
            if states.ndim != 2 or not len(states) or states.shape[1] != state_dim:
                raise DataError(f"{file}: {states.name} has shape {states.shape}, not (steps, {state_dim})")
            scene = data[name].attrs.get("model_file")
            if not isinstance(scene, str):
                raise DataError(f"{file}: data/{name} has no attribute model_file, the scene")
            starts.append((states[0].astype(np.float64), scene))
    return starts


def _open(file: Path) -> h5py.File:
    try:
        return h5py.File(file, "r")
    except OSError as error:
        why = why_unreadable(file, error)
        raise DataError(f"{file}: not an HDF5 file that can be read: {why}") from error


def _child(group: Any, key: str, kind: type, file: Path) -> Any:
    if not isinstance(group, h5py.Group):
        raise DataError(f"{file}: {group.name} is not a group")
    child = group.get(key)
    if not isinstance(child, kind):
        raise DataError(
            f"{file}: {group.name} has no {kind.__name__.lower()} {key}; "
            f"it has {', '.join(group) or 'nothing'}"
        )
    return child


def _array(group: h5py.Group, key: str, shape: tuple[int, ...], file: Path) -> np.ndarray:
    dataset = _child(group, key, h5py.Dataset, file)
    if dataset.shape != shape:
        raise DataError(f"{file}: {dataset.name} has shape {dataset.shape}, expected {shape}")
    values = dataset[()]
    if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
        raise DataError(f"{file}: {dataset.name} holds values that are not finite numbers")
    return values


def _selection(steps: np.ndarray) -> slice | np.ndarray:
    """Regular steps as a slice, which HDF5 reads many times faster than a list of indices."""
    strides = np.unique(np.diff(steps))
    if len(strides) > 1:
        return steps
    return slice(int(steps[0]), int(steps[-1]) + 1, int(strides[0]) if len(strides) else 1)


def _demo_number(file: Path) -> Any:
    def number(name: str) -> int:
        head, _, tail = name.rpartition("_")
        if head != "demo" or not tail.isdigit():
            raise DataError(f"{file}: data/{name} is not called demo_NUMBER")
        return int(tail)

    return number


def _instruction(data: h5py.Group, file: Path) -> str:
    """The instruction: LIBERO's attribute, or the file's name, which is the task's name and `_demo`."""
    if "problem_info" not in data.attrs:
        return instruction_in(file.stem.removesuffix("_demo"))
    try:
        instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
        return "".join(instruction).strip('"')
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: attribute problem_info of data is not JSON with a language_instruction"
        ) from error
