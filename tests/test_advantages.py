"""Leave-one-out advantages against the two-line formula."""

import numpy as np
import pytest

from pi0.ript.advantages import leave_one_out_advantages


def reference(rewards):
    return [r - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, r in enumerate(rewards)]


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_equal_to_the_two_line_formula_to_the_last_bit(size):
    random = np.random.default_rng(size)
    for rewards in ([float(r) for r in random.integers(0, 2, size)], list(random.standard_normal(size))):
        assert leave_one_out_advantages(rewards) == reference(rewards)


def test_equal_to_the_scaled_difference_from_the_mean():
    rewards = np.random.default_rng(0).standard_normal(8)
    expected = (rewards - rewards.mean()) * 8 / 7
    assert np.allclose(leave_one_out_advantages(list(rewards)), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_unanimous_group_has_no_advantage_at_all(score):
    assert leave_one_out_advantages([score] * 8) == [0.0] * 8


def test_one_rollout_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages([1.0])
