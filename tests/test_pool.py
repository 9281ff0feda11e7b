"""Rollouts in worker processes: the same episodes however many workers, whatever happens to them."""

import dataclasses
import operator
import os
import signal
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pi0.libero import gl
from pi0.libero import rollouts as rollouts_module
from pi0.libero.rendering import Renderer
from pi0.libero.settings import TaskConfig
from pi0.libero.suites import suite_tasks
from pi0.libero.worker import Worker
from pi0.model.config import Pi0Config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.workers.process import WorkerError
from tests.support import worker_calls

pytestmark = pytest.mark.engine

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")


class NoisePolicy:
    """Moves by its noise and by what it sees, so that any mix-up of rollouts shows."""

    shares_first_look = False

    def noise(self, key):
        return np.random.default_rng(key).standard_normal((10, 8), dtype=np.float32)

    def act(self, images, states, prompts, noise):
        actions = 0.3 * noise[..., :7]  # [S, B, 10, 7] or [B, 10, 7]
        actions[..., 0] += images["base_0_rgb"].mean(axis=(1, 2, 3))[:, None] / 255 - 0.5
        actions[..., 3:6] = 0
        return np.clip(actions, -1, 1)

    def prepared(self, images, states, prompts):
        pixels = {
            f"images/{name}": frames.transpose(0, 3, 1, 2) / 127.5 - 1 for name, frames in images.items()
        }
        return pixels | {"state": 10 * states}


class SharingPolicy(NoisePolicy):
    """The same, except that rollouts which begin alike look together; counts the looks."""

    shares_first_look = True

    def __init__(self):
        self.first_looks = 0

    def act(self, images, states, prompts, noise):
        self.first_looks += noise.ndim == 4
        return super().act(images, states, prompts, noise)


def make_runner(workers: int, tasks=(3,), **changes) -> LIBEROEnvRunner:
    task = TaskConfig(
        task_names_to_use=list(tasks),
        image_size=32,
        max_episode_length=35,
        settle_steps=2,
        num_parallel_envs=workers,
        assets="standins",
        **changes,
    )
    return LIBEROEnvRunner(task, Pi0Config.preset("pi0_tiny", cameras=CAMERAS))


def rollouts(runner: LIBEROEnvRunner, count: int, record: int = 0):
    pool = runner.evaluation_states()[0]
    return [runner.rollout(pool, index, (7, index), record) for index in range(count)]


def run(runner, jobs, policy=None):
    episodes = dict(runner.run_policy_in_env(policy or NoisePolicy(), jobs))
    return [episodes[index] for index in range(len(jobs))]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.success == b.success
        assert np.array_equal(a.executed, b.executed)
        assert np.array_equal(a.states, b.states)
        assert np.array_equal(a.actions, b.actions)
        assert all(np.array_equal(a.images[camera], b.images[camera]) for camera in CAMERAS)


@pytest.fixture(scope="module")
def runner():
    with make_runner(2) as runner:
        yield runner


@pytest.fixture(scope="module")
def episodes(runner):
    return run(runner, rollouts(runner, 10))


def test_every_rollout_comes_back_once_with_its_own_record(episodes):
    assert [episode.rollout.init_index for episode in episodes] == list(range(10))
    for episode in episodes:
        assert episode.failure is None
        assert episode.steps <= 35
        count = len(episode.executed)
        assert episode.states.shape == (count, 8)
        assert episode.actions.shape == (count, 10, 7)
        assert episode.images["base_0_rgb"].shape == (count, 32, 32, 3)
        assert list(episode.executed[:-1]) == [10] * (count - 1)


def test_a_chunk_cut_off_by_the_horizon_says_how_much_of_it_was_carried_out(episodes):
    assert next(list(e.executed) for e in episodes if not e.success) == [10, 10, 10, 5]


def test_one_worker_gives_the_same_episodes_as_two(episodes):
    with make_runner(1) as alone:
        assert_same(run(alone, rollouts(alone, 10)), episodes)


def test_a_group_whose_rollouts_begin_alike_gives_what_each_gives_alone(runner, episodes):
    jobs = rollouts(runner, 3)
    again = run(runner, [job for job in jobs for _ in range(4)])
    for index, episode in enumerate(again):
        assert_same([episode], [episodes[index // 4]])


def test_rollouts_that_begin_otherwise_are_not_mixed_up_where_fixtures_stand_alike():
    with make_runner(1, fixtures="pinned") as pinned:
        jobs = rollouts(pinned, 3)
        assert len({job.init.fixtures.tobytes() for job in jobs}) == 1
        jobs += [dataclasses.replace(jobs[0], settle_steps=9)]
        seen = [episode.images["base_0_rgb"][0].tobytes() for episode in run(pinned, jobs * 2)]
        assert seen[:4] == seen[4:]
        assert len(set(seen)) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_rollouts_that_look_together_at_first_do_what_each_does_alone(workers):
    with make_runner(workers) as runner:
        pool = runner.evaluation_states()[0]
        jobs = [runner.rollout(pool, index, (7, index, k)) for index in range(3) for k in range(5)]
        jobs.append(runner.rollout(pool, 5, (7, 5)))
        sharing = SharingPolicy()
        together = run(runner, jobs, sharing)
        assert_same(together, run(runner, jobs))
        assert sharing.first_looks == 3
        assert len({episode.actions.tobytes() for episode in together}) == len(jobs)


def test_a_worker_killed_after_its_first_look_changes_nothing(runner):
    pool = runner.evaluation_states()[0]
    jobs = [runner.rollout(pool, 0, (7, 0, k), record=5 * (k == 3)) for k in range(12)]
    expected = run(runner, jobs)
    before = len(runner.pool.losses)
    episodes = {}
    for index, episode in runner.run_policy_in_env(SharingPolicy(), jobs):
        if not episodes:
            os.kill(runner.pool.processes[0], signal.SIGKILL)
        episodes[index] = episode
    assert_same([episodes[index] for index in range(12)], expected)
    assert len(runner.pool.losses) == before + 1
    assert len(episodes[3].video) == 8


def test_filming_changes_nothing(runner, episodes):
    filmed = run(runner, rollouts(runner, 2, record=5))
    assert_same(filmed, episodes[:2])
    assert len(filmed[0].video) == 8
    assert filmed[0].video[0].shape == (256, 256, 3)


def test_debug_variables_write_what_happened_and_what_the_policy_saw(runner, episodes, monkeypatch, tmp_path):
    monkeypatch.setenv("PI0_DEBUG_DIR", str(tmp_path / "debug"))
    run(runner, rollouts(runner, 1))
    assert not (tmp_path / "debug").exists()
    monkeypatch.setenv("PI0_DEBUG_SAVE_VIDEO", "true")
    monkeypatch.setenv("DEBUG_SAVE_PROCESSED", "1")
    assert_same(run(runner, rollouts(runner, 2)), episodes[:2])
    for index, episode in enumerate(episodes[:2]):
        outcome = "success" if episode.success else "failure"
        name = tmp_path / "debug" / f"libero_spatial-task3-state{index}-7-{index}-{outcome}"
        with av.open(str(name) + ".mp4") as video:
            assert sum(1 for _ in video.decode(video=0)) == 1 + episode.steps // 2 + (
                episode.success and episode.steps % 2
            )
        with np.load(str(name) + ".npz", allow_pickle=False) as seen:
            assert str(seen["prompt"]) == episode.rollout.task.prompt
            assert np.array_equal(seen["states"], episode.states)
            assert np.array_equal(seen["images/base_0_rgb"], episode.images["base_0_rgb"])
            assert np.array_equal(seen["network/state"], 10 * episode.states)
        with Image.open(str(name) + ".png") as picture:
            assert picture.size == (32 * len(episode.states), 64)
            assert np.array_equal(np.asarray(picture)[:32, :32], episode.images["base_0_rgb"][0])


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.6])
@pytest.mark.tried("A worker is killed once", "Another runs its rollouts again; results are the same")
def test_killing_a_worker_changes_no_result(runner, episodes, delay_s):
    jobs = rollouts(runner, 10)
    victim, before = runner.pool.processes[0], len(runner.pool.losses)
    timer = threading.Timer(delay_s, os.kill, (victim, signal.SIGKILL))
    timer.start()
    assert_same(run(runner, jobs), episodes)
    timer.join()
    assert_same(
        run(runner, jobs[:2]), episodes[:2]
    )  # where a worker is missed that was killed after the others' end
    for loss in runner.pool.losses[before:]:
        assert str(loss).startswith("worker 0 ended (SIGKILL) while it ran libero_spatial task 3 state ")
    if delay_s == 0.0:
        assert len(runner.pool.losses) == before + 1


@pytest.mark.tried("A worker hangs", "It is replaced; results are the same")
def test_a_hung_worker_is_replaced_and_changes_no_result(runner, episodes, monkeypatch):
    monkeypatch.setattr(runner.pool, "limit_s", 12.0)
    os.kill(runner.pool.processes[1], signal.SIGSTOP)
    before = len(runner.pool.losses)
    assert_same(run(runner, rollouts(runner, 10)), episodes)
    (loss,) = runner.pool.losses[before:]
    assert loss.cause == "hung for 12 s"
    assert loss.work


@pytest.mark.parametrize("garbage", worker_calls.GARBAGE)
def test_a_worker_that_answers_garbage_is_replaced_and_changes_no_result(runner, episodes, garbage):
    process, before = runner.pool.processes[0], len(runner.pool.losses)
    list(runner.pool.call(worker_calls.answer_with_garbage, [(garbage,)]))  # the first of the two workers
    assert_same(run(runner, rollouts(runner, 10)), episodes)
    assert not Path(f"/proc/{process}").exists()
    (loss,) = runner.pool.losses[before:]
    assert loss.cause.startswith("sent something else than progress (")


BREAK = ("act", operator.attrgetter("anything"))  # acting then raises an error that is no simulation's


def test_a_worker_that_fails_is_replaced_and_changes_no_result(runner, episodes):
    before = len(runner.pool.losses)
    list(runner.pool.call(setattr, [BREAK]))  # the first of the two workers
    assert_same(run(runner, rollouts(runner, 10)), episodes)
    (loss,) = runner.pool.losses[before:]
    assert loss.cause.startswith("failed (worker 0: TypeError: ")


def test_when_nothing_is_ever_finished_the_run_ends_with_the_cause(monkeypatch):
    monkeypatch.setattr(rollouts_module, "FRUITLESS_LOSSES", 1)
    with make_runner(2) as runner:
        monkeypatch.setattr(runner.pool, "_replace", lambda number: None)  # the next is no better
        list(runner.pool.call(setattr, [BREAK, BREAK]))
        with pytest.raises(
            WorkerError, match=r"3 losses without a finished rollout: worker . failed .*TypeError"
        ):
            run(runner, rollouts(runner, 10))


def test_a_broken_simulation_fails_its_own_rollout_only(runner, episodes):
    jobs = rollouts(runner, 4)
    jobs[1].init.state[1] = np.nan
    results = run(runner, jobs)
    assert "diverged" in results[1].failure
    assert_same([results[0], *results[2:]], [episodes[0], *episodes[2:4]])


def test_a_half_consumed_run_leaves_the_pool_usable(runner, episodes):
    for _ in runner.run_policy_in_env(NoisePolicy(), rollouts(runner, 10)):
        break
    assert_same(run(runner, rollouts(runner, 3)), episodes[:3])


def test_a_worker_that_ends_within_an_answer_is_replaced_and_changes_no_result(runner, episodes):
    before = len(runner.pool.losses)
    list(runner.pool.call(worker_calls.die_within_the_next_answer, [()]))  # the first of the two workers
    assert_same(run(runner, rollouts(runner, 10)), episodes)
    (loss,) = runner.pool.losses[before:]
    assert loss.cause == "ended (SIGKILL)"


def test_a_worker_ends_well_with_its_scenes_and_its_opengl():
    with make_runner(1) as runner:
        run(runner, rollouts(runner, 1))
        (worker,) = runner.pool._workers
    assert worker._process.returncode == 0


def test_workers_say_which_scenes_they_have_open():
    def opened(pool) -> list[list[int]]:
        return [sorted(task.index for task in tasks) for tasks in pool.open_tasks()]

    tasks = suite_tasks("libero_spatial")
    with make_runner(2, tasks=[3, 4, 5], max_open_tasks=2) as three:
        assert opened(three.pool) == [[], []]
        list(three.pool.call(worker_calls.open_task, [(tasks[3],)]))  # the first of the two workers
        assert opened(three.pool) == [[3], []]
        assert three.pool.open_tasks()[0] == {tasks[3]}
        for task in (4, 5):
            list(three.pool.call(worker_calls.open_task, [(tasks[task],)]))
        assert opened(three.pool) == [[4, 5], []], "the one unused for longest was closed"
        with pytest.raises(WorkerError, match="this one opens its scene and fails"):
            list(three.pool.call(worker_calls.open_task_and_fail, [(tasks[3],)]))
        assert opened(three.pool) == [[3, 5], []]
        os.kill(three.pool.processes[0], signal.SIGKILL)
        assert list(three.pool.call(worker_calls.do_nothing, [()])) == [(0, None)]
        assert opened(three.pool) == [[], []], "the new worker has opened nothing"
        pools = three.evaluation_states()
        run(three, [three.rollout(pools[index % 2], index, (index,), max_steps=10) for index in range(8)])
        assert opened(three.pool) == [[3, 4], [3, 4]]
        seen = dict(three.pool.call(worker_calls.open_tasks, [(), ()]))
        assert [sorted(seen[number]) for number in (0, 1)] == opened(three.pool)
    assert three.pool.open_tasks() == []


# The last observation ------------------------------------------------------------------------------------


def test_an_episode_that_keeps_its_last_observation_is_the_same_otherwise(runner, episodes):
    jobs = [dataclasses.replace(job, keep_last=True) for job in rollouts(runner, 10)]
    kept = run(runner, jobs)
    assert_same(kept, episodes)
    for ours, other in zip(kept, episodes, strict=True):
        assert other.last is None
        assert ours.last.state.shape == (8,)
        assert ours.last.state.dtype == np.float32
        assert {camera: image.shape for camera, image in ours.last.images.items()} == dict.fromkeys(
            CAMERAS, (32, 32, 3)
        )
        assert not np.array_equal(ours.last.state, ours.states[-1])
    assert kept[0].outline().last is None


def test_an_episode_that_keeps_every_observation_is_the_same_otherwise(runner, episodes):
    asked = [dataclasses.replace(job, keep_last=True) for job in rollouts(runner, 10)]
    kept = run(runner, [dataclasses.replace(job, keep_every=True) for job in asked])
    assert_same(kept, episodes)
    for ours, other in zip(kept, run(runner, asked), strict=True):
        assert (len(ours.every), other.every, ours.outline().every) == (ours.steps, [], [])
        looks = np.cumsum([0, *ours.executed[:-1]])
        seen = [*(ours.every[step] for step in looks), ours.last]
        for number, state in enumerate([*other.states, other.last.state]):
            assert np.array_equal(seen[number].state, state)
        for camera, frames in other.images.items():
            for number, frame in enumerate([*frames, other.last.images[camera]]):
                assert np.array_equal(seen[number].images[camera], frame)
        assert len({each.state.tobytes() for each in ours.every}) == ours.steps


def test_an_episode_says_what_ended_it(runner):
    jobs = [dataclasses.replace(job, keep_last=True) for job in rollouts(runner, 2)]
    jobs[1].init.state[1] = np.nan
    truncated, broken = run(runner, jobs)
    assert (truncated.terminated, truncated.truncated) == (False, True)
    assert (broken.terminated, broken.truncated, broken.last) == (False, False, None)
    solved = dataclasses.replace(truncated, success=True)
    assert (solved.terminated, solved.truncated) == (True, False)


@pytest.mark.parametrize("keep_last", [False, True])
def test_the_last_observation_is_drawn_for_those_who_ask_alone(runner, monkeypatch, keep_last):
    gl.select_backend()
    spec = runner.pool.spec
    arrays = {name: np.zeros(*entry) for name, entry in spec.arrays().items()}
    worker = Worker(spec, arrays, np.random.default_rng(0))
    drawn = []
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, *rest: drawn.append(rest[1]) or render(self, *rest))
    (job,) = rollouts(runner, 1)  # 35 steps: chunks of 10, 10, 10 and 5
    worker.start(0, dataclasses.replace(job, keep_last=keep_last))
    assert drawn == list(CAMERAS)
    for chunk in range(4):
        arrays["images"][0], arrays["states"][0] = 7, 7
        drawn.clear()
        progress = worker.act(0, 10)
        assert progress.done == (chunk == 3)
        looked = keep_last or chunk < 3
        assert drawn == list(CAMERAS) * looked
        assert (arrays["states"][0] != 7).any() == looked
    worker.close()


def test_the_policy_looks_again_after_five_actions_of_a_chunk(runner, monkeypatch):
    monkeypatch.setattr(runner, "replan_steps", 5)
    (episode,) = run(runner, rollouts(runner, 1))
    assert episode.executed.tolist() == [5] * 7  # 35 control steps


def test_replanning_beyond_the_chunk_is_refused(runner, monkeypatch):
    monkeypatch.setattr(runner, "replan_steps", 11)
    with pytest.raises(ValueError, match="replan_steps is 11, the policy's chunks have 1 to 10"):
        run(runner, rollouts(runner, 1))


def test_the_task_cursor_goes_round(monkeypatch):
    runner = LIBEROEnvRunner.__new__(LIBEROEnvRunner)
    runner.assigned_tasks, runner.task_cursor = ["a", "b", "c"], 0
    visited = []
    for _ in range(4):
        visited.append(runner.set_current_task_by_cursor())
        runner.advance_task_cursor()
    assert visited == ["a", "b", "c", "a"]
    runner.assigned_tasks = []
    assert runner.set_current_task_by_cursor() is None


def test_the_protocol_says_what_a_score_depends_on(runner):
    protocol = runner.run(NoisePolicy(), 2, seed=5).protocol
    assert protocol["horizon"] == 35
    assert protocol["settle_steps"] == 2
    assert protocol["fixtures"] == "libero_eval"
    assert protocol["seed"] == 5
    assert protocol["assets"]["source"] == "standins"
