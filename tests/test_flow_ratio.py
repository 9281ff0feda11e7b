"""Mode `ratio`: the noisy flow, the probabilities of its steps, and the policy gradient they give."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.data.chunks import Chunks
from pi0.libero.environments import TRAINING
from pi0.policy.acting import ActingPolicy, NoisyPolicy
from pi0.policy.flow_sde import log_prob, step_mean, step_std
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import load_config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.flow_ratio import clipped_ratio_loss, noise_of, step_log_probs, trace
from pi0.ript.learner import acting_policies
from tests.support.episodes import make_episode
from tests.support.new_policy import make_policy, seeded

LEVEL = 0.5
EPISODES = [make_episode(True, [10, 10, 4], 0), make_episode(False, [10, 10], 1)]
ADVANTAGES = [0.5, -1.0]


@pytest.fixture(scope="module")
def policy():
    policy = make_policy()
    with torch.no_grad():  # a new head is zero, and so would be every velocity
        for parameter in policy.network.action_out_proj.parameters():
            parameter.normal_(std=0.1)
    return policy


def observations(episode):
    return episode.images, episode.states, [episode.prompt] * len(episode.states)


def reference_step(x, velocity, step, steps, level):
    """Mean and deviation as Flow-GRPO writes them, in float64; time runs from 1 to 0."""
    t, d = 1 - step / steps, 1 / steps
    sigma = level * np.sqrt(t / (1 - (t if step else 1 - d)))
    drift = velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)
    return x - drift * d, sigma * np.sqrt(d)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_steps_are_those_of_flow_grpo(steps):
    random = np.random.default_rng(0)
    x, velocity = random.standard_normal((2, 4, 3))
    for step in range(steps):
        mean, std = reference_step(x, velocity, step, steps, 0.7)
        given = torch.from_numpy(x), torch.from_numpy(velocity)
        for number in (step, torch.tensor(step, dtype=torch.float64)):
            np.testing.assert_allclose(step_mean(*given, number, steps, 0.7), mean, rtol=1e-12)
            np.testing.assert_allclose(step_std(number, steps, 0.7), std, rtol=1e-12)


def test_the_noisy_flow_has_the_marginals_of_the_flow():
    # Actions have mean 1.5 and deviation 0.4. Then x_t is Gaussian, and the best velocity is known.
    steps, level, count = 400, 0.7, 50_000
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=random, dtype=torch.float64)
    for step in range(steps):
        t = 1 - step / steps
        mean, variance = (1 - t) * 1.5, t**2 + (1 - t) ** 2 * 0.4**2
        # noise - actions given x_t, by the covariances of a Gaussian
        velocity = -1.5 + (t - (1 - t) * 0.4**2) / variance * (x - mean)
        x = step_mean(x, velocity, step, steps, level)
        x = x + step_std(step, steps, level) * torch.randn(count, generator=random, dtype=torch.float64)
        if step in (99, 199, steps - 1):
            t = 1 - (step + 1) / steps
            assert x.mean().item() == pytest.approx((1 - t) * 1.5, abs=0.02)
            assert x.std().item() == pytest.approx(np.hypot(t, (1 - t) * 0.4), rel=0.02)


def test_without_noise_the_policy_acts_as_ever_to_the_bit(policy):
    plain, noisy = ActingPolicy(policy), NoisyPolicy(policy, 0.0)
    seen = observations(EPISODES[0])
    drawn = np.stack([noisy.noise((7, look)) for look in range(3)])
    first = np.stack([plain.noise((7, look)) for look in range(3)])
    np.testing.assert_array_equal(drawn[:, 0], first)
    np.testing.assert_array_equal(noisy.act(*seen, drawn), plain.act(*seen, first))
    one = {camera: frames[:1] for camera, frames in seen[0].items()}, seen[1][:1], seen[2][:1]
    shared = noisy.act(*one, drawn[:, None])  # rollouts that look together
    np.testing.assert_array_equal(shared, plain.act(*one, first[:, None]))
    assert not np.array_equal(NoisyPolicy(policy, LEVEL).act(*seen, drawn), plain.act(*seen, first))


def test_what_is_traced_is_what_was_done(policy):
    episode, acting = EPISODES[0], NoisyPolicy(policy, LEVEL)
    noise = noise_of(policy, episode, LEVEL)
    done = acting.act(*observations(episode), noise.numpy())
    paths = trace(policy, Chunks.of(episode), noise, LEVEL)
    last = policy.unnormalize_actions(paths.points[:, -1], episode.states).clamp(-1, 1)
    np.testing.assert_allclose(last.numpy(), done, atol=1e-5)
    np.testing.assert_array_equal(paths.points[:, 0], noise[:, 0])


def test_log_probabilities_are_those_of_independent_gaussians_in_float64(policy):
    episode = EPISODES[0]
    chunks = Chunks.of(episode)
    paths = trace(policy, chunks, noise_of(policy, episode, LEVEL), LEVEL)
    inputs = policy.prepare({"images": chunks.images, "state": chunks.states, "prompt": chunks.prompts})
    steps = policy.config.num_steps
    for step in range(steps):
        before, after = paths.points[:, step], paths.points[:, step + 1].double().numpy()
        time = torch.full((len(chunks),), 1 - step / steps)
        # The loss of actions 0 and noise x_t / t at time t is (velocity - noise)^2; here the network itself is asked.
        prefix = policy.network.encode_prefix(*[inputs[name] for name in list(inputs) if name != "state"])
        velocity = policy.network.velocity(prefix, inputs["state"], before, time).detach().double().numpy()
        mean, std = reference_step(before.double().numpy(), velocity, step, steps, LEVEL)
        each = stats.norm.logpdf(after, mean, std)
        for row, executed in enumerate(episode.executed):
            expected = each[row, :executed, :7].sum()
            assert paths.log_probs[row, step].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_an_update_begins_with_ratio_1_and_the_plain_policy_gradient(policy):
    adapter = PI0_CFG_Adapter(policy, mode="ratio", noise_samples=policy.config.num_steps, noise_level=LEVEL)
    batch = adapter.weigh(EPISODES, ADVANTAGES)
    assert batch.weights.tolist() == [0.5] * 3 + [-1.0] * 2
    steps = torch.arange(policy.config.num_steps)[:, None].expand(-1, len(batch))
    now = step_log_probs(policy, batch.chunks, batch.paths.points, steps, LEVEL)
    torch.testing.assert_close((now - batch.paths.log_probs.T).exp(), torch.ones_like(now), atol=1e-3, rtol=0)

    gradients = []
    for loss in (
        adapter.minibatch_loss(batch, seeded()),
        -(now * batch.weights).sum() / batch.weights.abs().sum(),  # -sum(A grad log p)
    ):
        policy.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    policy.zero_grad(set_to_none=True)
    ours, plain = gradients
    assert plain.norm() > 0
    assert (ours - plain).norm() < 2e-3 * plain.norm()


def test_fewer_steps_of_each_chunk_give_the_same_loss_on_average(policy):
    batch = PI0_CFG_Adapter(policy, mode="ratio", noise_level=LEVEL).weigh(EPISODES[1:], ADVANTAGES[1:])
    batch.paths.log_probs += torch.linspace(-0.1, 0.1, batch.paths.log_probs.numel()).view_as(
        batch.paths.log_probs
    )

    def loss(samples: int, seed: int) -> float:
        adapter = PI0_CFG_Adapter(policy, mode="ratio", noise_samples=samples, noise_level=LEVEL)
        with torch.no_grad():
            return adapter.minibatch_loss(batch, seeded(seed)).item()

    whole = loss(policy.config.num_steps, 0)
    assert loss(50, 1) == pytest.approx(whole, rel=1e-6)  # more than there are
    some = np.array([loss(2, seed) for seed in range(60)])
    assert some.std() > 0
    assert some.mean() == pytest.approx(whole, abs=4 * some.std() / 60**0.5)


def test_the_clip_ends_the_push():
    acted = torch.zeros(6, dtype=torch.float64)
    log_probs = torch.tensor([0.1, 0.3, -0.3, 0.1, 0.3, -0.3], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1, 1, -2, -2, -2], dtype=torch.float64)
    losses = clipped_ratio_loss(log_probs, acted, advantages, 0.2)
    expected = [-np.exp(0.1), -1.2, -np.exp(-0.3), 2 * np.exp(0.1), 2 * np.exp(0.3), 2 * 0.8]
    np.testing.assert_allclose(losses.detach(), expected)
    losses.sum().backward()
    np.testing.assert_allclose(
        log_probs.grad, [-np.exp(0.1), 0, -np.exp(-0.3), 2 * np.exp(0.1), 2 * np.exp(0.3), 0]
    )


def test_the_gradient_on_a_bandit_is_the_known_one():
    # The velocity is -theta everywhere and the reward is the action, so the expected reward is linear in theta.
    steps, level, count = 5, 0.6, 400_000
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = np.zeros(2)  # action for theta 0 and 1
    for step in range(steps):
        expected, _ = reference_step(expected, -np.array([0.0, 1.0]), step, steps, level)
    known = expected[1] - expected[0]

    random = torch.Generator().manual_seed(0)
    points = [torch.randn(count, generator=random, dtype=torch.float64)]
    with torch.no_grad():
        for step in range(steps):
            noise = torch.randn(count, generator=random, dtype=torch.float64)
            mean = step_mean(points[-1], -theta.expand(count), step, steps, level)
            points.append(mean + step_std(step, steps, level) * noise)
    advantages = points[-1] - points[-1].mean()
    loss = torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        mean = step_mean(points[step], -theta.expand(count), step, steps, level)
        std = torch.tensor(step_std(step, steps, level), dtype=torch.float64)
        log_probs = log_prob(points[step + 1], mean, std)
        loss = loss + clipped_ratio_loss(log_probs, log_probs.detach(), advantages, 0.2).mean()
    (ours,) = torch.autograd.grad(loss, theta)
    assert known > 0.5
    assert -ours.item() == pytest.approx(known, rel=0.02)


def test_paths_stay_with_their_chunks(policy):
    adapter = PI0_CFG_Adapter(policy, mode="ratio", noise_level=LEVEL)
    batch = adapter.weigh(EPISODES, ADVANTAGES)
    nothing = WeightedChunks.empty(list(batch.chunks.images), 64, 10)
    whole = WeightedChunks.cat([nothing, batch])
    again = WeightedChunks.from_state(whole[torch.tensor([4, 1])].state_dict())
    for name, tensor in vars(again.paths).items():
        assert torch.equal(tensor, getattr(batch.paths, name)[[4, 1]])
    assert WeightedChunks.from_state(nothing.state_dict()).paths is None
    # A rank without chunks takes part in a pass, and adds nothing.
    loss = adapter.minibatch_loss(nothing, seeded(), divisor=torch.tensor(1.0))
    assert loss.item() == 0
    loss.backward()
    assert not any(p.grad.any() for p in policy.parameters() if p.grad is not None)
    policy.zero_grad(set_to_none=True)


# Real rollouts and runs -----------------------------------------------------------------------------------

SETTINGS = REPO_ROOT / "configs" / "minimal_test.yaml"


@pytest.mark.engine
def test_what_is_traced_is_what_real_rollouts_have_done():
    config = load_config(SETTINGS, ["algo.mode=ratio", "task.max_episode_length=30"])
    policy = PI0Policy.from_pretrained(REPO_ROOT / config.policy_path)
    learner = SimpleNamespace(average=SimpleNamespace(module=policy))
    scored, practising = acting_policies(config, learner)
    assert type(scored) is ActingPolicy
    with LIBEROEnvRunner(config.task, policy.config) as runner:
        (states,) = runner.training_states(2, 0)
        # Two that begin alike, which look together, and one that does not.
        starts = [(0, 0), (0, 1), (1, 0)]
        rollouts = [runner.rollout(states, index, (TRAINING, 0, 0, 0, 3, index, n)) for index, n in starts]
        episodes = dict(runner.run_policy_in_env(practising(0), rollouts))
    for episode in episodes.values():
        noise = noise_of(policy, episode, config.algo.noise_level)
        paths = trace(policy, Chunks.of(episode), noise, config.algo.noise_level)
        last = policy.unnormalize_actions(paths.points[:, -1], episode.states).clamp(-1, 1)
        np.testing.assert_allclose(last.numpy(), episode.actions, atol=1e-4)
    assert np.abs(episodes[0].actions[0] - episodes[1].actions[0]).max() > 1e-2


@pytest.mark.runs
@pytest.mark.parametrize(
    "script",
    [pytest.param("09_train_with_config.py", marks=pytest.mark.soak), "13_train_production_ready.py"],
)
def test_a_stage_practises_with_noise_and_says_how_far_the_policy_moved(script, tmp_path):
    command = [
        sys.executable, str(REPO_ROOT / "tests" / "support" / "short_practice.py"), script, "--config_path", str(SETTINGS),
        "--override", f"output_dir={tmp_path}", "algo.mode=ratio", "algo.ema_decay=0", "algo.num_epochs=3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("*/results.json")
    for row in json.loads(results.read_text())["history"]:
        assert row["updates"] > 0
        assert row["ratio_kl"] > 0
        assert 0 <= row["clipped_share"] < 1
