"""Stage 12: the ten steps from one task to LIBERO-10, each with its acceptance test."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.data import DataLoader, DistributedSampler

from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.libero.environments import Environments
from pi0.libero.episodes import Rollout
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import state_hash
from pi0.libero.suites import find_tasks
from pi0.model.config import Pi0Config
from pi0.ript.advantages import leave_one_out_advantages
from pi0.ript.config import load_config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.rollout_generator import RolloutGenerator
from pi0.ript.rollout_stats import RolloutStats, state_name
from tests.support.ranks import torchrun
from tests.support.short_practice import every_other, shortened
from tests.support.stage_13_runs import finish
from tests.support.worker_calls import open_tasks, tasks_in_memory

pytestmark = pytest.mark.runs

SCRIPT = REPO_ROOT / "12_train_with_dataset.py"
CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SMALL = {
    "policy_path": str(CHECKPOINT),
    "task": {
        "task_names_to_use": [3],
        "assets": "standins",
        "num_parallel_envs": 1,  # several tests run at a time
    },
    "algo": {
        "rloo_batch_size": 4,
        "data_batch_size": 8,
        "max_sampling_attempts": 4,
        "train_init_states": 8,
        "num_epochs": 1,
        "minibatch_size": 24,
    },
    "training": {"num_train_steps": 2},
    "evaluation": {"episodes": 2, "periodic_episodes": 2},
    "logging": {"log_freq": 1, "use_wandb": False},
    "features": {"save_video": False},
}


def load_script():
    spec = importlib.util.spec_from_file_location("stage_12", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage = load_script()


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder)}))
    return folder / "config.yaml"


def practise(
    folder: Path, *overrides: str, solved: Callable[[Rollout], bool] = every_other
) -> tuple[str, Path]:
    """A run in this process whose episodes are short and solved by a rule: what it printed, and its folder."""
    config = load_config(write_config(folder), list(overrides), stage=12)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(Environments, "run_policy", shortened(solved))
        patch.setattr(
            stage, "write_html_report", lambda *_: None
        )  # to draw it takes longer than all else here
        run_dir = stage.train(config, 0, 1, [])
    return said.getvalue(), run_dir


def repetition(rollout: Rollout) -> int:
    """Number of a rollout within its group."""
    return rollout.noise_key[-1]


def one_state_in_three(rollout: Rollout) -> bool:
    """The groups of states 0, 3, 6 all fail, those of 2 and 5 all succeed, those of 1, 4, 7 differ."""
    return [False, repetition(rollout) == 0, True][rollout.init_index % 3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that share a statistics file."""
    folder = tmp_path_factory.mktemp("stage_12")
    shared = f"algo.rollout_stats_path={folder / 'shared.json'}"
    first = practise(folder, shared, solved=one_state_in_three)
    states = json.loads((folder / "shared.json").read_text())["states"]
    again = ("training.num_train_steps=1", "training.seed=0", "evaluation.periodic_episodes=0")
    second = practise(folder, shared, *again, solved=one_state_in_three)
    return first, second, states, json.loads((folder / "shared.json").read_text())["states"]


class Wobbly:
    """Never succeeds; what it does depends on its noise."""

    shares_first_look = False

    def noise(self, key):
        return np.random.default_rng(key).standard_normal((10, 8), dtype=np.float32)

    def act(self, images, states, prompts, noise):
        return 0.01 * noise[:, :, :7]


class Watched(Wobbly):
    """Keeps the noise keys in the order in which it was asked to act."""

    def __init__(self):
        self.keys = []

    def noise(self, key):
        self.keys.append(key)
        return super().noise(key)


def runner_of(**changes) -> LIBEROEnvRunner:
    task = TaskConfig(
        benchmark_name="libero_10",
        image_size=32,
        num_parallel_envs=2,
        rollouts_per_env=2,
        max_open_tasks=3,
        max_episode_length=10,
        settle_steps=0,
        assets="standins",
        **changes,
    )
    return LIBEROEnvRunner(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",)))


@pytest.fixture(scope="module")
def runner():
    with runner_of() as runner:
        yield runner


@pytest.fixture
def runner_of_two():
    """A runner with two tasks: each scene in which states are drawn takes a second to build."""
    with runner_of(task_names_to_use=[0, 1]) as runner:
        yield runner


def loader_of(runner, group_size: int, ranks=(1, 0), count: int = 3, stats: RolloutStats | None = None):
    """Data set, sampler and loader over recorded states, as the script makes them over drawn ones."""
    pools = [
        type(pool)(pool.task, "training", pool.states[:count], {}) for pool in runner.evaluation_states()
    ]
    dataset = stage.LiberoInitStateDataset(pools)
    ring = DistributedSampler(dataset, *ranks, shuffle=False)
    sampler = stage.TaskAwareSampler(dataset, ring, group_size, stats or RolloutStats(None, 2))
    return dataset, sampler, DataLoader(dataset, batch_sampler=sampler, collate_fn=stage.collate_fn_state)


# 1 ------------------------------------------------------------------------------------------------------


def test_step_1_without_dynamic_sampling_every_step_trains(tmp_path):
    overrides = ("algo.enable_dynamic_sampling=false", "evaluation.periodic_episodes=0")
    _, run_dir = practise(tmp_path, *overrides, solved=one_state_in_three)
    final = json.loads((run_dir / "final_training_results.json").read_text())
    assert final["total_steps"] == final["iterations"] == 2
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["groups"], row["unanimous_groups"], row["dropped_groups"]) for row in rows] == [
        (2, 1, 0),  # of states 0 and 1
        (2, 2, 0),  # of 2 and 3
    ]


# 2 ------------------------------------------------------------------------------------------------------


def test_step_2_rollouts_are_collected_by_initial_state(runner):
    dataset, _, loader = loader_of(runner, group_size=1)
    rollouts = RolloutGenerator(
        runner,
        init_state_dataloader=loader,
        init_state_dataset=dataset,
        rollouts_per_env=4,
        num_groups=2,
        max_groups=2,
        seed=0,
    )
    collection = rollouts.generate_rollouts(Wobbly(), step=0)
    for group in collection.groups:
        assert len({(e.rollout.task.index, e.rollout.init_index) for e in group.episodes}) == 1
        assert len({e.actions.tobytes() for e in group.episodes}) == 4
    assert [len(group.episodes) for group in collection.groups] == [4, 4]


def test_step_2_the_generator_takes_what_the_description_names_and_is_ended_by_cleanup(tmp_path):
    task = TaskConfig(
        benchmark_name="libero_10",
        task_names_to_use=[0, 1],
        image_size=32,
        num_parallel_envs=2,
        settle_steps=0,
        assets="standins",
    )
    with LIBEROEnvRunner(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))) as env_runner:
        stats = RolloutStats(tmp_path / "stats.json", skip_threshold=1)
        dataset, sampler, loader = loader_of(env_runner, group_size=1, stats=stats)
        rollouts = RolloutGenerator(
            env_runner=env_runner,
            rollouts_per_env=2,
            num_envs=1,
            max_steps=15,  # two chunks
            agent_gpus=[0],
            init_state_dataloader=loader,
            init_state_dataset=dataset,
            enable_dynamic_sampling=False,
            stats=stats,
            use_val_init=True,
            num_groups=4,
            max_groups=4,
            seed=0,
            reward=lambda episode: 1.0,
        )
        watched = Watched()
        collection = rollouts.generate_rollouts(watched, step=0)
        assert [episode.steps for episode in collection.episodes] == [15] * 8
        in_turn = [(*e.rollout.noise_key, look) for e in collection.episodes for look in (0, 1)]
        assert watched.keys == in_turn, "one environment: each rollout begins when the one before has ended"
        # Solved, by what the generator is told, on as many visits as it takes: skipped when their turn comes.
        for episode in collection.tried:
            episode.success = True
        rollouts.record(collection)
        visited = [(e.rollout.task.index, e.rollout.init_index) for e in collection.tried[::2]]
        again = rollouts.generate_rollouts(Wobbly(), step=1)
        after = [(e.rollout.task.index, e.rollout.init_index) for e in again.tried[::2]]
        assert visited == [(0, 0), (1, 0), (0, 1), (1, 1)]
        assert after[:2] == [(0, 2), (1, 2)]
        assert sampler.skipped == {task.name: [2] for task in env_runner.tasks}
        assert [pool.kind for pool in rollouts.validation_states(1)] == ["training", "training"]
        for episode in again.tried:
            rollouts.stats.record(state_name(episode.rollout.task, episode.rollout.init), 0, 1)
        workers = env_runner.pool.processes
        rollouts.cleanup()
        written = json.loads((tmp_path / "stats.json").read_text())["states"]
        assert sum(len(visits) for visits in written.values()) == 4 + 8
        assert env_runner.pool.processes == []
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("tracked", [True, False])
def test_step_2_the_generator_makes_statistics_as_described_where_it_is_given_none(tmp_path, tracked):
    rollouts = RolloutGenerator(
        None,
        init_state_dataloader=[],
        rollouts_per_env=2,
        rollout_skip_threshold=1,
        enable_rollout_stats_tracking=tracked,
        rollout_stats_path=tmp_path / "stats.json",
        num_groups=1,
        max_groups=1,
        seed=0,
    )
    rollouts.stats.record("state", 2, 2)
    assert rollouts.stats.skip("state")
    rollouts.stats.save()
    assert (tmp_path / "stats.json").exists() == tracked


def test_step_2_several_gpus_for_one_rank_are_refused_with_the_way_to_use_them(runner):
    with pytest.raises(InputError, match="torchrun --nproc_per_node=2"):
        RolloutGenerator(
            runner,
            init_state_dataloader=[],
            rollouts_per_env=2,
            agent_gpus=[0, 1],
            num_groups=1,
            max_groups=1,
            seed=0,
        )


# 3 ------------------------------------------------------------------------------------------------------


def test_step_3_statistics_are_kept_by_state_and_grow_from_run_to_run(runs):
    (_, first), _, states, more = runs
    history = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    tried = sum(row["rollouts"] for row in history)
    assert tried == sum(row["trajectories"] + 4 * row["dropped_groups"] for row in history)
    assert sum(rollouts for visits in states.values() for _, rollouts in visits) == tried
    assert all(re.fullmatch(r"libero_spatial/3/[0-9a-f]{16}", name) for name in states)
    of_each_visit = {rollouts for visits in states.values() for _, rollouts in visits}
    assert of_each_visit == {4}, "a group is four rollouts of one state"
    assert all(more[name][: len(visits)] == visits for name, visits in states.items())
    assert sum(map(len, more.values())) > sum(map(len, states.values()))


def test_step_3_statistics_that_cannot_be_written_are_said_and_end_nothing(tmp_path):
    (tmp_path / "folder").touch()  # a file where the folder should be
    overrides = (f"algo.rollout_stats_path={tmp_path}/folder/stats.json", "evaluation.periodic_episodes=0")
    output, run_dir = practise(tmp_path, *overrides)
    # After each of two iterations, and once more at the end.
    assert len(re.findall(r"statistics not saved: cannot write .*folder/stats.json", output)) == 3
    assert (run_dir / "results.json").is_file()


# 4 ------------------------------------------------------------------------------------------------------


def test_step_4_groups_that_agree_are_dropped_and_said_so(runs):
    output, run_dir = runs[0]
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["unanimous_groups"] == 0 for row in history)
    (name,) = history[0]["tasks"]
    assert [row["dropped_by_task"] for row in history] == [{name: [1, 2]}, {name: [1, 1]}]
    for row in history:
        assert row["dropped_share"] == row["dropped_groups"] / (row["groups"] + row["dropped_groups"])
        for name, (solved, failed) in row["dropped_by_task"].items():
            assert f"dropped groups of {name}: {solved} all solved, {failed} all failed" in output


def test_step_4_states_that_keep_succeeding_are_skipped_and_reported(tmp_path):
    # States 0 and 2 of four are always solved; every state that is solved once is skipped.
    overrides = (
        "algo.rollout_skip_threshold=1", "algo.rloo_batch_size=2", "algo.train_init_states=4",
        "evaluation.periodic_episodes=0",
    )  # fmt: skip
    output, run_dir = practise(
        tmp_path,
        *overrides,
        solved=lambda rollout: rollout.init_index % 2 == 0 or repetition(rollout) == 0,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_states"] for row in rows] == [0, 2]
    said = re.findall(r"skipped states of \w+: (\d+), solved on each of their last visits", output)
    assert said == ["2"]
    for row in rows:
        assert row["skipped_share"] == row["skipped_states"] / (row["skipped_states"] + row["states"])


def test_step_4_a_budget_of_unanimous_groups_widens_and_training_continues(tmp_path):
    overrides = (
        "evaluation.periodic_episodes=0", "task.held_out_states=40", "algo.rloo_batch_size=2", "algo.data_batch_size=4",
    )  # fmt: skip
    output, run_dir = practise(tmp_path, *overrides, solved=lambda rollout: False)
    (task,) = find_tasks("libero_spatial", [3])
    recorded = [f"libero_spatial/3/{state_hash(state)}" for state in task.recorded_init_states()]
    practised = json.loads((run_dir / "rollout_stats.json").read_text())["states"]
    assert set(practised) <= set(recorded[40:48]), (
        "of the recorded states that no score uses, the first eight"
    )
    assert "all 4 groups tried were unanimous: trying as many other states" in output
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["dropped_groups"] for row in rows] == [8, 8]
    assert "nothing to learn from" in output
    final = json.loads((run_dir / "final_training_results.json").read_text())
    assert (final["total_steps"], final["iterations"]) == (0, 2)


# 5 ------------------------------------------------------------------------------------------------------


def test_step_5_no_task_names_mean_every_task_of_libero_10(runner):
    config = load_config(REPO_ROOT / "configs" / "stage12_libero10.yaml")
    assert (config.task.benchmark_name, config.task.chosen) == ("libero_10", [])
    assert [task.index for task in runner.tasks] == list(range(10))


# 6 ------------------------------------------------------------------------------------------------------


def test_step_6_batches_name_their_task_and_episodes_match_it(runner):
    dataset, _, loader = loader_of(runner, group_size=2)
    batches = iter(loader)
    seen = set()
    for _ in range(10):
        batch = next(batches)
        (task_id,) = set(batch["task_id"].tolist())
        seen.add(task_id)
        for index, state in zip(batch["index"].tolist(), batch["init_state"], strict=True):
            pool, number = dataset.start(index)
            assert pool.task.index == task_id
            assert np.array_equal(state, pool.states[number].state)
    assert seen == set(range(10)), "tasks that fail alike take equal turns"


def test_step_6_ranks_share_the_states_of_every_task(runner):
    shares = []
    for rank in (0, 1):
        dataset, sampler, _ = loader_of(runner, 1, ranks=(2, rank), count=4)
        assert all(len(ring.states) == 2 for ring in sampler.rings)
        shares += [index for ring in sampler.rings for index in ring.states]
    assert sorted(shares) == list(range(len(dataset)))


def test_step_6_states_that_do_not_divide_by_the_ranks_have_one_rank_each(runner):
    shares = []
    for rank in (0, 1, 2):
        dataset, sampler, _ = loader_of(runner, 1, ranks=(3, rank), count=4)
        assert all(ring.states for ring in sampler.rings)
        shares += [index for ring in sampler.rings for index in ring.states]
    assert len(dataset) % 3
    assert sorted(shares) == list(range(len(dataset)))


def test_step_6_too_few_states_for_the_ranks_is_an_error_that_says_so(runner):
    with pytest.raises(stage.ConfigError, match="train_init_states"):
        loader_of(runner, 1, ranks=(4, 3), count=1)


def test_step_6_two_processes_practise_states_of_their_own_and_count_together(tmp_path):
    settings = (
        "algo.use_val_init=true", "training.num_train_steps=1", "algo.data_batch_size=4",
    )  # fmt: skip
    run = torchrun(
        2, "tests/support/short_practice.py", SCRIPT.name, "--config_path", str(write_config(tmp_path)),
        "--override", *settings,
    )  # fmt: skip
    output = finish(run)
    (run_dir,) = tmp_path.glob("ript-*")
    (row,) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    collected = re.findall(r"rank (\d): \d+ tasks, (\d+) trajectories, (\d+) solved", output)
    assert [rank for rank, _, _ in collected] == ["0", "1"]
    assert sum(int(rollouts) for _, rollouts, _ in collected) == row["trajectories"]
    assert f"{row['groups'] + row['dropped_groups']} groups tried, {row['groups']} kept" in output
    visits = json.loads((run_dir / "rollout_stats.json").read_text())["states"]
    assert sum(rollouts for seen in visits.values() for _, rollouts in seen) == 4 * (
        row["groups"] + row["dropped_groups"]
    )
    assert len(visits) == row["groups"] + row["dropped_groups"], "no state has met both ranks"
    (evaluation,) = json.loads((run_dir / "metrics.json").read_text())
    assert "validation" in evaluation["protocol"]["init_states"]
    assert len(json.loads((run_dir / "results.json").read_text())["after"]["outcomes"]) == 2


# 7 ------------------------------------------------------------------------------------------------------


def test_step_7_environments_are_kept_by_task_within_the_bound(runner):
    for task in runner.tasks[:5]:
        env, env_id, env_num = runner.create_parallel_envs(task.name)
        assert (env, env_id, env_num) == (runner.pool, task.index, 4)
    assert list(runner.created_envs) == [2, 3, 4]
    open_now = [tasks for _, tasks in runner.pool.call(open_tasks, [()] * 2)]
    assert open_now == [[2, 3, 4], [2, 3, 4]]
    states = runner.evaluation_states()[4]
    rollouts = [runner.rollout(states, 0, (1, 0, 0))]
    envs = runner.create_parallel_envs(states.task.name)
    (episode,) = dict(runner.run_policy_in_env(Wobbly(), rollouts, created_env=envs)).values()
    assert episode.failure is None
    assert [tasks for _, tasks in runner.pool.call(open_tasks, [()] * 2)] == open_now, (
        "nothing was built again"
    )


def test_step_7_a_scene_that_is_closed_leaves_memory(runner):
    (in_memory,) = (tasks for _, tasks in runner.pool.call(tasks_in_memory, [(runner.tasks[:6],)]))
    assert in_memory == [3, 4, 5]


# 8 ------------------------------------------------------------------------------------------------------


def test_step_8_advantages_are_those_of_the_states_own_group(runner):
    dataset, _, loader = loader_of(runner, group_size=1)
    rollouts = RolloutGenerator(
        runner,
        init_state_dataloader=loader,
        init_state_dataset=dataset,
        rollouts_per_env=3,
        num_groups=2,
        max_groups=2,
        seed=0,
        reward=lambda episode: float(episode.rollout.noise_key[-1]),  # 0, 1, 2 within a group
    )
    collection = rollouts.generate_rollouts(Wobbly(), step=0)
    for group in collection.groups:
        assert group.advantages == [0 - 1.5, 1 - 1.0, 2 - 0.5] == leave_one_out_advantages([0, 1, 2])


# 9 ------------------------------------------------------------------------------------------------------


def test_step_9_the_policy_is_evaluated_periodically_into_metrics_json(runs):
    (output, run_dir), *_ = runs
    evaluations = json.loads((run_dir / "metrics.json").read_text())
    assert [entry["step"] for entry in evaluations] == [1, 2]
    for entry in evaluations:
        assert entry["success_rate"] == entry["successes"] / entry["episodes"]
        assert sum(task["episodes"] for task in entry["tasks"].values()) == 2
        assert entry["protocol"]["init_states"].startswith("evaluation: LIBERO's recorded")
    assert "evaluation after 2 steps" in output


def test_step_9_validation_states_are_drawn_and_never_trained_on(runner_of_two):
    runner = runner_of_two
    (validation,) = runner.validation_states(2)[:1]
    training = runner.training_states(2, 0)[0]
    assert validation.provenance["seed"] != training.provenance["seed"]
    known = {state.state.tobytes() for state in [*training.states, *runner.evaluation_states()[0].states]}
    assert not known & {state.state.tobytes() for state in validation.states}
    result = runner.run(Wobbly(), 2, 0, initial_states=runner.validation_states(1))
    assert "validation" in result.protocol["init_states"]


# 10 -----------------------------------------------------------------------------------------------------


def test_step_10_the_long_run_is_configured_as_described_and_starts(tmp_path):
    config = load_config(REPO_ROOT / "configs" / "stage12_libero10.yaml")
    assert config.task.num_parallel_envs == 2
    assert config.algo.rloo_batch_size == 4
    assert config.algo.enable_dynamic_sampling
    assert config.algo.enable_rollout_stats_tracking
    assert not config.features.save_video
    assert config.training.num_train_steps == 1000
    # A scene takes a second to build: one worker builds each of the ten once, to draw its state.
    overrides = [
        f"output_dir={tmp_path}", f"algo.rollout_stats_path={tmp_path / 'stats.json'}", "training.num_train_steps=1",
        "task.max_episode_length=10", "task.settle_steps=0", "algo.train_init_states=1", "evaluation.episodes=1",
        "algo.data_batch_size=8", "algo.max_sampling_attempts=2", "task.num_parallel_envs=1", "task.max_open_tasks=10",
        "logging.use_wandb=false",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config_path", "configs/stage12_libero10.yaml", "--override", *overrides],
        cwd=REPO_ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "LiberoInitStateDataset created with 10 initial states",
        "DataLoader created",
        "batches sampled",
    ):
        assert line in done.stdout
