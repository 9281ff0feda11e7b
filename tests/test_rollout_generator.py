"""Collecting groups: bounded whatever the policy does, and the same twice."""

import numpy as np
import pytest

from pi0.base.errors import InputError
from pi0.libero.settings import TaskConfig
from pi0.model.config import Pi0Config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.rollout_generator import RolloutGenerator


class StillPolicy:
    """Never succeeds."""

    shares_first_look = False

    def noise(self, key):
        return np.random.default_rng(key).standard_normal((10, 8), dtype=np.float32)

    def act(self, images, states, prompts, noise):
        return 0.01 * noise[:, :, :7]


@pytest.fixture(scope="module")
def runner():
    task = TaskConfig(
        task_names_to_use=[3],
        image_size=32,
        num_parallel_envs=2,
        max_episode_length=12,
        settle_steps=0,
        assets="standins",
    )
    with LIBEROEnvRunner(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))) as runner:
        yield runner


def generator(runner, reward=None, **changes):
    pool = runner.evaluation_states()[0]
    settings = {"num_groups": 2, "max_groups": 4, "seed": 0, "rollouts_per_env": 3}
    loader = ([(pool, number)] for number in range(100))
    return RolloutGenerator(
        runner, **{"init_state_dataloader": loader, "reward": reward} | settings | changes
    )


@pytest.mark.engine
def test_groups_of_k_rollouts_from_one_state_with_their_own_noise(runner):
    collection = generator(runner).generate_rollouts(StillPolicy(), step=0)
    assert [len(group.episodes) for group in collection.groups] == [3, 3]
    for number, group in enumerate(collection.groups):
        assert {episode.rollout.init_index for episode in group.episodes} == {number}
        assert len({episode.actions.tobytes() for episode in group.episodes}) == 3


@pytest.mark.engine
def test_the_same_seed_and_step_give_the_same_rollouts(runner):
    first, again, other = (
        generator(runner, seed=seed).generate_rollouts(StillPolicy(), step=2) for seed in (1, 1, 2)
    )
    assert all(
        np.array_equal(a.actions, b.actions) for a, b in zip(first.episodes, again.episodes, strict=True)
    )
    assert not np.array_equal(first.episodes[0].actions, other.episodes[0].actions)


@pytest.mark.engine
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_policy_that_always_or_never_succeeds_ends_with_an_empty_result(runner, score):
    rollouts = generator(runner, reward=lambda episode: score, enable_dynamic_sampling=True)
    collection = rollouts.generate_rollouts(StillPolicy(), step=0)
    assert collection.groups == []
    assert sum(map(sum, collection.dropped.values())) == 8  # twice the tries, since nothing came of them
    assert collection.advantages == []


@pytest.mark.engine
def test_when_a_whole_budget_was_unanimous_the_groups_come_from_other_states(runner, capsys):
    def of_the_fifth_state_on(episode) -> float:
        return float(episode.rollout.init_index > 3 and episode.rollout.noise_key[-1] == 0)

    rollouts = generator(runner, reward=of_the_fifth_state_on, enable_dynamic_sampling=True)
    collection = rollouts.generate_rollouts(StillPolicy(), step=0)
    assert [group.episodes[0].rollout.init_index for group in collection.groups] == [4, 5]
    assert any(collection.advantages)
    said = "all 4 groups tried were unanimous: trying as many other states"
    assert said in capsys.readouterr().out


@pytest.mark.engine
def test_dynamic_sampling_tries_other_states_until_it_has_enough(runner):
    # Every other group is mixed.
    rollouts = generator(
        runner,
        reward=lambda episode: float(episode.rollout.init_index % 2 and episode.rollout.noise_key[-1] == 0),
        enable_dynamic_sampling=True,
    )
    collection = rollouts.generate_rollouts(StillPolicy(), step=0)
    assert [group.episodes[0].rollout.init_index for group in collection.groups] == [1, 3]
    assert list(collection.dropped.values()) == [[0, 2]]
    assert collection.groups[0].advantages == [1.0, -0.5, -0.5]
    metrics = collection.metrics()
    assert (metrics["rollouts"], metrics["trajectories"]) == (12, 6)  # success in practice is of all
    assert list(metrics["tasks"].values()) == [[0, 12]]


@pytest.mark.engine
def test_without_dynamic_sampling_unanimous_groups_stay_and_teach_nothing(runner):
    collection = generator(runner).generate_rollouts(StillPolicy(), step=0)
    assert collection.metrics()["unanimous_groups"] == 2
    assert collection.advantages == [0.0] * 6


@pytest.mark.engine
def test_a_group_with_a_broken_rollout_is_reported_and_another_takes_its_place(runner, capsys):
    pool = runner.evaluation_states()[0]
    pool.states[1].state[1] = np.nan
    groups = [[0, 1, 2], [2, 3, 4], [5, 6, 7], [8, 9, 10]]
    loader = ([(pool, index) for index in group] for group in groups)
    rollouts = generator(runner, num_groups=2, init_state_dataloader=loader)
    collection = rollouts.generate_rollouts(StillPolicy(), step=0)
    assert [episode.rollout.init_index for episode in collection.episodes] == [2, 3, 4, 5, 6, 7]
    assert len(collection.failures) == 1
    assert "diverged" in collection.failures[0]
    assert collection.metrics()["failed_rollouts"] == collection.failures
    assert collection.failures[0] in capsys.readouterr().out


@pytest.mark.engine
def test_rollouts_that_always_break_end_the_collection_after_the_allowed_tries(runner):
    pool = runner.evaluation_states()[0]
    pool.states[0].state[1] = np.nan
    loader = iter(lambda: [(pool, 0), (pool, 1)], None)
    rollouts = generator(runner, num_groups=2, max_groups=5, rollouts_per_env=2, init_state_dataloader=loader)
    collection = rollouts.generate_rollouts(StillPolicy(), step=0)
    assert collection.groups == []
    assert len(collection.failures) == 5


def test_more_steps_than_a_chunk_has_are_refused_before_anything_is_started():
    with pytest.raises(InputError, match="replan_steps is 12; the policy's chunks have 10 actions"):
        LIBEROEnvRunner(TaskConfig(task_names_to_use=[3], replan_steps=12), Pi0Config.preset("pi0_tiny"))
