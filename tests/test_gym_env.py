"""The engine behind Gymnasium's interfaces: its checker passes, and both faces give the engine's numbers."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import pi0.libero.gym_env  # noqa: F401 registers the environments
from pi0.libero.experts import PickAndPlace
from pi0.libero.gym_env import LIBEROEnv, LIBEROVectorEnv

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


def test_an_expert_ends_an_episode_with_reward_one(env):
    observation, info = env.reset(options={"init_state": 5})
    assert env.observation_space.contains(observation)
    assert info["init_state"] == 5
    assert info["instruction"].startswith("pick up the black bowl on the cookie box")
    sim, _ = env._worker.open(env.task)
    expert, rewards = PickAndPlace(sim), []
    for _ in range(300):
        observation, reward, terminated, truncated, info = env.step(expert.action().astype(np.float32))
        rewards.append(reward)
        if terminated or truncated:
            break
    assert terminated
    assert not truncated
    assert info["success"]
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(7, np.float32))


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
