"""The engine behind Gymnasium's interfaces: its checker passes, and both faces give the engine's numbers."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import pi0.libero.gym_env  # noqa: F401 registers the environments
from pi0.base.paths import REPO_ROOT
from pi0.libero.episodes import Rollout
from pi0.libero.experts import Expert
from pi0.libero.gym_env import LIBEROEnv, LIBEROVectorEnv
from pi0.libero.rollouts import RolloutPool
from pi0.workers.process import WorkerError

pytestmark = pytest.mark.engine

SETTINGS = {"task": 3, "assets": "standins", "image_size": 64, "settle_steps": 2}


@pytest.fixture(scope="module")
def env():
    env = LIBEROEnv(**SETTINGS, horizon=300)
    yield env
    env.close()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*Box observation space m.*imum value is.*infinity")
@pytest.mark.filterwarnings("error::UserWarning")
def test_gymnasiums_own_checker_passes():
    env = gymnasium.make("pi0/LIBERO-v0", **SETTINGS, render_mode="rgb_array", disable_env_checker=True)
    check_env(env.unwrapped, skip_close_check=True)
    env.close()


class Script:
    """A policy that repeats actions, float32 [steps, 7], whatever it sees."""

    shares_first_look = False

    def __init__(self, actions: np.ndarray, replan_steps: int):
        self.actions = np.concatenate([actions, np.zeros((10, 7), np.float32)])
        self.replan_steps = replan_steps

    def noise(self, key):
        first = key[-1] * self.replan_steps
        return self.actions[first : first + 10]

    def act(self, images, states, prompts, noise):
        return noise


@pytest.fixture(scope="module")
def expert_episode(env):
    """What an expert does from state 5 until the task is solved: actions [steps, 7], and every answer of `step`."""
    env.reset(options={"init_state": 5})
    sim, _ = env._worker.open(env.task)
    expert, actions, answers = Expert(sim), [], []
    while not answers or not any(answers[-1][2:4]):
        actions.append(expert.action().astype(np.float32))
        answers.append(env.step(actions[-1]))
    return np.array(actions), answers


@pytest.fixture(scope="module")
def pool(env):
    spec = dataclasses.replace(env._worker.spec, slots=2, chunk=10)
    pool = RolloutPool(spec, workers=1)
    yield pool
    pool.close()


def test_an_expert_ends_an_episode_with_reward_one(env, expert_episode):
    observation, info = env.reset(options={"init_state": 5})
    assert env.observation_space.contains(observation)
    assert info["init_state"] == 5
    assert info["instruction"].startswith("pick up the black bowl on the cookie box")
    for action in expert_episode[0]:
        _, _, terminated, truncated, info = env.step(action)
    assert terminated
    assert not truncated
    assert info["success"]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(7, np.float32))
    rewards = [answer[1] for answer in expert_episode[1]]
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


@pytest.mark.parametrize("end", ["success", "horizon"])
def test_episodes_end_with_the_observation_that_the_environment_shows(env, pool, expert_episode, end):
    actions, answers = expert_episode
    steps = len(actions) if end == "success" else len(actions) - 3
    cut_off = []  # success within a chunk, whose last action is never carried out, and with its last action
    for replan_steps in (7, 9, 10):
        rollout = Rollout(
            env.task,
            env._states.states[5],
            init_index=5,
            noise_key=(),
            horizon=300 if end == "success" else steps,
            settle_steps=2,
            keep_last=True,
        )
        ((_, episode),) = pool.run(Script(actions, replan_steps), [rollout], replan_steps)
        assert episode.steps == steps
        assert (episode.terminated, episode.truncated) == (end == "success", end == "horizon")
        assert same({"images": episode.last.images, "state": episode.last.state}, answers[steps - 1][0])
        for look, step in enumerate(range(replan_steps, steps, replan_steps), start=1):
            assert np.array_equal(episode.states[look], answers[step - 1][0]["state"])
        cut_off.append(episode.executed[-1] < replan_steps)
    assert any(cut_off)
    assert end == "horizon" or not all(cut_off)


def test_a_drawn_frame_shows_the_episode_that_was_begun():
    env = LIBEROEnv(**SETTINGS, horizon=30, render_mode="rgb_array")
    env.reset(options={"init_state": 5})
    first = env.render()
    for _ in range(20):
        env.step(np.array([1, 0, -1, 0, 0, 0, 1], np.float32))
    later = env.render()
    assert not np.array_equal(later, first)
    env.reset(options={"init_state": 5})
    assert np.array_equal(env.render(), first)
    env.step(np.array([1, 0, -1, 0, 0, 0, 1], np.float32))
    assert not np.array_equal(env.render(), first)
    env.close()


def test_the_horizon_truncates():
    env = LIBEROEnv(**SETTINGS, horizon=3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(7, np.float32))[2:4] for _ in range(3)]
    env.close()
    assert ends == [(False, False), (False, False), (False, True)]


def test_bad_arguments_are_refused_by_name(env):
    with pytest.raises(ValueError, match="init_state is 50"):
        env.reset(options={"init_state": 50})
    with pytest.raises(ValueError, match="unknown cameras"):
        LIBEROEnv(**SETTINGS, cameras=["frontview"])
    with pytest.raises(ValueError, match="num_envs is 0"):
        LIBEROVectorEnv(0, **SETTINGS)


@pytest.mark.parametrize("workers", [1, 2])
def test_environments_in_a_vector_are_single_environments(env, workers):
    envs = gymnasium.make_vec(
        "pi0/LIBERO-v0",
        num_envs=3,
        vectorization_mode="vector_entry_point",
        workers=workers,
        **SETTINGS,
        horizon=4,
    )
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3, 7)).astype(np.float32)
    together, infos = envs.reset(seed=7)
    assert envs.observation_space.contains(together)
    records = [together]
    for step in range(4):
        observations, rewards, terminated, truncated, _ = envs.step(actions[step])
        records.append(observations)
        assert not rewards.any()
        assert not terminated.any()
        assert truncated.all() == (step == 3)
    # The episodes have ended: the next step starts others, whatever its actions.
    after, _, _, truncated, next_infos = envs.step(actions[0])
    assert not truncated.any()
    assert same(after, envs.step(actions[0])[0]) is False
    envs.close()
    for i in range(3):
        observation, info = env.reset(seed=7 + i)
        assert info["init_state"] == infos["init_state"][i]
        for step in range(5):
            together = records[step]
            one = {"images": {c: f[i] for c, f in together["images"].items()}, "state": together["state"][i]}
            assert same(one, observation)
            if step < 4:
                observation = env.step(actions[step, i])[0]
        observation, info = env.reset()
        assert info["init_state"] == next_infos["init_state"][i]
        assert np.array_equal(after["state"][i], observation["state"])


def test_without_autoreset_what_has_ended_stays_until_it_is_reset():
    envs = LIBEROVectorEnv(3, **SETTINGS, workers=2, horizon=3, autoreset=False)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert LIBEROVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    still, moved = np.zeros((3, 7), np.float32), np.ones((3, 7), np.float32)
    envs.reset(seed=7)
    envs.step(still)
    mask = np.array([False, True, False])
    observations, infos = envs.reset(options={"reset_mask": mask, "init_state": 5})
    assert infos["init_state"][1] == 5
    assert (infos["init_state"] == 5).tolist() == mask.tolist()
    for _ in range(2):
        observations, _, _, truncated, _ = envs.step(still)
    assert truncated.tolist() == [True, False, True]
    after, rewards, terminated, truncated, _ = envs.step(moved)
    assert truncated.all()
    assert not rewards.any()
    assert not terminated.any()
    assert [np.array_equal(after["state"][i], observations["state"][i]) for i in range(3)] == [
        True,
        False,
        True,
    ]
    assert same(envs.step(moved)[0], after)
    with pytest.raises(ValueError, match=r"reset_mask is float64 \[2\]; bool \[3\] is needed"):
        envs.reset(options={"reset_mask": np.ones(2)})
    os.kill(envs._pool.processes[0], signal.SIGKILL)
    with pytest.raises(WorkerError):
        envs.reset()
    with pytest.raises(gymnasium.error.ResetNeeded, match="without reset_mask"):
        envs.reset(options={"reset_mask": mask})
    assert not envs.reset()[1]["success"].any()
    envs.close()


def test_a_success_is_rewarded_once_and_stays(expert_episode):
    actions, _ = expert_episode
    envs = LIBEROVectorEnv(2, **SETTINGS, workers=1, horizon=300, autoreset=False)
    envs.reset(options={"init_state": 5})
    total = np.zeros(2)
    for action in [*actions, *actions[-3:]]:
        _, rewards, terminated, _, infos = envs.step(np.stack([action, 0 * action]))
        total += rewards
    assert total.tolist() == [1, 0]
    assert terminated.tolist() == infos["success"].tolist() == [True, False]
    envs.close()


@pytest.mark.tried("A worker of a vector dies", "An error; after a reset it goes on")
def test_a_vector_whose_worker_is_lost_says_so_and_can_be_reset():
    envs = LIBEROVectorEnv(2, **SETTINGS, workers=2, horizon=4)
    first, _ = envs.reset(seed=7)
    os.kill(envs._pool.processes[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 0 ended \(SIGKILL\)"):
        envs.step(np.zeros((2, 7), np.float32))
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, 7), np.float32))
    assert same(envs.reset(seed=7)[0], first)
    assert not envs.step(np.zeros((2, 7), np.float32))[3].any()
    envs.close()


FORKED = """
import sys
import gymnasium
import pi0.libero.gym_env
if __name__ == "__main__":
    settings = {"task": 3, "assets": "standins", "image_size": 32}
    gymnasium.make("pi0/LIBERO-v0", **settings).reset(seed=0)
    context = {"vector_kwargs": {"context": sys.argv[1]}}
    envs = gymnasium.make_vec("pi0/LIBERO-v0", 2, vectorization_mode="async", **context, **settings)
    try:
        print(envs.reset(seed=0)[0]["images"]["base_0_rgb"].shape)
    finally:
        envs.close(terminate=True)
"""


@pytest.mark.runs
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.tried(
    "An asynchronous vector with fork after OpenGL was used", "An error at once, with the mend (spawn)"
)
def test_a_fork_of_a_process_that_holds_opengl_is_refused_and_does_not_hang(tmp_path, method):
    script = tmp_path / "vector.py"
    script.write_text(FORKED)
    run = subprocess.run(
        [sys.executable, str(script), method],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    if method == "spawn":
        assert (run.returncode, run.stdout) == (0, "(2, 32, 32, 3)\n"), run.stderr[-3000:]
    else:
        assert run.returncode != 0
        refused = r"GLUnavailableError: this process was forked from process \d+, which holds an OpenGL context.*spawn"
        assert re.search(refused, run.stderr), run.stderr[-3000:]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"horizon": -5}, "horizon = -5: must be 1 or more"),
        ({"horizon": 0}, "horizon = 0: must be 1 or more"),
        ({"settle_steps": -5}, "settle_steps = -5: must be 0 or more"),
        ({"image_size": 1_000_000}, "image_size = 1000000: must be 4096 or less"),
        ({"render": "pretty"}, 'render = "pretty": expected'),
        ({"task": -1}, "libero_spatial has tasks 0 to 9, not -1"),
    ],
)
@pytest.mark.parametrize("kind", [LIBEROEnv, LIBEROVectorEnv])
@pytest.mark.tried("`horizon=-5`, `task=-1`", "An error with the range")
def test_what_makes_no_sense_is_refused_before_a_scene_is_made(kind, given, said):
    with pytest.raises(ValueError, match=said):
        kind(**{"assets": "standins"} | given)


@pytest.mark.tried(
    "NaN actions, or a batch of the wrong length, in the gymnasium environments",
    "An error that names what was given",
)
def test_actions_and_seeds_of_another_number_or_not_finite_are_refused(env):
    env.reset(seed=0)
    for action, said in (
        (np.zeros(6), r"actions have shape \(6,\); the action space has \(7,\)"),
        (np.full(7, np.nan), "an action is not finite"),
        (np.array([0, 0, 0, 0, 0, 0, np.inf]), "an action is not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            env.step(action)
    env.step(np.zeros(7))
    envs = LIBEROVectorEnv(num_envs=2, workers=1, **SETTINGS)
    count = envs.num_envs
    with pytest.raises(ValueError, match=f"{count + 1} seeds for {count} environments"):
        envs.reset(seed=list(range(count + 1)))
    envs.reset(seed=0)
    for shape in ((count + 1, 7), (count - 1, 7), (7,)):
        with pytest.raises(ValueError, match="the action space has"):
            envs.step(np.zeros(shape))
    with pytest.raises(ValueError, match="an action is not finite"):
        envs.step(np.full((count, 7), np.nan))
    envs.close()
