"""Demonstrations in files become the chunks that recording makes, all at once or as a stream."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from pi0 import PI0Policy, warmstart
from pi0.base.errors import CheckpointError
from pi0.data import DataError, open_demonstrations
from pi0.data.chunks import Chunks
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.data.recorded_chunks import demonstrations_of_tasks, load_chunks, stream_chunks
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import Environments
from pi0.libero.episodes import ROBOT
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import CONTROL_HZ
from pi0.libero.suites import find_tasks
from pi0.model.config import Pi0Config
from pi0.norm_stats import main as compute_norm_stats
from pi0.norm_stats import norm_stats
from pi0.policy.images import to_network_images
from pi0.policy.normalization import NormStats, load_norm_stats
from tests.support.recordings import CAMERAS, FPS, SIZE, make_demonstration

TASKS = find_tasks("libero_spatial", [3, 8])
LENGTHS = (7, 5, 9, 4)


def write_set(root, demonstrations):
    with LeRobotWriter(root, FPS) as writer:
        for demonstration in demonstrations:
            writer.add(demonstration)
    return open_demonstrations(root)


@pytest.fixture
def stored(tmp_path):
    return write_set(
        tmp_path / "set",
        [make_demonstration(length, seed, TASKS[seed % 2].prompt) for seed, length in enumerate(LENGTHS)],
    )


def assert_equal(chunks, others):
    assert chunks.prompts == others.prompts
    for name, frames in chunks.images.items():
        assert torch.equal(frames, others.images[name])
    for name in ("states", "actions", "valid"):
        assert torch.equal(getattr(chunks, name), getattr(others, name)), name


@pytest.mark.parametrize(("tasks", "indices"), [([], [0, 1, 2, 3]), (["--tasks", "8"], [1, 3])])
def test_statistics_of_a_data_set_are_those_of_its_chunks(stored, tmp_path, capsys, tasks, indices):
    path = tmp_path / "norm_stats.json"
    compute_norm_stats(
        [
            "--dataset",
            str(tmp_path / "set"),
            "--output",
            str(path),
            "--horizon",
            "3",
            "--frame-every",
            "2",
            *tasks,
        ]
    )
    chunks = load_chunks(stored, indices, robot=ROBOT, chunk=3, frame_every=2, image_size=SIZE)
    assert f"from {len(chunks)} observations in {len(indices)} demonstrations" in capsys.readouterr().out
    assert load_norm_stats(path, 8, 7).to_dict() == norm_stats(chunks).to_dict()


def test_a_chunk_is_what_followed_its_observation():
    demonstration = make_demonstration(5, 0)
    chunks = Chunks.of_demonstration(demonstration.thinned(2), chunk=3)
    assert len(chunks) == 3
    assert torch.equal(chunks.actions[1], torch.from_numpy(demonstration.actions[2:5]))
    assert torch.equal(chunks.states, torch.from_numpy(demonstration.states[[0, 2, 4]]))
    assert chunks.valid.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert not chunks.actions[2, 1:].any()
    assert np.array_equal(chunks.images[CAMERAS[0]][1], demonstration.images[CAMERAS[0]][2])


@pytest.mark.engine
def test_recorded_demonstrations_are_the_same_with_a_data_set_and_from_it(tmp_path):
    task = TaskConfig(task_names_to_use=[3], num_parallel_envs=2, assets="standins")
    with Environments(task, Pi0Config.preset("pi0_tiny", cameras=CAMERAS)) as environments:
        how = {"per_task": 2, "seed": 0, "noise": 0.1, "frame_every": 3}
        plain, summary = record_demonstrations(environments, **how)
        with LeRobotWriter(tmp_path / "set", CONTROL_HZ) as writer:
            kept, same_summary = record_demonstrations(environments, **how, writer=writer)
    assert_equal(plain, kept)
    assert summary == same_summary
    stored = open_demonstrations(tmp_path / "set")
    found = demonstrations_of_tasks(stored, TASKS[:1], per_task=75)
    (indices,) = found.values()
    read = load_chunks(stored, indices, robot=ROBOT, chunk=10, frame_every=3, image_size=64)
    assert_equal(plain, read)
    demonstration = stored.read(0, ())
    # What was done is the expert's action with noise on its translation.
    assert not np.array_equal(demonstration.executed[:, :3], demonstration.actions[:, :3])
    assert np.array_equal(demonstration.executed[:, 3:], demonstration.actions[:, 3:])
    assert demonstration.dones.tolist() == [False] * (len(demonstration) - 1) + [True]


def test_demonstrations_are_found_by_the_tasks_instruction(stored):
    assert demonstrations_of_tasks(stored, TASKS, per_task=75) == {
        TASKS[0].name: [0, 2],
        TASKS[1].name: [1, 3],
    }
    assert demonstrations_of_tasks(stored, TASKS[:1], per_task=1) == {TASKS[0].name: [0]}
    other = find_tasks("libero_goal", [7])
    with pytest.raises(DataError, match=f"no demonstration of turn_on_the_stove.*has: .*{TASKS[1].prompt}"):
        demonstrations_of_tasks(stored, other, per_task=75)


def test_images_are_kept_at_the_size_of_the_networks_input(stored):
    small = load_chunks(stored, [0], robot=ROBOT, chunk=4, frame_every=1, image_size=SIZE // 2)
    seen = to_network_images(torch.from_numpy(stored.read(0).images[CAMERAS[0]]), SIZE // 2)
    assert torch.equal(to_network_images(small.images[CAMERAS[0]], SIZE // 2), seen)


def stream(stored, batch_size=4, seed=0, chunks_in_memory=6):
    return stream_chunks(
        stored,
        range(len(stored)),
        batch_size=batch_size,
        robot=ROBOT,
        chunk=3,
        frame_every=1,
        image_size=SIZE,
        generator=torch.Generator().manual_seed(seed),
        chunks_in_memory=chunks_in_memory,
    )


def test_a_stream_gives_every_chunk_equally_often_in_an_order_of_the_seed(stored):
    total = sum(LENGTHS)
    batches = stream(stored)
    given = torch.cat([next(batches).states for _ in range(200)])
    counts = torch.unique(given, dim=0, return_counts=True)[1]
    assert len(counts) == total
    assert counts.max() - counts.min() <= 2  # the last round is not complete
    first, again, other = (next(stream(stored, seed=seed)) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert not torch.equal(first.states, other.states)


def test_chunks_of_a_stream_come_in_another_order_than_in_their_demonstration(stored):
    states = next(stream(stored, batch_size=sum(LENGTHS), chunks_in_memory=sum(LENGTHS))).states
    indices = range(len(stored))
    demonstrated = load_chunks(stored, indices, robot=ROBOT, chunk=3, frame_every=1, image_size=SIZE).states
    places = [int((demonstrated == state).all(1).nonzero()[0]) for state in states]
    following = sum(after == before + 1 for before, after in pairwise(places))
    assert following < len(places) / 2


def test_a_stream_keeps_few_demonstrations_in_memory(stored, monkeypatch):
    reads = []
    read = type(stored).read
    monkeypatch.setattr(type(stored), "read", lambda self, *args: reads.append(args[0]) or read(self, *args))
    batches = stream(stored, batch_size=2, chunks_in_memory=6)
    next(batches)
    assert 1 <= len(reads) <= 2  # episodes of 4 to 9 chunks


def test_actions_beyond_the_controllers_range_are_refused(tmp_path):
    demonstration = make_demonstration(4, 0)
    demonstration.actions[2, 1] = 5
    stored = write_set(tmp_path / "set", [demonstration])
    with pytest.raises(DataError, match="demonstration 0 has actions up to 5; the robot's controller"):
        load_chunks(stored, [0], robot=ROBOT, chunk=3, frame_every=1, image_size=SIZE)


def start(output, *options):
    tiny = ["--score-every", "1", "--score-episodes", "1", "--max-minutes", "0", "--batch-size", "2"]
    warmstart.main(["--tasks", "3", "--output", str(output), "--workers", "1", *tiny, *map(str, options)])
    return json.loads((output / "warmstart.json").read_text())


@pytest.mark.engine
def test_a_warm_start_keeps_its_demonstrations_and_another_starts_from_them(tmp_path):
    first = start(
        tmp_path / "a", "--demonstrations", 1, "--write-dataset", tmp_path / "set", "--dataset-video"
    )
    assert open_demonstrations(tmp_path / "set").info.features["observation.images.image"]["dtype"] == "video"
    second = start(tmp_path / "b", "--dataset", tmp_path / "set")
    assert first["chunks"] == second["chunks"] > 0
    stats = [(tmp_path / name / "norm_stats.json").read_text() for name in ("a", "b")]
    assert stats[0] == stats[1]


@pytest.mark.engine
def test_a_warm_start_takes_its_demonstrations_from_a_data_set(tmp_path, stored, capsys):
    manifest = start(tmp_path / "policy", "--dataset", stored.root, "--frame-every", 2)
    assert f"{TASKS[0].name}: 2 demonstrations, 8 control steps on average" in capsys.readouterr().out
    assert manifest["demonstrations"] == {TASKS[0].name: {"demonstrations": 2, "mean_steps": 8.0}}
    assert manifest["chunks"] == 4 + 5
    stats = json.loads((tmp_path / "policy/norm_stats.json").read_text())["norm_stats"]["state"]["mean"]
    states = np.concatenate([stored.read(index, ()).states[::2] for index in (0, 2)])
    assert np.allclose(stats, states.mean(0), atol=1e-6)


def inverted_set(root):
    """A set of the first task in which 1 opens the gripper."""
    demonstration = make_demonstration(9, 0, TASKS[0].prompt)
    demonstration.actions[:, -1] = demonstration.executed[:, -1] = np.arange(9) < 3
    with LeRobotWriter(root, FPS) as writer:
        writer.add(demonstration)


@pytest.fixture
def unscored(monkeypatch):
    """Warm starts end without an episode of a score."""
    monkeypatch.setattr(warmstart, "score_on_training_states", lambda *_: {"successes": 0, "episodes": 1})


@pytest.mark.engine
def test_a_warm_start_stops_at_so_many_updates_and_is_scored_there(tmp_path, stored, unscored):
    manifest = start(
        tmp_path / "policy",
        "--dataset",
        stored.root,
        "--score-every",
        2,
        "--max-minutes",
        9,
        "--max-updates",
        3,
    )
    assert [score["updates"] for score in manifest["scores_on_training_states"]] == [2, 3]


@pytest.mark.engine
def test_a_warm_start_from_a_gripper_that_1_opens_has_to_be_told(tmp_path, unscored):
    inverted_set(tmp_path / "set")
    with pytest.raises(DataError, match="set: gripper actions are 0 to 1"):
        start(tmp_path / "policy", "--dataset", tmp_path / "set")
    start(
        tmp_path / "policy",
        "--dataset",
        tmp_path / "set",
        "--dataset-gripper",
        "open-is-1",
        "--frame-every",
        1,
    )
    assert load_norm_stats(tmp_path / "policy/norm_stats.json", 8, 7).actions.q01[-1] == -1


def test_statistics_of_a_gripper_that_1_opens_have_to_be_told(tmp_path):
    inverted_set(tmp_path / "set")
    options = ["--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "stats.json"), "--horizon", "1"]
    with pytest.raises(DataError, match="set: gripper actions are 0 to 1"):
        compute_norm_stats(options)
    compute_norm_stats([*options, "--dataset-gripper", "open-is-1"])
    assert load_norm_stats(tmp_path / "stats.json", 8, 7).actions.mean[-1] == pytest.approx((6 - 3) / 9)


def small_policy(folder, **changes):
    """A checkpoint of another chunk length and image size than a new policy's."""
    config = Pi0Config.preset("pi0_tiny")
    config = dataclasses.replace(
        config, action_horizon=12, vision=dataclasses.replace(config.vision, image_size=48), **changes
    )
    random = np.random.default_rng(0)
    stats = NormStats.of(random.normal(size=(9, 8)), random.uniform(-1, 1, size=(9, 7)))
    torch.manual_seed(0)
    policy = PI0Policy(config, stats)
    policy.save_pretrained(folder)
    return policy


@pytest.mark.engine
def test_a_warm_start_continues_from_a_policy_of_other_sizes(tmp_path, stored, monkeypatch):
    learned = []
    flow_loss = warmstart.flow_loss
    monkeypatch.setattr(
        warmstart,
        "flow_loss",
        lambda policy, chunks, **how: learned.append(chunks) or flow_loss(policy, chunks, **how),
    )
    policy = small_policy(tmp_path / "small", cameras=CAMERAS[:1])
    manifest = start(tmp_path / "further", "--start-from", tmp_path / "small", "--demonstrations", 1)
    protocol = manifest["protocol"]
    assert (protocol["image_size"], protocol["replan_steps"], protocol["cameras"]) == (48, 10, [CAMERAS[0]])
    (chunks,) = learned
    assert chunks.actions.shape == (2, 12, 7)
    assert {name: frames.shape for name, frames in chunks.images.items()} == {CAMERAS[0]: (2, 48, 48, 3)}
    further = PI0Policy.from_pretrained(tmp_path / "further")
    assert further.config == policy.config
    assert further.norm_stats.to_dict() == policy.norm_stats.to_dict()


@pytest.mark.engine
def test_a_warm_start_takes_frames_of_another_size_and_other_statistics(tmp_path, stored, unscored):
    policy = small_policy(tmp_path / "small")
    (tmp_path / "other.json").write_text(
        json.dumps(
            norm_stats(
                load_chunks(stored, [0], robot=ROBOT, chunk=1, frame_every=1, image_size=SIZE)
            ).to_dict()
        )
    )
    from_small = ["--start-from", tmp_path / "small", "--dataset", stored.root, "--image-size", 56]
    manifest = start(
        tmp_path / "further",
        *from_small,
        "--norm-stats-path",
        tmp_path / "other.json",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    )
    assert manifest["protocol"]["image_size"] == 56
    further = PI0Policy.from_pretrained(tmp_path / "further", dtype=torch.bfloat16)
    assert further.config == policy.config
    assert further.norm_stats.to_dict() == load_norm_stats(tmp_path / "other.json", 8, 7).to_dict()


def test_a_warm_start_from_a_policy_without_statistics_asks_for_them(tmp_path, stored):
    small_policy(tmp_path / "small")
    (tmp_path / "small/norm_stats.json").unlink()
    with pytest.raises(
        CheckpointError, match="small has no normalisation statistics; name some as --norm-stats-path"
    ):
        start(tmp_path / "further", "--start-from", tmp_path / "small", "--dataset", stored.root)


@pytest.mark.parametrize("option", [["--dtype", "bfloat16"], ["--norm-stats-path", "stats.json"]])
def test_what_is_said_of_a_checkpoint_needs_one(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        start(tmp_path / "policy", *option)
    assert "--start-from, which is not given" in capsys.readouterr().err


@pytest.mark.engine
def test_a_warm_start_names_what_is_wrong_with_its_data_set(tmp_path, stored):
    with pytest.raises(DataError, match="has no feature camera"):
        start(
            tmp_path / "policy",
            "--dataset",
            stored.root,
            "--dataset-features",
            *("state=observation.state", "actions=action", "base_0_rgb=camera"),
        )
    with pytest.raises(DataError, match="the policy has no camera front"):
        start(
            tmp_path / "policy",
            "--dataset",
            stored.root,
            "--dataset-features",
            *("state=observation.state", "actions=action", "front=observation.images.image"),
        )
