"""Rollouts recorded into files, and `pi0.acrlpd` learning from files: nothing is lost, what does not fit is named."""

import json
import os
import re
import signal
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from pi0 import PI0Policy
from pi0.acrlpd import trainer as trainer_module
from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader, create_acrlpd_data_loader
from pi0.acrlpd.acrlpd_pi0_agent import create_acrlpd_pi0_agent_from_rl_config
from pi0.acrlpd.config import ConfigError, RLTrainConfig, get_config
from pi0.acrlpd.episodes import (
    RecordedEpisode,
    demonstration_of,
    looked_steps,
    of_demonstration,
    of_rollout,
    terminates,
)
from pi0.acrlpd.files import RecordedFiles
from pi0.acrlpd.practice import choose_rollouts
from pi0.acrlpd.record import main as record_command
from pi0.acrlpd.record import record
from pi0.acrlpd.replay import windows_of
from pi0.acrlpd.train import unified_training_interface
from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.paths import REPO_ROOT
from pi0.data import DataError, Demonstration, FeatureNames, Observation, open_demonstrations
from pi0.data.lerobot_layout import LAST_OBSERVATIONS
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.data.recorded_chunks import leave_out_failures
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode
from pi0.libero.evaluation import BrokenSimulationsError
from pi0.libero.settings import TaskConfig
from pi0.policy.acting import ActingPolicy
from pi0.policy.critics import CriticNetworks, PolicyFeatures, save_critic
from pi0.policy.normalization import load_norm_stats
from pi0.training.checkpoint_store import load_state, save_state
from tests.support import recordings
from tests.support.episodes import CAMERAS, make_episode
from tests.support.recordings import make_demonstration, write_hdf5, write_separate_files, write_shared_files

CHECKPOINT = REPO_ROOT / "checkpoints/pi0_tiny_libero_spatial"
MIDDLE = load_norm_stats(CHECKPOINT / "norm_stats.json", 8, 7).state.mean
HORIZON = 10


@pytest.fixture(scope="module")
def policy() -> PI0Policy:
    return PI0Policy.from_pretrained(CHECKPOINT, trainable="all")


def rollout_of(success: bool, executed: list[int], seed: int, last: bool = True) -> Episode:
    """A rollout that was looked at in every control step; its states are near those that the policy knows."""
    random = np.random.default_rng(seed + 100)
    episode = make_episode(success, executed, seed)
    episode.states = (MIDDLE + 0.01 * episode.states).astype(np.float32)

    def seen() -> Observation:
        frames = {camera: random.integers(0, 255, (64, 64, 3), np.uint8) for camera in CAMERAS}
        return Observation(frames, (MIDDLE + 0.01 * random.standard_normal(8)).astype(np.float32))

    for look, count in enumerate(executed):
        frames = {camera: episode.images[camera][look] for camera in CAMERAS}
        episode.every += [Observation(frames, episode.states[look]), *(seen() for _ in range(count - 1))]
    episode.last = seen() if last else None
    return episode


ROLLOUTS = [
    rollout_of(True, [10, 4], 0),
    rollout_of(False, [10, 10, 7], 1),
    rollout_of(False, [10, 3], 2, last=False),
    rollout_of(True, [10, 10, 10, 1], 3),
    rollout_of(False, [10, 10], 4),
]


def write(root: Path, rollouts: list[Episode], **options) -> Path:
    with LeRobotWriter(root, recordings.FPS, **options) as writer:
        for rollout in rollouts:
            writer.add(demonstration_of(rollout))
    return root


def episodes_of(root: Path) -> list[RecordedEpisode]:
    found = open_demonstrations(root)
    return [
        of_demonstration(found.read(number, looked_steps(length, HORIZON)), HORIZON, f"episode {number}")
        for number, length in enumerate(found.lengths)
    ]


def assert_same_episode(found: RecordedEpisode, expected: RecordedEpisode) -> None:
    """The same but for actions that were never carried out."""
    assert (found.prompt, found.terminated, found.success, found.has_last) == (
        expected.prompt,
        expected.terminated,
        expected.success,
        expected.has_last,
    )
    assert found.images.keys() == expected.images.keys()
    for camera, frames in expected.images.items():
        assert np.array_equal(found.images[camera], frames)
    ours, theirs = windows_of(found), windows_of(expected)
    for name, column in vars(theirs).items():
        if name != "actions":
            assert torch.equal(getattr(ours, name), column), name
    assert found.states.dtype == expected.states.dtype == np.float32
    assert np.array_equal(found.states, expected.states)
    valid = theirs.valid.bool()
    assert torch.equal(ours.actions[valid], theirs.actions[valid])


# Writing and reading --------------------------------------------------------------------------------------


def test_a_rollout_that_was_written_is_read_back_as_the_same_episode(tmp_path):
    root = write(tmp_path / "set", ROLLOUTS)
    for found, rollout in zip(episodes_of(root), ROLLOUTS, strict=True):
        assert_same_episode(found, of_rollout(rollout, HORIZON))


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_every_field_of_a_recorded_rollout_is_read_back(tmp_path, video):
    root = write(tmp_path / "set", ROLLOUTS, video=video)
    found = open_demonstrations(root)
    for number, rollout in enumerate(ROLLOUTS):
        read, expected = found.read(number), demonstration_of(rollout)
        for name in ("states", "actions", "executed", "rewards", "dones", "successes", "truncated"):
            ours, theirs = getattr(read, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype, name
            assert np.array_equal(ours, theirs), name
        same = np.array_equal(read.images[CAMERAS[0]], expected.images[CAMERAS[0]])
        assert same != video, "a video loses a little"
        assert (read.last is None) == (rollout.last is None)
        if rollout.last is not None:
            assert np.array_equal(read.last.state, rollout.last.state)
            for camera in CAMERAS:
                assert np.array_equal(read.last.images[camera], rollout.last.images[camera])
        assert found.read(number, ()).last is None, "no image is opened"


def test_a_truncated_episode_is_told_from_one_that_ended_by_itself(tmp_path):
    rows = pq.read_table(
        write(tmp_path / "set", ROLLOUTS[:2]) / "data/chunk-000/file-000.parquet"
    ).to_pydict()
    ends = [13, 40]
    for name, expected in (("next.done", ends), ("next.success", [13]), ("next.truncated", [40])):
        assert np.flatnonzero(rows[name]).tolist() == expected
    assert np.flatnonzero(rows["next.reward"]).tolist() == [13]


def test_the_last_observation_is_no_row_for_other_readers(tmp_path):
    root = write(tmp_path / "set", ROLLOUTS)
    steps = sum(rollout.steps for rollout in ROLLOUTS)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["total_frames"] == steps
    assert pq.read_table(root / "data/chunk-000/file-000.parquet").num_rows == steps
    kept = pq.read_table(root / LAST_OBSERVATIONS)
    assert kept["episode_index"].to_pylist() == [0, 1, 3, 4]
    (root / LAST_OBSERVATIONS).unlink()
    assert [episode.has_last for episode in episodes_of(root)] == [False] * len(ROLLOUTS)
    assert leave_out_failures(open_demonstrations(root), range(len(ROLLOUTS))) == [0, 3]


def test_actions_are_written_as_chosen_and_as_executed():
    rollout = rollout_of(False, [10], 0)
    rollout.actions[0, 3, 1] = 1.5
    found = demonstration_of(rollout)
    assert (found.actions[3, 1], found.executed[3, 1]) == (1.5, 1.0)


def test_a_last_observation_of_other_cameras_is_refused():
    other = Observation({CAMERAS[0]: np.zeros((4, 4, 3), np.uint8)}, np.zeros(8, np.float32))
    with pytest.raises(DataError, match=r"its last observation has base_0_rgb and 8"):
        replace(demonstration_of(ROLLOUTS[0]), last=other)


def test_a_rollout_that_broke_or_was_not_looked_at_is_no_demonstration():
    with pytest.raises(DataError, match="diverged; it teaches nothing"):
        demonstration_of(replace(ROLLOUTS[0], failure="diverged"))
    with pytest.raises(DataError, match="0 observations of 14 control steps"):
        demonstration_of(replace(ROLLOUTS[0], every=[]))


@pytest.mark.parametrize(
    ("solved", "done", "truncated", "ended"),
    [
        (True, None, None, True),
        (True, True, None, True),
        (True, False, None, False),
        (True, True, False, True),
        (False, True, True, False),
        (False, True, False, True),
        (False, False, True, False),
        (False, False, None, False),
        (False, True, None, None),
        (False, None, None, None),
    ],
)
def test_how_an_episode_ended_follows_from_what_its_file_says(solved, done, truncated, ended):
    last = np.eye(5, dtype=bool)[-1]
    given = {
        name: None if flag is None else last & flag
        for name, flag in (("dones", done), ("truncated", truncated))
    }
    episode = replace(make_demonstration(5, 0), rewards=(last & solved).astype(np.float32), **given)
    assert terminates(episode, "episode 0") is ended


@pytest.mark.parametrize(("name", "said"), [("dones", "done"), ("truncated", "truncated")])
def test_an_episode_that_goes_on_after_its_end_is_refused(name, said):
    flags = np.zeros(20, bool)
    flags[12] = True
    with pytest.raises(DataError, match=f"episode 4 says at step 12 that it is {said}, but has 20 steps"):
        of_demonstration(replace(make_demonstration(20, 0), **{name: flags}), HORIZON, "episode 4")


def test_the_rest_of_a_chunk_that_cannot_be_read_back_changes_no_target(policy, tmp_path):
    loaders = []
    episodes = [of_rollout(rollout, HORIZON) for rollout in ROLLOUTS]
    for some in (episodes, episodes_of(write(tmp_path / "set", ROLLOUTS))):
        loader = ACRLPDDataLoader(policy, PolicyFeatures(policy.config, policy.network), 1000)
        loader.add(some)
        generator = torch.Generator().manual_seed(0)
        loader.caches.candidates = torch.randn(
            len(loader.replay.states), 2, HORIZON, policy.config.action_dim, generator=generator
        )
        loaders.append(loader)
    agent = create_acrlpd_pi0_agent_from_rl_config(config_of(tmp_path / "set"), policy)
    torch.nn.init.normal_(agent.target_critic.value.weight)
    differ = []
    for row in range(len(loaders[0])):
        one, other = (loader.batch(torch.tensor([row])) for loader in loaders)
        differ.append(not torch.equal(one["actions"], other["actions"]))
        targets = [agent.compute_critic_loss(batch)[1]["target"] for batch in (one, other)]
        assert targets[0] == targets[1]
        flows = []
        for batch in (one, other):
            agent.generator.manual_seed(1)
            learned = batch | {"success": torch.tensor([True])}
            flows.append(agent.compute_bc_loss(learned)[1]["bc_loss"])
        assert flows[0] == flows[1] > 0
    assert differ == [False, True, False, False, True, False, True, False, False, False, True, False, False]


# The command ----------------------------------------------------------------------------------------------


class Played:
    """Environments whose rollouts are made up, and end in another order than they began."""

    def __init__(self, episodes: list[Episode]):
        self.episodes = episodes
        self.asked: list = []

    def run_policy(self, policy, rollouts):
        self.asked = rollouts
        numbers = np.random.default_rng(0).permutation(len(rollouts)).tolist()
        return ((number, self.episodes[number]) for number in numbers)


@pytest.mark.tried(
    "A simulation breaks while rollouts are recorded",
    "It is named and left out; the others are written in order",
)
def test_rollouts_that_broke_are_named_and_left_out(tmp_path, capsys):
    made = [rollout_of(number % 2 == 0, [10, 1 + number % 9], number) for number in range(12)]
    played = Played([replace(each, failure="diverged") if n == 5 else each for n, each in enumerate(made)])
    with LeRobotWriter(tmp_path / "set", recordings.FPS) as writer:
        outlines = record(played, None, [each.rollout for each in made], writer)
    assert "left out: libero_spatial task 3 state 0: diverged" in capsys.readouterr().out
    assert all(rollout.keep_every and rollout.keep_last for rollout in played.asked)
    expected = [each for number, each in enumerate(made) if number != 5]
    assert [each.steps for each in outlines] == [each.steps for each in expected]
    for found, rollout in zip(episodes_of(tmp_path / "set"), expected, strict=True):
        assert_same_episode(found, of_rollout(rollout, HORIZON))


@pytest.mark.tried(
    "More than a tenth of the simulations break while rollouts are recorded",
    "Exit status 3, and no data set is left",
)
def test_nothing_is_written_where_too_many_broke(tmp_path):
    made = [rollout_of(False, [4], number) for number in range(4)]
    made[1] = replace(made[1], failure="diverged")
    with (
        pytest.raises(BrokenSimulationsError, match="recording: 1 of 4 broken"),
        LeRobotWriter(tmp_path / "set", recordings.FPS) as writer,
    ):
        record(Played(made), None, [each.rollout for each in made], writer)
    assert list(tmp_path.iterdir()) == []


RECORD = [
    *("--policy_path", str(CHECKPOINT), "--tasks", "3", "8", "--assets", "standins"),
    *("--rollouts", "6", "--init_states", "3", "--seed", "1", "--workers", "2"),
    *("--max_episode_length", "100"),
]


@pytest.fixture(scope="module")
def recorded(once) -> Path:
    """Six rollouts of the policy on two tasks; 100 control steps are enough to solve some."""
    return once("recorded", lambda folder: record_command([*RECORD, "--output", str(folder)]))


@pytest.mark.engine
def test_recorded_rollouts_are_those_that_a_run_would_record(recorded, policy):
    task = TaskConfig(
        task_names_to_use=[3, 8], assets="standins", num_parallel_envs=2, max_episode_length=100
    )
    with Environments(task, policy.config) as environments:
        pools = environments.training_states(3, 1)
        rollouts = choose_rollouts(environments, pools, 6, 1, 0)
        played = dict(environments.run_policy(ActingPolicy(policy), rollouts))
    found = episodes_of(recorded)
    assert len({episode.success for episode in found}) == 2, "both ends are seen"
    for number, episode in enumerate(found):
        assert episode.has_last
        assert_same_episode(episode, of_rollout(played[number], HORIZON))


@pytest.mark.engine
def test_the_command_says_what_it_recorded_and_writes_over_nothing(tmp_path, capsys):
    short = [*RECORD, "--rollouts", "2", "--max_episode_length", "20", "--output", str(tmp_path / "set")]
    record_command(short)
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{tmp_path}/set: 2 episodes, 0 solved, 40 control steps, \d\.\d MB", said)
    with pytest.raises(DataError, match="name a new folder"):
        record_command(short)
    assert len(open_demonstrations(tmp_path / "set")) == 2


@pytest.mark.engine
def test_with_a_critic_the_best_of_several_chunks_is_recorded(tmp_path, policy):
    features = PolicyFeatures(policy.config, policy.network)
    torch.manual_seed(0)
    critics = CriticNetworks(features.width, policy.config.action_dim, HORIZON, 7, hidden=16)
    for parameter in critics.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_critic(tmp_path / "critic", critics, features)
    short = [*RECORD, "--rollouts", "1", "--max_episode_length", "10", "--workers", "1"]
    critic = ["--critic_path", str(tmp_path / "critic")]
    for name, more in (
        ("plain", []),
        ("one", [*critic, "--samples", "1"]),
        ("best", [*critic, "--samples", "8"]),
    ):
        record_command([*short, *more, "--output", str(tmp_path / name)])
    plain, one, best = (open_demonstrations(tmp_path / name).read(0, ()) for name in ("plain", "one", "best"))
    assert np.array_equal(plain.states[0], best.states[0])
    assert np.array_equal(plain.actions, one.actions)
    assert not np.array_equal(plain.actions, best.actions)


# Files that a run learns from -----------------------------------------------------------------------------


def config_of(*datasets: Path, **data) -> RLTrainConfig:
    paths = ",".join(map(str, datasets))
    given = {"rollouts": 0, **data}
    return get_config(
        "acrlpd_debug",
        [f"data.datasets=[{paths}]", *(f"data.{name}={json.dumps(value)}" for name, value in given.items())],
    )


def made_files(policy: PI0Policy, *datasets: Path, **data) -> RecordedFiles:
    return RecordedFiles(config_of(*datasets, **data), policy)


def test_names_of_features_can_be_given(policy, tmp_path):
    own = FeatureNames({CAMERAS[0]: "front", CAMERAS[1]: "hand"}, "proprio", "delta")
    recorded = write(tmp_path / "set", ROLLOUTS, names=own)
    with pytest.raises(DataError, match="data.features"):
        made_files(policy, recorded)
    features = [f"{CAMERAS[0]}=front", f"{CAMERAS[1]}=hand", "state=proprio", "actions=delta"]
    found = made_files(policy, recorded, features=features)
    assert len(found) == len(ROLLOUTS)
    assert found.solved == 2


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("files") / "set", ROLLOUTS)


def lengths_of(pool: list[RecordedEpisode]) -> list[int]:
    """What tells the episodes of `ROLLOUTS` apart."""
    return [int(episode.executed.sum()) for episode in pool]


ALL = sorted(rollout.steps for rollout in ROLLOUTS)


def test_each_episode_of_the_files_comes_once_in_a_lap(policy, root):
    files = made_files(policy, root, episodes_per_memory_pool=2)
    assert (len(files), files.solved, files.pools) == (5, 2, 3)
    laps = [[lengths_of(files.next_pool()) for _ in range(files.pools)] for _ in range(6)]
    for lap in laps:
        assert max(map(len, lap)) <= 2
        assert sorted(chain(*lap)) == ALL
    assert len({str(lap) for lap in laps}) > 1, "every lap has an order of its own"


def test_pools_are_of_about_equal_size(policy, root):
    files = made_files(policy, root, episodes_per_memory_pool=4)
    assert [len(files.next_pool()) for _ in range(4)] == [3, 2, 3, 2]


def test_the_seed_decides_the_order_of_the_files(policy, root):
    def order(seed: int) -> list[list[int]]:
        config = config_of(root, episodes_per_memory_pool=1)
        config.training.seed = seed
        files = RecordedFiles(config, policy)
        return [lengths_of(files.next_pool()) for _ in range(5)]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_files_of_several_kinds_are_learned_from_together(policy, tmp_path, capsys):
    lengths = [23, 12, 31, 14, 25]
    made = [make_demonstration(length, seed) for seed, length in enumerate(lengths)]
    write_hdf5(tmp_path / "a_demo.hdf5", {"demo_0": made[0]}, None)
    write_with_rewards(tmp_path / "v21", made[1:2], write_separate_files)
    write_with_rewards(tmp_path / "v30", made[2:], write_shared_files)
    config = config_of(tmp_path / "a_demo.hdf5", tmp_path / "v21", tmp_path / "v30", skip_norm_stats=True)
    config.task.image_size = recordings.SIZE
    loader = create_acrlpd_data_loader(config, policy, PolicyFeatures(policy.config, policy.network))
    loader.refresh_memory_pool()
    assert lengths_of(loader.pool.episodes) == lengths
    assert all(episode.terminated for episode in loader.pool.episodes)
    for episode, whole in zip(loader.pool.episodes, made, strict=True):
        assert np.array_equal(episode.states, whole.states[::HORIZON])
        assert np.array_equal(episode.images[CAMERAS[0]], whole.images[CAMERAS[0]][::HORIZON])
    said = capsys.readouterr().out
    assert (
        "all of the 5 episodes were solved, so critics have nothing to contrast; add a set with failures"
        in said
    )
    assert "v30: 2 of its 2 instructions are no task of this run ('open the top drawer')" in said


def write_with_rewards(root: Path, made: list[Demonstration], layout) -> None:
    """A set in an older layout, whose rows have rewards, too."""
    layout(root, made)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    for path in sorted((root / "data").glob("*/*.parquet")):
        rows = pq.read_table(path)
        numbers = rows["episode_index"].to_numpy()
        if len(numbers):
            ends = np.append(numbers[1:] != numbers[:-1], True)
            rows = rows.append_column("next.reward", pa.array(ends.astype(np.float32)))
            pq.write_table(rows, path)


def without(name: str) -> list[Demonstration]:
    return [replace(demonstration_of(rollout), **{name: None}) for rollout in ROLLOUTS]


def write_made(root: Path, made: list[Demonstration]) -> Path:
    with LeRobotWriter(root, recordings.FPS) as writer:
        for each in made:
            writer.add(each)
    return root


def test_episodes_that_do_not_say_what_ended_them_are_counted(policy, tmp_path, capsys):
    made_files(policy, write_made(tmp_path / "set", without("truncated")))
    said = capsys.readouterr().out
    assert "5 episodes, 2 solved" in said
    assert "set: 3 episodes that were not solved do not say what ended them (next.truncated)" in said


def rewarded(*values: float) -> list[Demonstration]:
    found = []
    for rollout in ROLLOUTS:
        rewards = np.zeros(rollout.steps, np.float32)
        rewards[-len(values) :] = values
        found.append(replace(demonstration_of(rollout), rewards=rewards))
    return found


def of_other_robot() -> list[Demonstration]:
    found = [demonstration_of(rollout) for rollout in ROLLOUTS]
    return [
        replace(
            each, states=each.states[:, :7], last=each.last and replace(each.last, state=each.last.state[:7])
        )
        for each in found
    ]


def of_other_units() -> list[Demonstration]:
    return [replace(each, states=1000 * each.states) for each in map(demonstration_of, ROLLOUTS)]


def of_other_size() -> list[Demonstration]:
    return [make_demonstration(14, 0)]


@pytest.mark.tried(
    "Files without rewards, with rewards out of range, of another robot, other units or another size of images",
    "An error before anything runs: file, episode, and what to set",
)
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: [replace(each, rewards=None) for each in without("successes")],
            "set, episode 0 holds neither rewards nor successes, .*; leave its file out, or add next.reward",
        ),
        (
            lambda: rewarded(-0.5),
            "set, episode 0 has rewards of -0.5 to 0, but acrlpd.lowest_reward = 0 .* set them",
        ),
        (lambda: rewarded(2.0), "has rewards of 0 to 2, .* acrlpd.highest_reward = 1; set them to the range"),
        (
            lambda: rewarded(1, 1),
            "set, episode 0 has 2 rewards, but acrlpd.one_reward = true allows one; set it",
        ),
        (of_other_robot, r"set, episode 0 has states of \(7,\) and actions of \(7,\) features"),
        (
            of_other_units,
            r"set: state feature \d has the median .*norm_stats.json has the mean .* data.skip_norm_stats=true",
        ),
        (
            of_other_size,
            "set, episode 0 has images of 32 x 32 pixels .* set task.image_size, or record a set",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_mend(policy, tmp_path, made, said):
    path = write_made(tmp_path / "set", made())
    with pytest.raises(DataError, match=said):
        made_files(policy, path)


def test_statistics_and_description_are_compared_until_that_is_skipped(policy, tmp_path):
    path = write_made(tmp_path / "set", of_other_units())
    assert len(made_files(policy, path, skip_norm_stats=True)) == len(ROLLOUTS)
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps(info | {"fps": 10}))
    with pytest.raises(DataError, match=r"10 frames a second, .* data.skip_norm_stats=true"):
        made_files(policy, path)
    assert len(made_files(policy, path, skip_norm_stats=True)) == len(ROLLOUTS)


def test_a_set_of_other_cameras_is_refused(policy, tmp_path):
    names = replace(recordings.LEROBOT_NAMES, cameras={CAMERAS[0]: "observation.images.image"})
    with LeRobotWriter(tmp_path / "set", recordings.FPS, names) as writer:
        made = demonstration_of(ROLLOUTS[2])
        writer.add(replace(made, images={CAMERAS[0]: made.images[CAMERAS[0]]}))
    with pytest.raises(
        DataError, match="has images of base_0_rgb, but the policy uses .*left_wrist_0_rgb; record"
    ):
        made_files(policy, tmp_path / "set")


def test_an_instruction_that_is_too_long_for_the_policy_is_named(policy, tmp_path):
    prompt = "fold the unfamiliar towel"
    made = [replace(demonstration_of(rollout), prompt=prompt) for rollout in ROLLOUTS]
    with pytest.raises(DataError, match=rf"set: prompt '{prompt}' takes \d+ tokens; .*shorter prompt"):
        made_files(policy, write_made(tmp_path / "set", made))


def test_a_set_that_is_not_there_is_named(policy, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is neither an HDF5 file"):
        made_files(policy, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.rollouts=0"], r"data.rollouts = 0 and data.datasets = \[\] leave nothing to learn from"),
        (["data.online_share=0.5"], "data.online_share = 0.5, but there are no data.datasets"),
        (["data.datasets=[set]", "data.online_share=0"], "data.online_share = 0.*must be above 0"),
        (["data.episodes_per_memory_pool=0"], "data.episodes_per_memory_pool = 0.*must be 1 or more"),
    ],
)
def test_keys_of_the_data_that_contradict_each_other_are_named(overrides, said):
    with pytest.raises(ConfigError, match=said):
        get_config("acrlpd_debug", overrides)


# Batches of practice and files ----------------------------------------------------------------------------


def mixed_loader(policy: PI0Policy, root: Path, **data) -> ACRLPDDataLoader:
    """Two of the files' episodes and three of practice."""
    config = config_of(root, episodes_per_memory_pool=2, **data)
    loader = create_acrlpd_data_loader(config, policy, PolicyFeatures(policy.config, policy.network))
    loader.refresh_memory_pool()
    loader.add([of_rollout(rollout_of(True, [10, 5], seed), HORIZON) for seed in (20, 21, 22)])
    return loader


def practised(loader: ACRLPDDataLoader, batch: dict) -> torch.Tensor:
    """Whether each window of a batch is one of practice."""
    return (batch["observations"]["raw_state"][:, None] == loader.replay.states[None]).all(-1).any(1)


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.25, 5), (1.0, 20)])
def test_the_share_of_practice_in_a_batch_is_kept(policy, root, share, count):
    loader = mixed_loader(policy, root, online_share=share)
    for _ in range(5):
        batch = loader.sample_batch(20)
        assert batch["rewards"].shape == (20, HORIZON)
        assert int(practised(loader, batch).sum()) == count


def test_without_a_share_every_window_is_equally_likely(policy, root):
    loader = mixed_loader(policy, root)
    rows = torch.cat([loader._draw(100) for _ in range(50)])
    counts = torch.bincount(rows, minlength=len(loader))
    assert len(loader) == len(loader.replay) + len(loader.pool) == len(counts)
    expected = len(rows) / len(loader)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_a_batch_of_both_is_what_each_would_give(policy, root):
    loader = mixed_loader(policy, root, online_share=0.5)
    loader.refresh_candidates(lambda seen: seen["state"][None, :, None].expand(3, -1, HORIZON, -1))
    first = len(loader.replay)
    mixed = loader.batch(torch.tensor([first + 1, 0, first, 2]))
    parts = [loader.batch(torch.tensor(rows)) for rows in ([0, 2], [first + 1, first])]

    def compare(found, one, other):
        for name, column in found.items():
            axis = 1 if name.endswith("candidates") else 0
            if isinstance(column, dict):
                compare(column, one[name], other[name])
            else:
                assert torch.equal(column, torch.cat([one[name], other[name]], axis)), name

    assert mixed["candidates"].shape == (3, 4, HORIZON, 8)
    compare(mixed, *parts)


def test_batches_come_from_the_files_alone_until_there_is_practice(policy, root):
    config = config_of(root, online_share=0.5)
    loader = create_acrlpd_data_loader(config, policy, PolicyFeatures(policy.config, policy.network))
    assert len(loader) == 0
    loader.refresh_memory_pool()
    assert not practised_any(loader.sample_batch(8), ROLLOUTS)
    statistics = loader.get_dataset_statistics()
    assert (statistics["episodes"], statistics["solved"], statistics["steps"]) == (5, 2, sum(ALL))


def practised_any(batch: dict, rollouts: list[Episode]) -> bool:
    known = np.concatenate([rollout.states for rollout in rollouts])
    found = batch["observations"]["raw_state"].numpy()
    return not all((known == state).all(1).any() for state in found)


def test_the_same_seed_gives_the_same_batches_of_both(policy, root):
    first, second = (mixed_loader(policy, root, online_share=0.5) for _ in range(2))
    for _ in range(4):
        one, other = first.sample_batch(8), second.sample_batch(8)
        for name in ("actions", "rewards", "features"):
            assert torch.equal(one[name], other[name])
        for loader in (first, second):
            loader.refresh_memory_pool()


def test_the_pool_is_refreshed_and_caches_follow(policy, root):
    loader = mixed_loader(policy, root)
    practice = list(loader.replay.episodes)
    visited = [lengths_of(loader.pool.episodes)]
    for _ in range(2):
        loader.refresh_memory_pool()
        visited.append(lengths_of(loader.pool.episodes))
        fresh = ACRLPDDataLoader(policy, PolicyFeatures(policy.config, policy.network), 1000)
        fresh.add(loader.pool.episodes)
        assert torch.allclose(loader.pool_caches.features, fresh.caches.features, atol=1e-5)
        assert torch.equal(loader.pool_caches.inputs["state"], fresh.caches.inputs["state"])
        assert loader.pool_caches.candidates is None, "they were of other observations"
    assert sorted(chain(*visited)) == ALL
    assert loader.replay.episodes == practice, "practice stays"


def test_a_pool_that_holds_all_files_stays(policy, root):
    loader = create_acrlpd_data_loader(config_of(root), policy, PolicyFeatures(policy.config, policy.network))
    loader.refresh_memory_pool()
    before = loader.pool
    loader.refresh_memory_pool()
    assert loader.pool is before


def test_a_restored_loader_goes_on_with_the_same_pools_and_batches(policy, root, tmp_path):
    first = mixed_loader(policy, root, online_share=0.5)
    first.refresh_memory_pool()
    first.refresh_candidates(lambda seen: seen["state"][None, :, None].expand(2, -1, HORIZON, -1))
    save_state(tmp_path / "data.pt", {"data": first.state_dict()})
    config = config_of(root, episodes_per_memory_pool=2, online_share=0.5)
    second = create_acrlpd_data_loader(config, policy, PolicyFeatures(policy.config, policy.network))
    second.load_state_dict(load_state(tmp_path / "data.pt")["data"])
    for turn in range(4):
        one, other = first.sample_batch(8), second.sample_batch(8)
        for name in ("actions", "features", "rewards"):
            assert torch.equal(one[name], other[name])
        if turn == 0:
            assert torch.equal(one["candidates"], other["candidates"])
        for camera in CAMERAS:
            assert torch.equal(one["observations"]["image"][camera], other["observations"]["image"][camera])
        for loader in (first, second):
            loader.refresh_memory_pool()


@pytest.mark.tried(
    "A run is resumed after an episode was added to its files",
    "An error: the order of the files would change",
)
def test_files_that_have_changed_cannot_be_resumed_with(policy, root, tmp_path):
    state = mixed_loader(policy, root).state_dict()
    other = write(tmp_path / "set", ROLLOUTS[:4])
    loader = create_acrlpd_data_loader(
        config_of(other), policy, PolicyFeatures(policy.config, policy.network)
    )
    with pytest.raises(CheckpointError, match="hold 4 episodes, but held 5 when the checkpoint was written"):
        loader.load_state_dict(state)


def test_a_full_buffer_drops_whole_episodes_of_practice_and_none_of_the_files(policy, root):
    loader = mixed_loader(policy, root, buffer_windows=7)
    filed = list(loader.pool.episodes)
    added = [of_rollout(rollout_of(False, [10, 10, 10], seed), HORIZON) for seed in (30, 31)]
    loader.add(added)
    assert loader.replay.episodes == added
    assert len(loader.replay) == 6
    assert loader.pool.episodes == filed
    windows = loader.replay.windows
    ends = windows.terminals.any(1)
    assert ends.tolist() == [False, False, True] * 2, "no window is of two episodes"


# Whole runs -----------------------------------------------------------------------------------------------


def run_config(folder: Path, recorded: Path) -> RLTrainConfig:
    """One iteration offline, from files alone, and two with practice; a pool is four of six episodes at most."""
    return get_config(
        "acrlpd_debug",
        [
            f"output_dir={folder}",
            f"data.datasets=[{recorded}]",
            "data.rollouts=0",
            "data.episodes_per_memory_pool=4",
            "data.online_share=0.5",
            "training.num_train_steps=3",
            "training.offline_iterations=1",
            "task.max_episode_length=20",
        ],
    )


@pytest.mark.engine
@pytest.mark.tried(
    "a stop (SIGTERM) while ACRLPD learns from files of which only a part is in memory",
    "`--resume` gives the same numbers to the bit",
)
def test_a_run_that_learns_from_files_resumes_to_the_bit(tmp_path, monkeypatch, recorded, signals_as_before):
    torch.set_num_threads(1)
    whole = unified_training_interface(run_config(tmp_path / "whole", recorded))
    step = trainer_module.ACRLPDTrainer.train_step_wrapper

    def stopped(trainer, actor):
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, actor)

    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", stopped)
    run = unified_training_interface(run_config(tmp_path / "part", recorded))
    assert not (run / "results.json").exists()
    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", step)
    resumed = unified_training_interface(run_config(tmp_path / "part", recorded), str(run))
    for name in ("pi0_params", "critic_params", "target_critic_params"):
        first, second = (
            load_file(folder / f"checkpoints/step-000003/{name}.safetensors") for folder in (whole, resumed)
        )
        assert [key for key in first if not np.array_equal(first[key], second[key])] == []
    rows, again = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, resumed)
    )
    keys = ("step", "episodes", "windows", "tasks", "critic_loss", "actor_loss", "value")
    assert [[row.get(key) for key in keys] for row in rows] == [
        [row.get(key) for key in keys] for row in again
    ]
    assert [row["episodes"] for row in rows] == [3, 5, 7], (
        "three of the six in files, and two of practice each"
    )
    for folder in (whole, resumed):
        drawn = [
            load_state(folder / f"checkpoints/step-{step:06d}/rank0.pt")["data"]["files"]["drawn"]
            for step in (2, 3)
        ]
        assert drawn == [2, 3], "each iteration has a pool of its own"


@pytest.mark.engine
@pytest.mark.tried(
    "a stop (SIGTERM) while ACRLPD records its first rollouts beside files",
    "`--resume` has the files' episodes and the rollouts",
)
def test_a_stop_in_the_first_recorded_rollouts_keeps_the_files_episodes(
    tmp_path, monkeypatch, recorded, signals_as_before
):
    torch.set_num_threads(1)
    config = run_config(tmp_path, recorded)
    config.data.rollouts, config.training.num_train_steps, config.training.critic_updates = 2, 1, 1
    config.features.save_video = False
    practise = trainer_module.practise

    def stopped(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return practise(*given)

    monkeypatch.setattr(trainer_module, "practise", stopped)
    run = unified_training_interface(config)
    assert not (run / "results.json").exists()
    monkeypatch.setattr(trainer_module, "practise", practise)
    resumed = unified_training_interface(config, str(run))
    (row,) = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert row["episodes"] == 3 + 2, "a pool of the six episodes in files, and two rollouts"
