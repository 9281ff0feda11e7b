"""Formulas, critics and windows of `pi0.acrlpd`, against float64 loops and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.loss_functions import (
    advantage_weights,
    aggregate,
    chunk_target,
    effective_sample_size,
    possible_values,
    temperature_loss,
    weights_divergence,
)
from pi0.acrlpd.replay import ReplayBuffer, windows_of
from pi0.base.errors import InputError
from pi0.data.demonstrations import DataError
from pi0.policy.critics import CriticNetworks


def slow_target(rewards, masks, valid, next_value, discount):
    """The definition, step by step, in float64."""
    total, power, alive = 0.0, 1.0, True
    for reward, mask, there in zip(rewards, masks, valid, strict=True):
        if there:
            total += power * reward
            power *= discount
            alive = bool(mask)
    return total + (power * next_value if alive else 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_targets_are_those_of_a_slow_loop(seed):
    random = np.random.default_rng(seed)
    batch, horizon = 16, int(random.integers(1, 8))
    count = random.integers(1, horizon + 1, batch)
    valid = np.arange(horizon)[None] < count[:, None]
    rewards = random.normal(size=(batch, horizon)) * valid
    ends = random.random(batch) < 0.5
    masks = np.where(ends[:, None] & (np.arange(horizon)[None] >= count[:, None] - 1), 0.0, 1.0)
    values = random.normal(size=batch)
    found = chunk_target(*map(torch.from_numpy, (rewards, masks, valid.astype(float), values)), 0.9)
    expected = [slow_target(*row, 0.9) for row in zip(rewards, masks, valid, values, strict=True)]
    assert np.allclose(found.numpy(), expected, atol=1e-12)


def test_a_next_value_that_does_not_count_may_be_anything():
    row = torch.ones(1, 2, dtype=torch.float64)
    found = chunk_target(
        row, torch.tensor([[1.0, 0.0]]).double(), row, torch.tensor([math.nan]).double(), 0.5
    )
    assert found.tolist() == [1.5]


def made_episode(
    steps: int, horizon: int, terminated: bool, last: bool = False, every: int = 1
) -> RecordedEpisode:
    """An episode whose policy looks every `every` steps; observation i has the state i, the last step has reward 1."""
    starts = range(0, steps, every)
    executed = np.array([min(every, steps - start) for start in starts])
    rewards = np.zeros((len(executed), horizon), np.float32)
    if terminated:
        rewards[-1, executed[-1] - 1] = 1
    seen = len(executed) + last
    return RecordedEpisode(
        prompt="push",
        images={"base_0_rgb": np.zeros((seen, 4, 4, 3), np.uint8)},
        states=np.arange(seen, dtype=np.float32)[:, None],
        actions=np.zeros((len(executed), horizon, 2), np.float32),
        executed=executed,
        rewards=rewards,
        terminated=terminated,
        success=terminated,
    )


def five_steps(terminated: bool, last: bool, begin: int) -> RecordedEpisode:
    """Steps `begin` to 4 of an episode of five, in windows of 4 at most."""
    return made_episode(5 - begin, 4, terminated, last, every=4)


def test_targets_of_an_episode_of_five_steps_that_terminates():
    """Horizon 4, discount .9: .6561 Q(s4) from step 0, and .729, .9 and 1 from steps 1, 3... that reach the reward."""
    value = torch.tensor(0.37, dtype=torch.float64)
    for begin, expected in ((0, 0.6561 * 0.37), (1, 0.729), (2, 0.81), (3, 0.9), (4, 1.0)):
        first = windows_of(five_steps(True, False, begin))[torch.tensor([0])]
        columns = (column.double() for column in (first.rewards, first.masks, first.valid))
        assert chunk_target(*columns, value[None], 0.9).item() == pytest.approx(expected)
        assert first.sequence_mask.item()


def test_targets_of_an_episode_of_five_steps_that_is_cut_off():
    for begin in range(5):
        for last in (False, True):
            first = windows_of(five_steps(False, last, begin))[torch.tensor([0])]
            count = min(4, 5 - begin)
            reaches_end = begin + count == 5
            assert first.sequence_mask.item() == (last or not reaches_end)
            columns = (column.double() for column in (first.rewards, first.masks, first.valid))
            target = chunk_target(*columns, torch.tensor([0.5]).double(), 0.9).item()
            assert target == pytest.approx(0.9**count * 0.5), "a horizon is no failure"


def test_actions_beyond_those_carried_out_change_no_target():
    found = []
    for beyond in (0.0, 7.0):
        window = windows_of(made_episode(3, 4, True))
        rewards = window.rewards + beyond * (1 - window.valid)
        found.append(chunk_target(rewards, window.masks, window.valid, torch.zeros(len(window)), 0.9))
    assert torch.equal(*found)


def test_targets_stay_in_the_range_that_rewards_allow():
    ones = torch.ones(1, 2)
    assert chunk_target(ones, ones, ones, torch.tensor([50.0]), 0.9, (0.0, 1.0)).item() == 1.0
    assert possible_values(0, 1, 5, 1.0) == (0, 5)
    assert possible_values(-1, 0, 3, 0.5) == (-1.75, 0)


def test_values_of_critics_are_joined_by_minimum_or_mean():
    values = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    assert aggregate(values, "min").tolist() == [1, 2]
    assert aggregate(values, "mean").tolist() == [2, 3]


def test_weights_of_advantages():
    weights = advantage_weights(torch.tensor([0.0, 0.1, -0.1]).double(), 0.1)
    assert weights.tolist() == pytest.approx([0.734, 1.996, 0.270], abs=1e-3)
    extreme = advantage_weights(torch.tensor([1000.0, -1000.0]), 0.1)
    assert extreme.isfinite().all()
    assert extreme.mean().item() == pytest.approx(1)
    assert effective_sample_size(torch.ones(5)).item() == pytest.approx(5)
    assert effective_sample_size(torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(1)


@pytest.mark.parametrize("wanted", [0.1, 0.5, 1.5])
def test_a_learned_temperature_gives_the_divergence_that_is_asked_for(wanted):
    advantages = torch.from_numpy(np.random.default_rng(0).normal(size=64) * 0.2)
    log_temperature = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = torch.optim.Adam([log_temperature], 0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        temperature_loss(advantages, log_temperature, wanted).backward()
        optimizer.step()
    assert weights_divergence(advantages, log_temperature.exp().item()).item() == pytest.approx(
        wanted, abs=1e-3
    )


# Critics --------------------------------------------------------------------------------------------------


def made_critics(critics: int = 3) -> CriticNetworks:
    torch.manual_seed(0)
    return CriticNetworks(5, 2, 4, 3, critics=critics, hidden=8, layers=3)


def test_each_critic_is_the_network_that_its_weights_say():
    critics = made_critics()
    for parameter in critics.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    random = torch.Generator().manual_seed(1)
    features, state = torch.randn(6, 5, generator=random), torch.randn(6, 2, generator=random)
    chunk = torch.randn(6, 4, 3, generator=random)
    found = critics(features, state, chunk)
    assert found.shape == (3, 6)
    named = {name: tensor.detach().double() for name, tensor in critics.named_parameters()}

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    flat = chunk.double().flatten(1)
    seen = norm(features.double()) * named["feature_norm.weight"] + named["feature_norm.bias"]
    for k in range(3):
        x = (
            torch.cat([seen, state.double()], 1) @ named["observation.weight"][k]
            + named["observation.bias"][k]
        )
        x = x + flat @ named["chunk.weight"][k] + named["chunk.bias"][k]
        for layer in range(3):
            if layer:
                prefix = f"later.{layer - 1}"
                x = torch.cat([x, flat], 1) @ named[f"{prefix}.weight"][k] + named[f"{prefix}.bias"][k]
            x = norm(x) * named[f"norms.{layer}.scale"][k] + named[f"norms.{layer}.shift"][k]
            x = torch.nn.functional.gelu(x)
        value = torch.cat([x, flat], 1) @ named["value.weight"][k] + named["value.bias"][k]
        assert torch.allclose(found[k].double(), value[:, 0], atol=1e-4)


def test_many_chunks_of_an_observation_are_valued_as_each_alone():
    critics = made_critics()
    features, state, chunks = torch.randn(6, 5), torch.randn(6, 2), torch.randn(9, 6, 4, 3)
    together = critics.values(critics.observe(features, state), chunks)
    assert together.shape == (3, 9, 6)
    for sample in range(9):
        assert torch.allclose(together[:, sample], critics(features, state, chunks[sample]), atol=1e-5)


@pytest.mark.parametrize("critics", [1, 11])
def test_an_ensemble_has_two_to_ten_critics(critics):
    with pytest.raises(ValueError, match="2 to 10"):
        made_critics(critics)


# Windows --------------------------------------------------------------------------------------------------


def test_a_full_buffer_drops_whole_episodes_and_never_mixes_them():
    replay = ReplayBuffer(12)
    lost = [
        replay.add([made_episode(steps, 4, steps % 2 == 0, last=steps % 3 == 0)]) for steps in range(3, 9)
    ]
    lengths = [len(episode) for episode in replay.episodes]
    assert lengths == [8] or sum(lengths) <= 12
    assert sum(lengths) == len(replay) == len(replay.windows)
    assert sum(lost) + len(replay.states) == sum(steps + (steps % 3 == 0) for steps in range(3, 9)), (
        "observations leave with their episodes"
    )
    first = 0
    for episode in replay.episodes:
        rows = range(first, first + len(episode.states))
        own = [i for i, row in enumerate(replay.windows.seen.tolist()) if row in rows]
        assert set(replay.windows.then[own].tolist()) <= set(rows)
        first += len(episode.states)


def test_an_episode_larger_than_the_buffer_stays_alone():
    replay = ReplayBuffer(3)
    replay.add([made_episode(2, 4, True), made_episode(5, 4, True)])
    assert [len(episode) for episode in replay.episodes] == [5]


def test_the_same_seed_draws_the_same_windows():
    replay = ReplayBuffer(100)
    replay.add([made_episode(9, 4, True)])
    first, second = (replay.draw(20, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_what_cannot_be_drawn_or_kept_is_said():
    with pytest.raises(InputError, match="holds no episode"):
        ReplayBuffer(1).draw(1, torch.Generator())
    with pytest.raises(InputError, match="0 windows"):
        ReplayBuffer(0)


def test_contradicting_lengths_are_refused():
    good = made_episode(4, 4, True)
    with pytest.raises(DataError, match="4 chunks"):
        RecordedEpisode(**{**vars(good), "states": good.states[:2]})
    with pytest.raises(DataError, match="executed"):
        RecordedEpisode(**{**vars(good), "executed": good.executed * 9})
