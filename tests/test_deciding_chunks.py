"""The value function and the table of benchmarks/deciding_chunks.py; tests/test_commands.py runs it."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from benchmarks.deciding_chunks import auc, cross_fitted, table


def test_auc_is_that_of_the_rank_test():
    rng = np.random.default_rng(0)
    outcomes = rng.random(40) < 0.4
    values = np.round(rng.random(40) + 0.3 * outcomes, 1)  # with ties
    expected = mannwhitneyu(values[outcomes], values[~outcomes]).statistic / (
        outcomes.sum() * (~outcomes).sum()
    )
    assert auc(torch.from_numpy(values), torch.from_numpy(outcomes)) == pytest.approx(expected)


def made(decided_at: int, episodes: int = 80, seed: int = 0):
    """Episodes of 4 looks whose outcome shows in one feature from a look on."""
    generator = torch.Generator().manual_seed(seed)
    outcomes = (torch.rand(episodes, generator=generator) < 0.5).tolist()
    features = []
    for outcome in outcomes:
        seen = torch.randn(4, 6, generator=generator)
        seen[decided_at:, 0] += 6 * (outcome - 0.5)
        features.append(seen)
    return features, outcomes


def rows(text: str) -> list[list[float]]:
    return [[float(cell) for cell in line.strip("| ").split("|")] for line in text.splitlines()[4:]]


def test_the_table_shows_the_look_from_which_the_outcome_is_known():
    features, outcomes = made(decided_at=2, episodes=400)
    found = rows(table(cross_fitted(features, outcomes, 0), outcomes, 10))
    assert [row[:2] for row in found] == [[look, 400] for look in range(4)]
    assert all(row[2] < 0.7 for row in found[:2])
    assert all(row[2] > 0.95 for row in found[2:])
    assert max(found, key=lambda row: row[3])[0] == 1, "the chunk between looks 1 and 2 decides"


def test_looks_that_only_failures_reach_tell_nothing_apart():
    values = [torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 0.0])]
    lines = table(values, [True, False, False], looks=10).splitlines()
    assert lines[4:] == ["| 0 | 3 | 0.50 | 0.333 |", "| 1 | 3 | 1.00 | 0.167 |", "| 2 | 2 | - | 0.000 |"]


def test_an_episode_is_not_valued_by_a_network_that_saw_it():
    generator = torch.Generator().manual_seed(1)
    outcomes = (torch.rand(40, generator=generator) < 0.5).tolist()
    features = [torch.randn(1, 200, generator=generator) for _ in outcomes]  # can only be memorised
    (known,) = (row[2] for row in rows(table(cross_fitted(features, outcomes, 0), outcomes, 1)))
    assert 0.2 < known < 0.8


def test_long_failures_do_not_raise_the_value_of_first_looks():
    generator = torch.Generator().manual_seed(2)
    outcomes = [index % 2 == 0 for index in range(80)]
    features = []
    for outcome in outcomes:
        seen = torch.randn(3 if outcome else 30, 2, generator=generator) * 0.1
        seen[1:, 0] += 3 if outcome else -3  # the first look tells nothing
        features.append(seen)
    values = cross_fitted(features, outcomes, 0)
    assert 0.35 < torch.stack([each[0] for each in values]).mean() < 0.65


def test_values_depend_on_the_seed_alone():
    features, outcomes = made(decided_at=1)
    torch.manual_seed(5)
    first = cross_fitted(features, outcomes, 3)
    state = torch.random.get_rng_state()
    assert all(map(torch.equal, first, cross_fitted(features, outcomes, 3)))
    assert torch.equal(torch.random.get_rng_state(), state), "others' random numbers are left alone"
    assert not all(map(torch.equal, first, cross_fitted(features, outcomes, 4)))
