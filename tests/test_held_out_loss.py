"""The losses of benchmarks/held_out_loss.py; tests/test_commands.py runs it."""

import json
import math

import pytest
import torch

from benchmarks.held_out_loss import last_loss, losses, show
from pi0.data.chunks import Chunks
from pi0.training.flow_loss import flow_loss
from tests.support.episodes import make_episode
from tests.support.new_policy import make_policy, seeded

EPISODES = [make_episode(True, [10, 10, 4], 0), make_episode(True, [10, 7], 1)]


def test_policies_meet_the_same_noise_and_no_augmentation():
    policy = make_policy()
    found = losses(policy, EPISODES, draws=3)
    with torch.no_grad():
        expected = [
            flow_loss(policy, Chunks.of(episode), samples=3, generator=seeded(number)).mean()
            for number, episode in enumerate(EPISODES)
        ]
    assert found == pytest.approx([float(each) for each in expected], rel=1e-6)
    assert losses(policy.copy(), EPISODES, draws=3) == found


def test_a_policy_that_learned_the_episodes_has_a_lower_loss():
    before, after = make_policy(), make_policy()
    optimizer, generator = torch.optim.Adam(after.parameters(), lr=1e-3), seeded()
    for _ in range(20):
        loss = flow_loss(after, Chunks.of(EPISODES[0]), samples=4, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses(after, EPISODES[:1], draws=4)[0] < 0.9 * losses(before, EPISODES[:1], draws=4)[0]


def test_the_last_loss_is_of_the_last_iteration_that_updated(tmp_path):
    policy = tmp_path / "policy"
    assert last_loss(policy) == "-"
    (tmp_path / "results.json").write_text(json.dumps({"history": [{"loss": 0.5}, {"loss": 0.25}, {}]}))
    assert last_loss(policy) == "0.2500"


def test_a_mean_has_its_interval_and_nothing_has_a_dash():
    half = 12.706204736 * math.sqrt(2) / math.sqrt(2)  # Student's t for two values that are 2 apart
    assert show([1.0, 3.0]) == f"2.0000 ({2 - half:.4f} to {2 + half:.4f})"
    assert show([]) == "-"
