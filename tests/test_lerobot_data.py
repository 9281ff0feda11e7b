"""LeRobot data sets: both layouts are read, what is written is what LeRobot expects, and broken ones are named."""

import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0.base.errors import InputError, MissingFileError
from pi0.data import (
    LEROBOT_NAMES,
    OPENPI_NAMES,
    DataError,
    FeatureNames,
    Gripper,
    Orientation,
    open_demonstrations,
)
from pi0.data import lerobot_writer as writing
from pi0.data.demonstrations import Description
from pi0.data.description import feature_names, require_fit
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.data.recorded_chunks import demonstrations_of_tasks, leave_out_failures
from pi0.libero.episodes import ROBOT
from tests.support import recordings
from tests.support.recordings import CAMERAS, make_demonstration, write_separate_files, write_shared_files

LENGTHS = (7, 5, 9, 4, 6)
LOSS = 3  # grey levels that a video may differ by


def named(**images) -> FeatureNames:
    """LeRobot's names with other images: image to camera."""
    cameras = {camera: f"observation.images.{image}" for image, camera in images.items()}
    return replace(LEROBOT_NAMES, cameras=cameras)


@pytest.fixture
def demonstrations():
    return [make_demonstration(length, seed) for seed, length in enumerate(LENGTHS)]


def assert_same(read, expected, loss=0):
    assert read.prompt == expected.prompt
    assert np.array_equal(read.states, expected.states)
    assert np.array_equal(read.actions, expected.actions)
    assert read.states.dtype == read.actions.dtype == np.float32
    assert read.images.keys() == expected.images.keys()
    for camera, frames in expected.images.items():
        assert read.images[camera].dtype == np.uint8
        difference = np.abs(read.images[camera].astype(int) - frames[read.image_steps])
        # Where colours meet, a video blurs them; elsewhere it does not.
        assert (difference.max() == 0) if loss == 0 else (np.quantile(difference, 0.8) <= loss)


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
@pytest.mark.parametrize("names", [LEROBOT_NAMES, OPENPI_NAMES], ids=["lerobot", "openpi"])
@pytest.mark.parametrize("write", [write_separate_files, write_shared_files], ids=["v2.1", "v3.0"])
def test_every_frame_and_number_of_both_layouts_is_read(tmp_path, demonstrations, write, names, video):
    write(tmp_path / "set", demonstrations, names=names, video=video)
    found = open_demonstrations(tmp_path / "set")
    assert list(found.prompts) == [d.prompt for d in demonstrations]
    assert list(found.lengths) == list(LENGTHS)
    for read, expected in zip(found, demonstrations, strict=True):
        assert_same(read, expected, LOSS if video else 0)
        assert read.rewards is None and read.dones is None
        assert np.array_equal(read.executed, expected.actions)


def test_openpis_own_version_is_read(tmp_path, demonstrations):
    write_separate_files(tmp_path / "set", demonstrations, names=OPENPI_NAMES, version="v2.0")
    assert_same(open_demonstrations(tmp_path / "set").read(2), demonstrations[2])


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_only_the_frames_asked_for_are_read(tmp_path, demonstrations, video):
    write_shared_files(tmp_path / "set", demonstrations, video=video)
    found = open_demonstrations(tmp_path / "set")
    read = found.read(2, [1, 4, 8])
    assert read.image_steps.tolist() == [1, 4, 8]
    assert read.images[CAMERAS[0]].shape == (3, recordings.SIZE, recordings.SIZE, 3)
    assert_same(read, demonstrations[2], LOSS if video else 0)
    with pytest.raises(IndexError, match="0 to 8"):
        found.read(2, [9])


def test_numbers_are_read_without_touching_images(tmp_path, demonstrations):
    write_shared_files(tmp_path / "set", demonstrations, video=True)
    shutil.rmtree(tmp_path / "set/videos")
    found = open_demonstrations(tmp_path / "set")
    assert np.array_equal(found.read(3, ()).states, demonstrations[3].states)
    with pytest.raises(MissingFileError, match="file-001.mp4 not found"):
        found.read(3)


def test_the_orientation_can_be_said(tmp_path, demonstrations):
    write_shared_files(tmp_path / "set", demonstrations)
    frames = demonstrations[0].images[CAMERAS[0]]
    for orientation, stored in (
        (Orientation.UPRIGHT, frames[:, :, ::-1]),
        (Orientation.FLIPPED, frames[:, ::-1, ::-1]),
    ):
        read = open_demonstrations(tmp_path / "set", orientation=orientation).read(0)
        assert np.array_equal(read.images[CAMERAS[0]], stored)


def test_other_feature_names_can_be_said(tmp_path, demonstrations):
    own = FeatureNames({"base_0_rgb": "top"}, "proprio", "delta")
    write_shared_files(tmp_path / "set", demonstrations, names=own)
    with pytest.raises(DataError, match="Its features are top, proprio, delta"):
        open_demonstrations(tmp_path / "set")
    said = FeatureNames.parse(["base_0_rgb=top", "state=proprio", "actions=delta"])
    read = open_demonstrations(tmp_path / "set", names=said).read(1)
    assert np.array_equal(read.images["base_0_rgb"], demonstrations[1].images["base_0_rgb"])
    with pytest.raises(DataError, match="give state=FEATURE"):
        FeatureNames.parse(["base_0_rgb=top", "state=proprio"])


# The gripper


def gripped(demonstration, *commands):
    """The same with these actions of the gripper, one after another until the end."""
    actions = demonstration.actions.copy()
    actions[:, -1] = np.resize(np.array(commands, np.float32), len(actions))
    return replace(demonstration, actions=actions, executed=actions)


@pytest.mark.tried(
    "A data set in which 1 opens the gripper", "An error until `--dataset-gripper` says what 1 means"
)
def test_a_set_whose_gripper_is_opened_by_1_is_refused_until_that_is_said(tmp_path, demonstrations):
    theirs = [gripped(d, 1, 0, 0) for d in demonstrations]  # as any4lerobot makes it of -1, 1, 1
    write_shared_files(
        tmp_path / "set", theirs, names=named(image="base_0_rgb", wrist_image="left_wrist_0_rgb")
    )
    with pytest.raises(
        DataError, match=r"gripper actions are 0 to 1, .* open-is-1 if .* --dataset-gripper"
    ) as caught:
        open_demonstrations(tmp_path / "set")
    assert str(tmp_path / "set") in str(caught.value)
    found = open_demonstrations(tmp_path / "set", gripper=Gripper.OPEN_IS_1)
    for read, expected in zip(found, demonstrations, strict=True):
        assert_same(read, gripped(expected, -1, 1, 1))
        assert np.array_equal(read.executed, read.actions)


def test_a_gripper_that_is_never_opened_has_to_be_said_to_be_liberos(tmp_path, demonstrations):
    shut = [gripped(d, 1) for d in demonstrations]
    write_separate_files(tmp_path / "set", shut)
    with pytest.raises(DataError, match=r"gripper actions are 1 to 1, .* close-is-1 if it is never opened"):
        open_demonstrations(tmp_path / "set")
    assert_same(open_demonstrations(tmp_path / "set", gripper="close-is-1").read(3), shut[3])
    # A single such demonstration among others tells nothing.
    write_separate_files(tmp_path / "mixed", [*shut[:4], gripped(demonstrations[4], -1, 1)])
    assert_same(open_demonstrations(tmp_path / "mixed").read(0), shut[0])


def test_liberos_gripper_is_not_taken_for_the_other(tmp_path, demonstrations):
    write_separate_files(tmp_path / "set", [gripped(d, -1, 1) for d in demonstrations])
    found = open_demonstrations(tmp_path / "set", gripper="open-is-1")
    with pytest.raises(
        DataError, match=r"episode_000002.parquet, .* actions down to -1; .* Remove open-is-1"
    ):
        found.read(2)


# Writing


def write(root, demonstrations, **options):
    with LeRobotWriter(root, recordings.FPS, **options) as writer:
        for demonstration in demonstrations:
            writer.add(demonstration)


@pytest.mark.parametrize("names", [LEROBOT_NAMES, OPENPI_NAMES], ids=["lerobot", "openpi"])
@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_what_is_written_is_read_back(tmp_path, demonstrations, video, names):
    write(tmp_path / "set", demonstrations, video=video, names=names)
    found = open_demonstrations(tmp_path / "set")
    for read, expected in zip(found, demonstrations, strict=True):
        assert_same(read, expected, LOSS if video else 0)
        assert np.array_equal(read.executed, expected.executed)
        assert np.array_equal(read.rewards, expected.rewards)
        assert np.array_equal(read.dones, expected.dones)


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_full_files_are_followed_by_others(tmp_path, demonstrations, monkeypatch, video):
    monkeypatch.setattr(writing, "DATA_FILE_MB", 0)
    monkeypatch.setattr(writing, "VIDEO_FILE_MB", 0)
    monkeypatch.setattr(writing, "FILES_IN_CHUNK", 2)
    write(tmp_path / "set", demonstrations, video=video)
    files = sorted(
        str(file.relative_to(tmp_path / "set/data")) for file in (tmp_path / "set/data").glob("*/*")
    )
    assert files == [f"chunk-{i // 2:03d}/file-{i % 2:03d}.parquet" for i in range(5)]
    for read, expected in zip(open_demonstrations(tmp_path / "set"), demonstrations, strict=True):
        assert_same(read, expected, LOSS if video else 0)


def test_the_files_are_those_that_lerobot_opens(tmp_path, demonstrations):
    # What LeRobot reads of them: src/lerobot/datasets/{dataset_metadata,dataset_reader,io_utils}.py of v0.6.1.
    write(tmp_path, demonstrations, video=True)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, sum(LENGTHS), 2)
    camera = "observation.images.image"
    assert info["features"][camera]["dtype"] == "video"
    assert info["features"]["action"] == {"dtype": "float32", "shape": [7], "names": None}

    tasks = pq.read_table(tmp_path / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": list(recordings.PROMPTS)}

    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    ends = np.cumsum(LENGTHS)
    assert episodes["dataset_from_index"] == [0, *ends[:-1]]
    assert episodes["dataset_to_index"] == ends.tolist()
    assert episodes[f"videos/{camera}/from_timestamp"] == [
        start / recordings.FPS for start in (0, *ends[:-1])
    ]
    assert episodes["tasks"] == [[d.prompt] for d in demonstrations]

    data = pq.read_table(tmp_path / info["data_path"].format(chunk_index=0, file_index=0))
    stored = {name for name, feature in info["features"].items() if feature["dtype"] != "video"}
    assert set(data.column_names) == stored
    assert data.schema.field("action").type == pa.list_(pa.float32(), 7)
    assert data["index"].to_pylist() == list(range(sum(LENGTHS)))
    assert data["task_index"].to_pylist() == np.repeat([0, 1, 0, 1, 0], LENGTHS).tolist()
    assert np.allclose(data["timestamp"].to_pylist()[7:12], np.arange(5) / recordings.FPS)


def test_statistics_are_those_of_all_frames(tmp_path, demonstrations):
    write(tmp_path, demonstrations)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    actions = np.concatenate([d.actions for d in demonstrations]).astype(float)
    assert np.allclose(stats["action"]["std"], actions.std(0))
    assert np.allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    assert stats["next.done"]["max"] == [True]
    pixels = np.concatenate([d.images["base_0_rgb"] for d in demonstrations]).reshape(-1, 3) / 255
    image = {name: np.array(values) for name, values in stats["observation.images.image"].items()}
    assert image["mean"].shape == (3, 1, 1)
    for name, value in (("mean", pixels.mean(0)), ("std", pixels.std(0)), ("max", pixels.max(0))):
        assert np.allclose(image[name].ravel(), value)
    assert np.allclose(image["q50"].ravel(), np.quantile(pixels, 0.5, axis=0, method="inverted_cdf"))
    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert np.allclose(episodes[1]["stats/action/mean"], demonstrations[1].actions.mean(0))


def test_a_set_is_there_whole_or_not_at_all(tmp_path, demonstrations):
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(tmp_path / "set", recordings.FPS) as writer:
        writer.add(demonstrations[0])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no demonstration to write"):
        LeRobotWriter(tmp_path / "set", recordings.FPS).close()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path, demonstrations):
    write(tmp_path / "set", demonstrations)
    with pytest.raises(DataError, match="name a new folder"):
        LeRobotWriter(tmp_path / "set", recordings.FPS)


def test_episodes_that_do_not_fit_are_refused(tmp_path, demonstrations):
    with LeRobotWriter(tmp_path / "set", recordings.FPS) as writer:
        writer.add(demonstrations[0])
        with pytest.raises(DataError, match="at 3 of 5 steps"):
            writer.add(demonstrations[1].thinned(2))
        shorter = make_demonstration(4, 1, prompt="never shown")
        object.__setattr__(shorter, "states", shorter.states[:, :6])
        with pytest.raises(DataError, match=r"differs from earlier ones in observation\.state"):
            writer.add(shorter)
    assert len(open_demonstrations(tmp_path / "set")) == 1
    assert pq.read_table(tmp_path / "set/meta/tasks.parquet")["task"].to_pylist() == [
        demonstrations[0].prompt
    ]
    odd = demonstrations[0]
    odd = replace(odd, images={camera: frames[:, 1:] for camera, frames in odd.images.items()})
    with pytest.raises(DataError, match="frames of 31 x 32 cannot be a video"):
        write(tmp_path / "film", [odd], video=True)


def test_a_set_can_be_sent_to_another_process(tmp_path, demonstrations):
    write(tmp_path / "set", demonstrations)
    found = open_demonstrations(tmp_path / "set")
    found.read(0)
    assert_same(pickle.loads(pickle.dumps(found)).read(1), demonstrations[1])


# What may be wrong


def change_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_feature(root, name, **changes):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][name] |= changes
    path.write_text(json.dumps(info))


def change_rows(root, change):
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def with_actions(values):
    def change(table):
        column = table.column_names.index("action")
        return table.set_column(column, "action", pa.array(values(len(table)), pa.list_(pa.float32())))

    return change


FIRST_FILE = "data/chunk-000/file-000.parquet"
FAULTS = {
    "no info": (lambda root: (root / "meta/info.json").unlink(), MissingFileError, "info.json not found"),
    "no json": (
        lambda root: (root / "meta/info.json").write_text("{"),
        DataError,
        "info.json: not valid JSON",
    ),
    "version": (
        lambda root: change_info(root, codebase_version="v1.6"),
        DataError,
        "codebase_version is 'v1.6'; v2.0",
    ),
    "type": (lambda root: change_info(root, fps="ten"), DataError, "fps is 'ten'"),
    "count": (lambda root: change_info(root, total_episodes=9), DataError, "total_episodes is 9, but 5"),
    "template": (
        lambda root: change_info(root, data_path="data/{episode_chunk}"),
        DataError,
        "not a template of chunk_index",
    ),
    "kind": (
        lambda root: change_feature(root, "observation.images.image", dtype="float32"),
        DataError,
        "not an image or video",
    ),
    "vector": (
        lambda root: change_feature(root, "action", shape=[1, 7]),
        DataError,
        r"features.action is float32 \[1, 7\]",
    ),
    "size": (
        lambda root: change_feature(root, "observation.images.image", shape=[64, 64, 3]),
        DataError,
        "64 x 64 pixels, but episode 0 has 32 x 32",
    ),
    "no episodes": (lambda root: shutil.rmtree(root / "meta/episodes"), MissingFileError, "meta/episodes"),
    "no data": (lambda root: (root / FIRST_FILE).unlink(), MissingFileError, "file-000.parquet not found"),
    "no parquet": (lambda root: (root / FIRST_FILE).write_text("text"), DataError, "not a parquet file"),
    "rows": (
        lambda root: change_rows(root, lambda t: t.slice(2)),
        DataError,
        "5 frames of episode 0, but meta lists 7",
    ),
    "column": (
        lambda root: change_rows(root, lambda t: t.drop(["action"])),
        DataError,
        "no column action; it has",
    ),
    "width": (
        lambda root: change_rows(root, with_actions(lambda n: [[0.0] * 6] * n)),
        DataError,
        r"has \[6\] values a frame; meta/info.json has \[7\]",
    ),
    "gap": (
        lambda root: change_rows(root, with_actions(lambda n: [None] * n)),
        DataError,
        "column action has gaps",
    ),
    "nan": (
        lambda root: change_rows(root, with_actions(lambda n: [[np.nan] * 7] * n)),
        DataError,
        "column action has values that are not finite",
    ),
    "image": (
        lambda root: change_rows(
            root,
            lambda t: t.set_column(
                t.column_names.index("observation.images.image"),
                "observation.images.image",
                pa.array([{"bytes": b"no image", "path": None}] * len(t)),
            ),
        ),
        DataError,
        "observation.images.image: not an image",
    ),
}


def with_info(root, **changes):
    """Change meta/info.json; `features` are merged into those that are there."""
    info = json.loads((root / "meta/info.json").read_text())
    for name, feature in changes.pop("features", {}).items():
        info["features"][name] |= feature
    (root / "meta/info.json").write_text(json.dumps(info | changes))
    return root


@pytest.mark.parametrize(
    ("images", "cameras"),
    [
        (["wrist", "front"], {"left_wrist_0_rgb": "wrist", "base_0_rgb": "front"}),
        (["gripperCam", "agentview_rgb"], {"left_wrist_0_rgb": "gripperCam", "base_0_rgb": "agentview_rgb"}),
        (["top", "hand_view", "phone"], {"left_wrist_0_rgb": "hand_view", "base_0_rgb": "top"}),
    ],
)
@pytest.mark.tried("A data set with cameras `wrist, front`", "The words of the names decide; a line says so")
def test_the_words_of_images_decide_their_cameras(tmp_path, demonstrations, capsys, images, cameras):
    features = {f"camera {number}": f"observation.images.{image}" for number, image in enumerate(images)}
    written = [
        replace(demonstration, images=dict.fromkeys(features, demonstration.images[CAMERAS[0]]))
        for demonstration in demonstrations
    ]
    with LeRobotWriter(tmp_path / "set", recordings.FPS, replace(LEROBOT_NAMES, cameras=features)) as writer:
        writer.add(written[0])
    found = open_demonstrations(tmp_path / "set")
    assert found.names.cameras == {camera: f"observation.images.{image}" for camera, image in cameras.items()}
    assert f"{images[0]} is " in capsys.readouterr().out


@pytest.mark.parametrize("images", [("phone", "laptop"), ("wrist", "phone"), ("wrist_left", "gripper")])
def test_images_whose_names_do_not_tell_have_to_be_named(tmp_path, demonstrations, images):
    features = dict(zip(CAMERAS, (f"observation.images.{image}" for image in images), strict=True))
    names = replace(LEROBOT_NAMES, cameras=features)
    with LeRobotWriter(tmp_path / "set", recordings.FPS, names) as writer:
        writer.add(demonstrations[0])
    with pytest.raises(DataError, match=r"--dataset-features, algo\.cotraining_features or data\.features"):
        open_demonstrations(tmp_path / "set")
    assert_same(open_demonstrations(tmp_path / "set", names=names).read(0), demonstrations[0])


JOINTS = [*(f"joint_{number}" for number in range(7)), "gripper"]
POSE = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"]
CONTRADICTIONS = {
    "fps": ({"fps": 30}, r"30 frames a second, but the robot acts 20"),
    "robot": ({"robot_type": "so101_follower"}, r"the robot is so101_follower, not panda"),
    "names": (
        {"features": {"observation.state": {"names": {"motors": JOINTS}}}},
        r"the features of state are joint_0, .*the robot's are position x, y, z",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
@pytest.mark.tried(
    "A data set of another frame rate, another robot, or with joints as features",
    "An error with the option that accepts it",
)
def test_what_a_set_says_of_itself_is_compared_with_the_robot(tmp_path, demonstrations, kind):
    change, message = CONTRADICTIONS[kind]
    write_shared_files(tmp_path / "set", demonstrations)
    open_demonstrations(tmp_path / "set", robot=ROBOT)
    with_info(tmp_path / "set", **change)
    with pytest.raises(
        DataError, match=f"set: {message}.*--dataset-accept {kind}, algo.cotraining_accept=.{kind}."
    ):
        open_demonstrations(tmp_path / "set", robot=ROBOT)
    assert len(open_demonstrations(tmp_path / "set", robot=ROBOT, accept=[kind])) == len(LENGTHS)
    assert len(open_demonstrations(tmp_path / "set")) == len(LENGTHS), "without a robot nothing is compared"


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        (None, True),
        (["actions"], True),
        ({"motors": POSE[:7]}, True),
        (["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"], True),
        (["gripper", *POSE[:6]], False),
        (["y", "x", *POSE[2:7]], False),
        (["shoulder_pan", "elbow", *POSE[2:7]], False),
    ],
)
def test_names_of_features_are_those_of_a_pose(names, fits):
    description = Description(actions=feature_names(names))
    if fits:
        require_fit(description, ROBOT, "set")
    else:
        with pytest.raises(DataError, match="set: the features of actions are"):
            require_fit(description, ROBOT, "set")


@pytest.mark.tried(
    "Recorded episodes whose rewards are all 0",
    "They are left out, with their number; `failures` learns them",
)
def test_failures_are_left_out_unless_they_are_asked_for(tmp_path, demonstrations, capsys):
    task = SimpleNamespace(name="task", prompt=demonstrations[0].prompt)
    mine = [d for d in demonstrations if d.prompt == task.prompt]
    assert len(mine) == 3
    mine[0] = replace(mine[0], rewards=np.zeros(len(mine[0]), np.float32))
    with LeRobotWriter(tmp_path / "set", recordings.FPS) as writer:
        for demonstration in mine:
            writer.add(demonstration)
    found = open_demonstrations(tmp_path / "set", robot=ROBOT)
    assert demonstrations_of_tasks(found, [task], 9) == {"task": [1, 2]}
    assert "1 of 3 demonstrations of task failed, by their rewards or successes" in capsys.readouterr().out
    assert demonstrations_of_tasks(found, [task], 1) == {"task": [1]}
    assert demonstrations_of_tasks(found, [task], 9, failures=True) == {"task": [0, 1, 2]}
    with pytest.raises(DataError, match=r"all 1 demonstrations failed: .*--dataset-accept failures"):
        leave_out_failures(found, [0])


def test_a_success_says_more_than_a_reward(demonstrations):
    steps = len(demonstrations[0])
    never, at_last = np.zeros(steps, bool), np.arange(steps) == steps - 1
    dense = np.full(steps, 0.1, np.float32)
    assert not replace(demonstrations[0], rewards=dense).failed
    assert replace(demonstrations[0], rewards=dense, successes=never).failed
    assert not replace(demonstrations[0], rewards=-dense, successes=at_last).failed
    assert not replace(demonstrations[0], rewards=None).failed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(tmp_path, demonstrations, fault):
    root = tmp_path / "set"
    write_shared_files(root, demonstrations)
    spoil, kind, message = FAULTS[fault]
    open_demonstrations(root).read(0)
    spoil(root)
    with pytest.raises(kind, match=message) as caught:
        open_demonstrations(root).read(0)
    assert isinstance(caught.value, InputError)
    assert str(root) in str(caught.value)


def test_faults_of_videos_are_named(tmp_path, demonstrations):
    write_separate_files(tmp_path / "set", demonstrations, video=True)
    film = tmp_path / "set/videos/chunk-000/observation.images.image/episode_000000.mp4"
    short = tmp_path / "set/videos/chunk-000/observation.images.image/episode_000001.mp4"
    shutil.copy(short, film)  # five frames where there should be seven
    with pytest.raises(DataError, match=r"episode_000000.mp4: no frame within 0.0001 s of 0.2500 s"):
        open_demonstrations(tmp_path / "set").read(0)
    film.write_bytes(b"no video")
    with pytest.raises(DataError, match="not a video"):
        open_demonstrations(tmp_path / "set").read(0)


@pytest.mark.tried("A trailing blank line in episodes.jsonl", "Nothing; it is read")
def test_blank_lines_in_the_list_of_episodes_are_no_fault(tmp_path, demonstrations):
    write_separate_files(tmp_path / "set", demonstrations)
    path = tmp_path / "set/meta/episodes.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n", 1) + "\n  \n")
    assert len(open_demonstrations(tmp_path / "set")) == len(demonstrations)


@pytest.mark.parametrize(
    ("first", "said"), [(1, r"listed twice \[1\], missing \[0\]"), (9, r"listed twice none, missing \[0\]")]
)
@pytest.mark.tried("An episode listed twice while another is missing", "An error that names both")
def test_an_episode_listed_twice_or_missing_is_named(tmp_path, demonstrations, first, said):
    write_separate_files(tmp_path / "set", demonstrations)
    path = tmp_path / "set/meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["episode_index"] = first
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        DataError, match=f"set/meta: the episodes listed are not 0 to {len(lines) - 1}: {said}"
    ):
        open_demonstrations(tmp_path / "set")


def test_an_episode_with_several_instructions_is_refused(tmp_path, demonstrations):
    write_separate_files(tmp_path / "set", demonstrations)
    path = tmp_path / "set/meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"open the top drawer"', '"open", "close"', 1))
    with pytest.raises(DataError, match="line 2: tasks is .* exactly one instruction"):
        open_demonstrations(tmp_path / "set")
