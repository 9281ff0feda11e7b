"""LIBERO's HDF5 demonstrations: paired rightly, turned upright, and broken files are named."""

import dataclasses
import json

import h5py
import numpy as np
import pytest

from pi0.base.errors import MissingFileError
from pi0.data import DataError, open_demonstrations
from pi0.data.libero_hdf5 import LiberoDemonstrations
from pi0.libero.episodes import ROBOT
from tests.support.recordings import CAMERAS, make_demonstration, write_hdf5


@pytest.fixture
def recorded():
    return {f"demo_{number}": make_demonstration(6 + number, number) for number in (0, 2, 10)}


def test_liberos_own_observations_are_paired_with_the_action_that_followed_them(tmp_path, recorded):
    # LIBERO steps and then records: what is at index j was seen after action j.
    write_hdf5(tmp_path / "task_demo.hdf5", recorded, instruction='"open the drawer"')
    found = open_demonstrations(tmp_path / "task_demo.hdf5")
    assert list(found.lengths) == [5, 7, 15]
    for read, source in zip(found, recorded.values(), strict=True):
        assert read.prompt == "open the drawer"
        assert np.array_equal(read.states, source.states[:-1])
        assert np.array_equal(read.actions, source.actions[1:])
        assert np.array_equal(read.rewards, source.rewards[1:])
        assert read.dones.tolist() == [False] * (len(read) - 1) + [True]
        for camera in CAMERAS:
            assert np.array_equal(read.images[camera], source.images[camera][:-1])


def test_replayed_files_are_taken_as_they_are_and_named_by_their_file(tmp_path, recorded):
    write_hdf5(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", recorded, instruction=None)
    found = open_demonstrations(tmp_path)
    assert set(found.prompts) == {"turn on the stove"}
    read = found.read(2)
    assert np.array_equal(read.actions, recorded["demo_10"].actions)
    assert np.array_equal(read.images[CAMERAS[1]], recorded["demo_10"].images[CAMERAS[1]])


def test_the_pairing_can_be_said(tmp_path, recorded):
    write_hdf5(tmp_path / "task_demo.hdf5", recorded, instruction="open")
    read = LiberoDemonstrations(tmp_path / "task_demo.hdf5", observed_after_action=False).read(0)
    assert np.array_equal(read.actions, recorded["demo_0"].actions)
    assert np.array_equal(read.states, recorded["demo_0"].states)


def test_what_1_means_to_the_gripper_can_be_said(tmp_path, recorded):
    theirs = {}
    for name, demonstration in recorded.items():
        actions = demonstration.actions.copy()
        actions[:, -1] = 1 - actions[:, -1].clip(0, 1)
        theirs[name] = dataclasses.replace(demonstration, actions=actions)
    write_hdf5(tmp_path / "task_demo.hdf5", theirs, instruction=None)
    with pytest.raises(DataError, match=r"task_demo.hdf5: gripper actions are 0\S* to 1,"):
        open_demonstrations(tmp_path / "task_demo.hdf5")
    read = open_demonstrations(tmp_path / "task_demo.hdf5", gripper="open-is-1").read(1)
    assert np.array_equal(read.actions[:, :-1], recorded["demo_2"].actions[:, :-1])
    np.testing.assert_allclose(
        read.actions[:, -1], 2 * recorded["demo_2"].actions[:, -1].clip(0, 1) - 1, atol=1e-6
    )


@pytest.mark.parametrize("steps", [[0, 3, 6, 9, 12], [1, 2, 7], [4], []])
def test_only_the_frames_asked_for_are_read(tmp_path, recorded, steps):
    write_hdf5(tmp_path / "task_demo.hdf5", recorded, instruction="open")
    read = open_demonstrations(tmp_path).read(2, steps)
    assert len(read) == 15
    for camera, frames in read.images.items():
        assert np.array_equal(frames, recorded["demo_10"].images[camera][steps])


def replace(demo, key, values):
    del demo[key]
    demo[key] = values


FAULTS = {
    "no data": (lambda file: file.pop("data"), "has no group data"),
    "no actions": (
        lambda file: file["data/demo_0"].pop("actions"),
        "/data/demo_0 has no dataset actions; it has",
    ),
    "no image": (
        lambda file: file["data/demo_0/obs"].pop("agentview_rgb"),
        "obs has no dataset agentview_rgb",
    ),
    "width": (
        lambda file: replace(file["data/demo_0"], "actions", np.zeros((6, 6))),
        r"/data/demo_0/actions has shape \(6, 6\), expected \(6, 7\)",
    ),
    "length": (
        lambda file: replace(file["data/demo_0/obs"], "ee_states", np.zeros((4, 6))),
        r"ee_states has shape \(4, 6\), expected \(6, 6\)",
    ),
    "kind": (
        lambda file: replace(file["data/demo_0/obs"], "agentview_rgb", np.zeros((6, 8, 8, 3), np.float32)),
        "agentview_rgb is float32",
    ),
    "nan": (
        lambda file: replace(file["data/demo_0"], "actions", np.full((6, 7), np.nan)),
        "actions holds values that are not finite",
    ),
    "name": (lambda file: file["data"].move("demo_0", "first"), "data/first is not called demo_NUMBER"),
    "instruction": (lambda file: file["data"].attrs.update(problem_info="{}"), "problem_info"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(tmp_path, recorded, fault):
    path = tmp_path / "task_demo.hdf5"
    write_hdf5(path, recorded, instruction="open")
    spoil, message = FAULTS[fault]
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(DataError, match=message) as caught:
        open_demonstrations(path).read(0)
    assert str(path) in str(caught.value)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is neither an HDF5 file"):
        open_demonstrations(tmp_path / "nowhere")
    (tmp_path / "text.hdf5").write_text("text")
    with pytest.raises(DataError, match="not an HDF5 file that can be read"):
        open_demonstrations(tmp_path)
    with pytest.raises(DataError, match="no LeRobot data set"):
        open_demonstrations(tmp_path, orientation="upright")


@pytest.mark.tried(
    "LIBERO's HDF5 of another robot or rate, or mixed in one folder",
    "An error that names the file and the option",
)
def test_what_the_files_say_of_robot_and_rate_is_compared(tmp_path, recorded):
    file = tmp_path / "task_demo.hdf5"
    write_hdf5(file, recorded, instruction="open")
    assert open_demonstrations(file, robot=ROBOT).description.fps is None
    for given, problem in (
        ({"robots": ["Panda"], "control_freq": 20}, None),
        ({"robots": "Panda"}, None),
        (
            {"robots": ["Sawyer"], "control_freq": 20},
            "the robot is Sawyer, not panda.*--dataset-accept robot",
        ),
        ({"robots": ["Panda"], "control_freq": 10}, "10 frames a second, but the robot acts 20 .*accept fps"),
    ):
        with h5py.File(file, "a") as content:
            content["data"].attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": given})
        if problem is None:
            open_demonstrations(file, robot=ROBOT)
        else:
            with pytest.raises(DataError, match=problem):
                open_demonstrations(file, robot=ROBOT)
    write_hdf5(tmp_path / "zz_demo.hdf5", recorded, instruction="open")
    with h5py.File(tmp_path / "zz_demo.hdf5", "a") as content:
        content["data"].attrs["env_args"] = json.dumps(
            {"env_kwargs": {"robots": ["Panda"], "control_freq": 20}}
        )
    with pytest.raises(DataError, match=r"zz_demo\.hdf5: recorded of .* but other files of the folder"):
        open_demonstrations(tmp_path)
