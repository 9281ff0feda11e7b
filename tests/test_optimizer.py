"""The learning rate falls as configured."""

import pytest
import torch

from pi0.training.optimizer import make_schedule


@pytest.mark.parametrize(("share", "iterations"), [(0.1, 5), (1.0, 4), (0.0, 3), (0.5, 1)])
def test_the_learning_rate_falls_in_equal_steps_to_its_share(share, iterations):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = make_schedule(optimizer, share, iterations)
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = torch.linspace(2.0, 2.0 * share, iterations) if iterations > 1 else torch.tensor([2.0])
    assert torch.allclose(torch.tensor(rates), expected)
