"""Environments made from the task section, scores of a policy in them, and videos of scored episodes."""

import dataclasses
import json

import av
import numpy as np
import pytest

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.base.stats import wilson_interval
from pi0.evaluate import table
from pi0.libero.environments import Environments
from pi0.libero.evaluation import evaluate, restore_result
from pi0.libero.films import VIDEO_EPISODES, VIDEO_EVERY, film_before_after, write_films
from pi0.libero.settings import TaskConfig
from pi0.model.config import PUBLISHED_CAMERAS, Pi0Config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.results import results_table
from pi0.warmstart import score_on_training_states

pytestmark = pytest.mark.engine

POLICY = Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))
STEPS = 12
TASK = TaskConfig(
    task_names_to_use=[3, 4], image_size=32, num_parallel_envs=2, max_episode_length=STEPS, settle_steps=0,
    assets="standins",
)  # fmt: skip


class Wobbly:
    """Moves by its noise."""

    shares_first_look = False

    def noise(self, key):
        return np.random.default_rng(key).standard_normal((10, 8), dtype=np.float32)

    def act(self, images, states, prompts, noise):
        return np.clip(0.3 * noise[:, :, :7], -1, 1)


@pytest.fixture(scope="module")
def environments():
    with Environments(TASK, POLICY) as environments:
        yield environments


@pytest.fixture(scope="module")
def result(environments):
    return evaluate(environments, Wobbly(), 5, seed=7)


@pytest.mark.parametrize("kind", [Environments, LIBEROEnvRunner])
def test_environments_are_made_as_configured(kind):
    task = TaskConfig(
        benchmark_name="libero_goal", task_names_to_use=[1, 2], assets="standins", demonstrations="shown", held_out_states=9,
        fixtures="pinned", num_parallel_envs=1, rollouts_per_env=3, max_open_tasks=5, max_episode_length=77,
        settle_steps=2, replan_steps=4, image_size=48, render="exact",
    )  # fmt: skip
    unlike = TaskConfig()
    for name in (each.name for each in dataclasses.fields(TaskConfig)):
        assert getattr(task, name) != getattr(unlike, name) or name == "task_name", name
    policy = Pi0Config.preset("pi0_tiny", action_horizon=12)
    with kind(task, policy) as runner:
        spec = runner.pool.spec
        assert (runner.benchmark_name, [each.index for each in runner.tasks]) == ("libero_goal", [1, 2])
        assert (spec.assets.source, runner.demonstrations, runner.fixtures) == ("standins", "shown", "pinned")
        assert (len(runner.pool.processes), spec.slots, spec.max_open_tasks) == (1, 3, 5)
        assert runner.held_out_states == 9
        assert (runner.max_episode_length, runner.settle_steps, runner.replan_steps) == (77, 2, 4)
        assert (runner.image_size, spec.image_size, spec.render) == (48, 48, "exact")
        assert (runner.cameras, spec.chunk) == (policy.cameras, 12)
        workers = runner.pool.processes
    assert len(workers) == 1
    assert runner.pool.processes == []


def test_frames_are_as_large_as_the_policy_looks_at_and_of_the_cameras_that_libero_has():
    task = TaskConfig(task_name=3, num_parallel_envs=1, assets="standins")
    with Environments(task, Pi0Config.preset("pi0_tiny", cameras=PUBLISHED_CAMERAS)) as environments:
        assert environments.image_size == environments.pool.spec.image_size == 64
        assert environments.cameras == PUBLISHED_CAMERAS[:2]
        assert [each.index for each in environments.tasks] == [3]


def test_a_policy_without_a_camera_that_libero_has_is_refused():
    with pytest.raises(InputError, match="the policy's cameras are chest; LIBERO has base_0_rgb, left_wrist"):
        Environments(TASK, Pi0Config.preset("pi0_tiny", cameras=("chest",)))


def test_episodes_are_spread_over_the_tasks_from_the_first_recorded_states_on(environments, result):
    assert [(e.rollout.task.index, e.rollout.init_index) for e in result.episodes] == [
        (3, 0), (3, 1), (3, 2), (4, 0), (4, 1),
    ]  # fmt: skip
    assert {episode.steps for episode in result.episodes} == {STEPS}
    assert all(e.conditions == {"on akita_black_bowl_1 plate_1": False} for e in result.episodes)
    assert result.protocol == environments.protocol(episodes=5, seed=7)


def test_a_score_is_the_same_twice_and_its_noise_depends_on_the_seed(environments, result):
    again, other = (evaluate(environments, Wobbly(), 5, seed=seed) for seed in (7, 8))
    for ours, theirs, different in zip(result.episodes, again.episodes, other.episodes, strict=True):
        assert np.array_equal(ours.actions, theirs.actions)
        assert not np.array_equal(ours.actions, different.actions)


def test_a_runner_of_ript_scores_what_the_engine_scores(result):
    with LIBEROEnvRunner(TASK, POLICY) as runner:
        scored = runner.run(Wobbly(), 5, seed=7)
        assert {task.index for tasks in runner.pool.open_tasks() for task in tasks} == {3, 4}
    assert (scored.score(), scored.protocol) == (result.score(), result.protocol)


def test_more_episodes_than_a_task_has_states_are_refused(environments):
    with pytest.raises(InputError, match="has 50 evaluation states, but 51 are needed; use fewer episodes"):
        evaluate(environments, Wobbly(), 101, seed=0)


def test_an_outlined_score_is_read_back_from_json(environments, result):
    outline = json.loads(json.dumps(result.to_dict()))
    restored = restore_result(environments, outline)
    assert restored.score() == result.score()
    assert restored.to_dict() == outline
    for ours, theirs in zip(restored.episodes, result.episodes, strict=True):
        assert ours.rollout.beginning == theirs.rollout.beginning
        assert (ours.rollout.noise_key, ours.rollout.horizon) == (theirs.rollout.noise_key, STEPS)


def test_a_score_counts_by_task_and_names_what_broke(result):
    first = dataclasses.replace(result.episodes[0], success=True)
    last = dataclasses.replace(result.episodes[-1], failure="diverged")
    counted = dataclasses.replace(result, episodes=[first, *result.episodes[1:-1], last]).score()
    assert (counted["successes"], counted["episodes"], counted["success_rate"]) == (1, 4, 0.25)
    assert [task["successes"] for task in counted["tasks"].values()] == [1, 0]
    assert [task["episodes"] for task in counted["tasks"].values()] == [3, 1]
    assert counted["broken"] == ["diverged"]
    assert counted["outcomes"][0] == {"task": 3, "state": 0, "success": True, "steps": STEPS}


def test_conditions_of_a_goal_are_counted_where_there_are_several(result):
    both = [{"in soup basket": soup, "in sauce basket": False} for soup in (True, True, False)]
    parts = [dataclasses.replace(result.episodes[0], conditions=conditions) for conditions in both]
    broken = dataclasses.replace(result.episodes[0], failure="diverged", conditions=both[0])
    counted = dataclasses.replace(result, episodes=[*parts, broken, result.episodes[-1]])
    score = counted.score()
    several, one = score["tasks"].values()
    assert {
        words: (held["successes"], held["episodes"]) for words, held in several["conditions"].items()
    } == {
        "in soup basket": (2, 3),
        "in sauce basket": (0, 3),
    }
    assert several["conditions"]["in soup basket"]["interval_95"] == list(wilson_interval(2, 3))
    assert "conditions" not in one
    lines = [line.split("  ") for line in table(counted, None)]
    assert [line[1] for line in lines if not line[0]] == ["in soup basket", "in sauce basket"]
    results = {"before": score, "after": score, "change": None, "seconds": 60.0}
    rows = [line.split("  ")[1:2] for line in results_table(results).splitlines() if line.startswith("  in")]
    assert rows == [["in soup basket"], ["in sauce basket"]]
    earlier = {**score, "tasks": {name: {**task, "conditions": {}} for name, task in score["tasks"].items()}}
    assert "in soup" not in results_table({**results, "after": earlier})


def test_the_score_of_a_warm_start_counts_by_task(environments):
    policy = PI0Policy.from_pretrained(REPO_ROOT / "checkpoints/suite_spatial", "cpu").eval()
    score = score_on_training_states(environments, policy, 3, seed=0)
    assert (score["successes"], score["episodes"]) == (0, 3)
    assert {name: task["episodes"] for name, task in score["tasks"].items()} == {
        task.name: count for task, count in zip(environments.tasks, (2, 1), strict=True)
    }


def frames_of(file) -> list[np.ndarray]:
    with av.open(str(file)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def test_the_first_states_of_each_task_are_filmed(environments, result, tmp_path):
    filmed = evaluate(environments, Wobbly(), 6, 7, VIDEO_EVERY, filmed=2)
    write_films(filmed, tmp_path)
    names = {f"task{task}-state{state}-failure.mp4" for task in (3, 4) for state in (0, 1)}
    assert {file.name for file in tmp_path.iterdir()} == names
    for name in names:
        assert len(frames_of(tmp_path / name)) == 1 + STEPS // VIDEO_EVERY


def test_before_and_after_are_filmed_side_by_side(environments, result, tmp_path):
    film_before_after(tmp_path, environments, Wobbly(), Wobbly(), result, result)
    frames = frames_of(tmp_path / "before_after.mp4")
    assert len(frames) == VIDEO_EPISODES * (1 + STEPS // VIDEO_EVERY)
    assert frames[0].shape[1] == 2 * 256 + 4
