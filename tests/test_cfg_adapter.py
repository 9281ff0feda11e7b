"""The training loss: what is weighted how, what never counts, and why pushing away stays bounded."""

import copy

import pytest
import torch

from pi0.data.chunks import Chunks
from pi0.model.network import NULL
from pi0.ript.cfg_adapter import NEGATIVE_CLIP, PI0_CFG_Adapter
from pi0.training.flow_loss import Augmentation, flow_loss
from tests.support.episodes import make_episode
from tests.support.new_policy import make_policy, seeded


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def guided():
    return make_policy(guidance=True)


EPISODES = [
    make_episode(True, [10, 10, 4], 0),
    make_episode(False, [10, 10], 1),
    make_episode(True, [10, 3], 2),
]


def test_weighted_loss_is_the_weighted_mean_of_per_chunk_losses(policy):
    adapter = PI0_CFG_Adapter(policy, noise_samples=2)
    advantages = [0.5, -1.0, 0.25]
    loss = adapter.compute_weighted_loss(EPISODES, advantages, seeded())
    chunks = Chunks.cat([Chunks.of(EPISODES[0]), Chunks.of(EPISODES[2])])
    each = flow_loss(policy, chunks, samples=2, generator=seeded()).double()
    weights = torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25], dtype=torch.float64)
    assert loss.item() == pytest.approx(((weights * each).sum() / weights.sum()).item(), rel=1e-5)


def test_flow_loss_is_the_plain_formula(policy):
    chunks = Chunks.of(EPISODES[0])
    ours = flow_loss(policy, chunks, samples=1, generator=seeded(3))
    inputs = policy.prepare({"images": chunks.images, "state": chunks.states, "prompt": chunks.prompts})
    held = chunks.actions.clone()
    held[2, 4:] = held[2, 3]  # four actions of the last chunk were carried out
    actions = policy.normalize_actions(held)
    noise, time = policy.draw_noise_and_time(actions, 1, seeded(3))
    each = policy(**inputs, actions=actions, noise=noise, time=time)[0, :, :, :7]
    expected = [each[i, : EPISODES[0].executed[i]].mean() for i in range(3)]
    assert torch.allclose(ours, torch.stack(expected), rtol=1e-5)


def test_actions_beyond_those_carried_out_never_count(policy):
    altered = copy.deepcopy(EPISODES)
    altered[0].actions[2, 4:] = 0.9
    altered[2].actions[1, 3:] = -0.9
    adapter = PI0_CFG_Adapter(policy)
    losses = [adapter.compute_weighted_loss(e, [1.0, 0.0, 1.0], seeded()).item() for e in (EPISODES, altered)]
    assert losses[0] == losses[1]
    altered[0].actions[2, 3] = 0.9
    assert adapter.compute_weighted_loss(altered, [1.0, 0.0, 1.0], seeded()).item() != losses[0]


def test_nothing_to_learn_is_a_zero_loss_with_a_gradient(policy):
    adapter = PI0_CFG_Adapter(policy)
    loss = adapter.compute_weighted_loss(EPISODES, [0.0, 0.0, 0.0], seeded())
    loss.backward()
    assert loss.item() == 0.0
    assert adapter.weigh(EPISODES, [0.0, -0.5, 0.0]) is None


def test_negative_advantages_push_away_in_proportion_to_their_weight(policy):
    advantages = [1.0, -0.5, 0.0]
    pull = PI0_CFG_Adapter(policy).compute_weighted_loss(EPISODES, advantages, seeded())
    adapter = PI0_CFG_Adapter(policy, negative_weight=0.4)
    batch = adapter.weigh(EPISODES, advantages)
    assert batch.weights.tolist() == pytest.approx([1.0] * 3 + [-0.2] * 2)
    assert adapter.minibatch_loss(batch, seeded()).item() < pull.item()


def test_pushing_away_is_bounded_and_an_unclipped_push_is_not():
    episodes = [make_episode(False, [10, 10], 5)]
    losses = {}
    for clipped in (True, False):
        policy = make_policy()
        adapter = PI0_CFG_Adapter(policy, negative_weight=1.0, noise_samples=2)
        batch = adapter.weigh(episodes, [-1.0])
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for step in range(40):
            if clipped:
                loss = adapter.minibatch_loss(batch, seeded(step))
            else:
                loss = -flow_loss(policy, batch.chunks, samples=2, generator=seeded(step)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            losses[clipped] = flow_loss(policy, batch.chunks, samples=8, generator=seeded()).mean().item()
    assert losses[True] < 3 * NEGATIVE_CLIP
    assert losses[False] > 3 * losses[True]


def test_guidance_learns_from_failures_too_with_a_share_of_their_weight(guided):
    adapter = PI0_CFG_Adapter(guided, mode="guidance", negative_weight=0.5)
    batch = adapter.weigh(EPISODES, [0.5, -0.5, 0.0])
    assert batch.weights.tolist() == [0.5] * 3 + [0.25] * 2
    assert batch.optimality.tolist() == [1, 1, 1, 2, 2]


def test_the_condition_is_left_out_for_the_configured_share(guided):
    optimality = torch.ones(4000, dtype=torch.int64)
    for share in (0.0, 0.3, 1.0):
        adapter = PI0_CFG_Adapter(guided, mode="guidance", condition_dropout=share)
        left_out = (adapter._conditions(optimality, seeded()) == NULL).float().mean().item()
        assert left_out == pytest.approx(share, abs=0.03)


def test_guidance_learns_to_tell_good_from_bad():
    policy = make_policy(guidance=True)
    good, bad = make_episode(True, [10] * 4, 7), make_episode(False, [10] * 4, 7)
    good.actions[:], bad.actions[:] = 0.8, -0.8  # same observations, opposite actions
    adapter = PI0_CFG_Adapter(
        policy, mode="guidance", condition_dropout=0.5, noise_samples=4, negative_weight=1.0
    )
    batch = adapter.weigh([good, bad], [0.5, -0.5])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for step in range(120):
        loss = adapter.minibatch_loss(batch, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    observations = {"images": good.images, "state": good.states, "prompt": ["pick up the black bowl"] * 4}
    noise = torch.randn(4, 10, 8, generator=seeded())
    unguided, guided = (
        policy.select_action(observations, noise, guidance_weight=weight).mean().item()
        for weight in (0.0, 1.0)
    )
    assert guided > unguided + 0.3
    assert guided > 0.5


def test_guidance_needs_a_policy_with_a_condition(policy):
    with pytest.raises(ValueError, match="optimality condition"):
        PI0_CFG_Adapter(policy, mode="guidance")


def test_minibatches_hold_every_chunk_once(policy):
    adapter = PI0_CFG_Adapter(policy)
    batch = adapter.weigh(EPISODES, [1.0, 0.5, 0.25])
    batch.weights = torch.arange(len(batch)).float()
    assert adapter.count_minibatches(batch, 3) == 3
    parts = list(adapter.minibatches(batch, 3, seeded()))
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(torch.cat([part.weights for part in parts]).tolist()) == list(range(7))


def test_shifted_images_keep_their_content():
    frames = torch.arange(64 * 64, dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 64, 64, 1)
    frames = frames.expand(5, 64, 64, 3)
    shifted = Augmentation(shift=4).images(frames, seeded())
    shifts = torch.randint(-4, 5, (5, 2), generator=seeded())
    for image, (down, right) in zip(shifted, shifts.tolist(), strict=True):
        inner = image[8:-8, 8:-8]
        assert torch.equal(inner, frames[0, 8 + down : 56 + down, 8 + right : 56 + right])
    assert torch.equal(Augmentation(shift=0).images(frames, seeded()), frames)
