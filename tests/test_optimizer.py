"""The optimizer moves what is trained, and its learning rate falls as configured."""

import pytest
import torch

from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.settings import OptimizerConfig


@pytest.mark.parametrize(
    ("kind", "made"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_any_module_is_optimized_as_configured_without_what_is_frozen(kind, made):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    module[0].requires_grad_(False)
    config = OptimizerConfig(type=kind, weight_decay=0.25, beta1=0.5, beta2=0.75)
    optimizer = make_optimizer(module, 0.125, config)
    (group,) = optimizer.param_groups
    assert type(optimizer) is made
    assert [id(weights) for weights in group["params"]] == [id(weights) for weights in module[1].parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    assert group["momentum"] == 0.5 if kind == "sgd" else group["betas"] == (0.5, 0.75)


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
