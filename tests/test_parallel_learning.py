"""What `pi0.parallel` learns with: advantages, V-trace and the loss of PPO, each against loops in float64; the updates."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pi0.parallel.actor import Filled
from pi0.parallel.batches import explained_variance, make_batch
from pi0.parallel.config import Config
from pi0.parallel.network import ActorCritic
from pi0.parallel.policy import STACK, FramePolicy, shapes, views
from pi0.parallel.ppo import Batch, PPOAgent, PPOSettings, ppo_loss
from pi0.parallel.returns import gae, vtrace
from pi0.parallel.slices import Layout
from pi0.workers.arrays import arrays_in, nbytes

GAMMA, LAMBDA = 0.97, 0.9


# Advantages -----------------------------------------------------------------------------------------------


def made_slice(seed: int, steps: int = 60, ends: float = 0.15) -> dict[str, np.ndarray]:
    """A slice with episodes that were terminated, others that were truncated, and one that goes on."""
    random = np.random.default_rng(seed)
    ended = random.random(steps) < ends
    ended[-1] = seed % 2  # one slice ends with an episode, the next within one
    truncated = ended & (random.random(steps) < 0.5)
    return {
        "rewards": random.normal(size=steps).astype(np.float32),
        "values": random.normal(size=steps).astype(np.float32),
        "ended": ended.astype(np.uint8),
        "bootstraps": np.where(truncated, random.normal(5, 1, steps), 0).astype(np.float32),
        "last_value": float(random.normal()),
    }


def value_after(made: dict, step: int) -> float:
    """The value of what follows a step."""
    if made["ended"][step]:
        return float(made["bootstraps"][step])
    last = step == len(made["values"]) - 1
    return made["last_value"] if last else float(made["values"][step + 1])


def until_the_end(made: dict, step: int) -> range:
    """The steps from this one to the end of its episode or of the slice."""
    ends = np.flatnonzero(made["ended"][step:])
    return range(step, step + int(ends[0]) + 1 if len(ends) else len(made["values"]))


@pytest.mark.parametrize("seed", range(6))
def test_advantages_are_the_sum_of_discounted_errors_to_the_end_of_the_episode(seed):
    made = made_slice(seed)
    advantages, returns = gae(**made, gamma=GAMMA, gae_lambda=LAMBDA)
    expected = []
    for step in range(len(made["values"])):
        total = 0.0
        for later in until_the_end(made, step):
            error = (
                float(made["rewards"][later])
                + GAMMA * value_after(made, later)
                - float(made["values"][later])
            )
            total += (GAMMA * LAMBDA) ** (later - step) * error
        expected.append(total)
    assert advantages.dtype == returns.dtype == np.float32
    assert np.allclose(advantages, expected, atol=1e-5)
    assert np.allclose(returns, np.array(expected) + made["values"], atol=1e-5)


def test_a_truncated_episode_is_worth_its_bootstrap_and_a_terminated_one_nothing_more():
    one = {"rewards": np.ones(1, np.float32), "values": np.zeros(1, np.float32), "last_value": 100.0}
    for ended, bootstrap, expected in ((1, 0.0, 1.0), (1, 8.0, 5.0), (0, 0.0, 51.0)):
        made = {**one, "ended": np.array([ended], np.uint8), "bootstraps": np.array([bootstrap], np.float32)}
        assert gae(**made, gamma=0.5, gae_lambda=0.9)[1][0] == expected
        assert vtrace(**made, log_ratios=np.zeros(1), gamma=0.5)[1][0] == expected


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.0, 0.8), (math.inf, math.inf)])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_v_trace_is_the_explicit_sum_of_equation_1(limits, gae_lambda):
    for seed in range(4):
        made = made_slice(seed)
        log_ratios = np.random.default_rng(seed + 100).normal(0, 0.5, len(made["values"])).astype(np.float32)
        advantages, targets = vtrace(**made, log_ratios=log_ratios, gamma=GAMMA, gae_lambda=gae_lambda,
                                     rho_limit=limits[0], c_limit=limits[1])  # fmt: skip
        rho = [min(limits[0], math.exp(each)) for each in log_ratios]
        c = [gae_lambda * min(limits[1], math.exp(each)) for each in log_ratios]
        expected = []
        for step in range(len(made["values"])):
            target = float(made["values"][step])
            for later in until_the_end(made, step):
                error = float(made["rewards"][later]) + GAMMA * value_after(made, later)
                error -= float(made["values"][later])
                target += GAMMA ** (later - step) * math.prod(c[step:later]) * rho[later] * error
            expected.append(target)
        assert np.allclose(targets, expected, atol=1e-4)
        with_targets = {**made, "values": np.array(expected)}
        policy = [
            rho[step]
            * (made["rewards"][step] + GAMMA * value_after(with_targets, step) - float(made["values"][step]))
            for step in range(len(expected))
        ]
        assert np.allclose(advantages, policy, atol=1e-4)
        assert advantages.dtype == targets.dtype == np.float32


def test_on_policy_v_trace_is_the_n_step_return():
    for seed in range(4):
        made = made_slice(seed)
        _, targets = vtrace(**made, log_ratios=np.zeros(60, np.float32), gamma=GAMMA)
        expected = []
        for step in range(60):
            steps = until_the_end(made, step)
            rewards = sum(GAMMA ** (later - step) * float(made["rewards"][later]) for later in steps)
            expected.append(rewards + GAMMA ** len(steps) * value_after(made, steps[-1]))
        assert np.allclose(targets, expected, atol=1e-5)
        advantages, returns = gae(**made, gamma=GAMMA, gae_lambda=1.0)
        assert np.allclose(returns, expected, atol=1e-5), "and so are the returns of GAE with lambda 1"
        assert np.allclose(
            vtrace(**made, log_ratios=np.zeros(60, np.float32), gamma=GAMMA)[0], advantages, atol=1e-4
        )


# The loss -------------------------------------------------------------------------------------------------


def made_minibatch(seed: int = 0, size: int = 64, actions: int = 5) -> dict[str, torch.Tensor]:
    """Samples whose ratios are below, within and above the clip range, and whose values have moved as far."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=random)

    logits = normal(size, actions)
    chosen = torch.randint(actions, (size,), generator=random)
    logs = logits.log_softmax(-1)[torch.arange(size), chosen]
    values = normal(size)
    return {
        "logits": logits,
        "values": values,
        "actions": chosen,
        "log_probs": logs + normal(size, scale=0.2),
        "advantages": 3 + normal(size, scale=2.0),
        "returns": values + normal(size),
        "old_values": values + normal(size, scale=0.2),
        "weights": normal(size, scale=0.3).exp(),
    }


def test_the_loss_is_that_of_a_loop_over_samples():
    settings = PPOSettings(clip=0.1, entropy_weight=0.02, value_weight=0.7)
    made = made_minibatch()
    found = ppo_loss(**made, settings=settings)
    given = {name: tensor.double().tolist() for name, tensor in made.items()}
    size = len(given["values"])
    mean = sum(given["advantages"]) / size
    deviation = math.sqrt(sum((each - mean) ** 2 for each in given["advantages"]) / (size - 1))
    policy = value = entropy = kl = clipped = 0.0
    sides = set()
    for n in range(size):
        total = sum(math.exp(each) for each in given["logits"][n])
        logs = [each - math.log(total) for each in given["logits"][n]]
        log_ratio = logs[int(given["actions"][n])] - given["log_probs"][n]
        ratio = math.exp(log_ratio)
        advantage = (given["advantages"][n] - mean) / deviation
        limited = min(max(ratio, 0.9), 1.1)
        policy -= given["weights"][n] * min(ratio * advantage, limited * advantage) / size
        sides.add((ratio < 0.9, ratio > 1.1, advantage > 0))
        old, new, target = given["old_values"][n], given["values"][n], given["returns"][n]
        near = old + min(max(new - old, -0.1), 0.1)
        value += 0.5 * max((new - target) ** 2, (near - target) ** 2) / size
        entropy -= sum(math.exp(each) * each for each in logs) / size
        kl += (ratio - 1 - log_ratio) / size
        clipped += (abs(ratio - 1) > 0.1) / size
    assert len(sides) == 6, "below, within and above, each with both signs"
    names = ("policy", "value", "entropy", "kl", "clipped")
    expected = (policy, value, entropy, kl, clipped)
    for name, number in zip(names, expected, strict=True):
        assert float(getattr(found, name)) == pytest.approx(number, rel=1e-4, abs=1e-6), name
    assert float(found.total) == pytest.approx(policy - 0.02 * entropy + 0.7 * value, rel=1e-4)


def test_at_ratio_1_the_gradient_is_the_policy_gradient_with_importance_weights():
    made = made_minibatch()
    logits = made["logits"].requires_grad_()
    probabilities = logits.detach().double().softmax(-1)
    size = len(logits)
    made["log_probs"] = logits.detach().log_softmax(-1)[torch.arange(size), made["actions"]]
    made["old_values"] = made["values"].clone()
    values = made["values"].requires_grad_()
    loss = ppo_loss(**made, settings=PPOSettings(entropy_weight=0.0, value_weight=1.0))
    loss.total.backward()
    advantages = made["advantages"].double()
    advantages = (advantages - advantages.mean()) / advantages.std()
    chosen = torch.nn.functional.one_hot(made["actions"], logits.shape[1])
    expected = -(made["weights"].double() * advantages)[:, None] * (chosen - probabilities) / size
    assert torch.allclose(logits.grad.double(), expected, atol=1e-6)
    assert torch.allclose(values.grad, (values - made["returns"]).detach() / size, atol=1e-6)
    assert (float(loss.kl), float(loss.clipped)) == (pytest.approx(0, abs=1e-6), 0)


def test_beyond_the_clip_range_there_is_no_gradient_that_leads_further():
    made = made_minibatch(size=4, actions=2)
    logits = torch.zeros(4, 2, requires_grad=True)
    moved = torch.tensor([1.5, 1.5, 0.5, 0.5])  # ratios
    made |= {
        "logits": logits,
        "actions": torch.zeros(4, dtype=torch.int64),
        "log_probs": math.log(0.5) - moved.log(),
        "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0]),
    }
    ppo_loss(**made, settings=PPOSettings(entropy_weight=0.0, value_weight=0.0)).total.backward()
    assert (logits.grad[:, 0] != 0).tolist() == [False, True, True, False]


# The network ----------------------------------------------------------------------------------------------


def make_network(seed: int = 0, actions: int = 3, precision: torch.dtype = torch.float32) -> ActorCritic:
    torch.manual_seed(seed)
    return ActorCritic((actions,), precision)


def test_the_parameters_in_one_array_are_those_of_the_network():
    network = make_network(0)
    flat = network.flat()
    assert (flat.dtype, len(flat)) == (np.float32, sum(map(math.prod, shapes(3).values())))
    named = views(flat, 3)
    assert list(named) == list(shapes(3)) == [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        assert np.array_equal(named[name], parameter.detach().numpy()), name


def test_the_parts_of_an_action_are_chosen_independently():
    torch.manual_seed(0)
    network = ActorCritic((2, 3, 4))
    nn.init.normal_(network.actor.weight)
    stacks = random_frames(3)[torch.arange(3)[:, None].expand(3, STACK)]
    with torch.no_grad():
        logits, _ = network(stacks)
        of_parts = []
        network.actor.register_forward_hook(lambda *call: of_parts.append(call[2]))
        network(stacks)
    independent = [part.log_softmax(-1) for part in of_parts[0].split((2, 3, 4), -1)]
    found = logits.log_softmax(-1)
    for action in range(24):
        chosen = np.unravel_index(action, (2, 3, 4))
        expected = sum(part[:, choice] for part, choice in zip(independent, chosen, strict=True))
        assert torch.allclose(found[:, action], expected, atol=1e-5)
    policy = FramePolicy(24)
    policy.load(views(network.flat(), 24))
    for row in range(3):
        for number, frame in enumerate(stacks[row].numpy()):
            policy.show(frame, number)
        assert np.allclose(policy(STACK - 1)[0], logits[row].numpy(), atol=1e-3)


def test_the_array_is_a_copy():
    network = make_network()
    flat = network.flat()
    before = flat.copy()
    with torch.no_grad():
        network.actor.bias += 1
    assert np.array_equal(flat, before)
    flat[:] = 7
    assert not (network.flat() == 7).any()


def test_in_bfloat16_the_loss_is_close_to_that_in_float32():
    batch = made_batch(make_agent(), 64)
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        logits, values = make_network(precision=precision)(batch.frames[batch.stacks])
        assert logits.dtype == values.dtype == torch.float32
        names = ("actions", "log_probs", "advantages", "returns", "weights")
        made = {name: getattr(batch, name) for name in names}
        loss = ppo_loss(logits, values, **made, old_values=batch.values, settings=PPOSettings())
        losses.append([getattr(loss, name).item() for name in ("total", "policy", "value", "entropy")])
    assert losses[0] != losses[1]
    assert np.allclose(losses[0], losses[1], rtol=0.02, atol=0.01)


# Updates --------------------------------------------------------------------------------------------------


def random_frames(number: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (number, 84, 84)).astype(np.uint8))


def make_agent(seed: int = 0, lr: float = 1e-3, actions: int = 3, **settings) -> PPOAgent:
    generator = torch.Generator().manual_seed(seed)
    return PPOAgent(make_network(0, actions), PPOSettings(**settings), lr, generator)


def made_batch(agent: PPOAgent, size: int) -> Batch:
    """Transitions on random frames, with actions that the agent has just chosen."""
    frames, random = random_frames(size + STACK), torch.Generator().manual_seed(5)
    stacks = torch.arange(size)[:, None] + torch.arange(STACK)
    actions = torch.randint(3, (size,), generator=random)
    log_probs, values = (torch.from_numpy(each) for each in agent.evaluate(frames, stacks, actions))
    advantages = torch.randn(size, generator=random)
    weights = torch.ones(size)
    return Batch(frames, stacks, actions, log_probs, advantages, values + advantages, values, weights)


def test_an_update_takes_every_transition_once_an_epoch():
    agent = make_agent(epochs=2, minibatch=16)
    batch = made_batch(agent, 40)
    told: list[bool] = []
    metrics = agent.update(batch, between=told.append)
    assert told == [True] * 6, "16, 16 and 8, twice"
    assert (metrics["updates"], metrics["bad_updates"]) == (6, 0)
    assert all(math.isfinite(number) for number in metrics.values())
    assert metrics["kl"] > 0


def test_the_same_generator_gives_the_same_weights_and_another_one_others():
    flats = []
    for seed in (0, 0, 1):
        agent = make_agent(seed, epochs=2, minibatch=8)
        agent.update(made_batch(agent, 24))
        flats.append(agent.network.flat())
    assert np.array_equal(flats[0], flats[1])
    assert not np.array_equal(flats[0], flats[2])


def test_the_learning_rate_falls_with_the_share_of_training_that_is_left():
    moved = {}
    for share in (1.0, 0.25, 0.0):
        agent = make_agent(lr=1e-3, epochs=1, minibatch=16)
        before = agent.network.flat()
        agent.update(made_batch(agent, 16), share)
        assert [group["lr"] for group in agent.optimizer.param_groups] == [1e-3 * share]
        moved[share] = agent.network.flat() - before
    assert not moved[0.0].any()
    assert np.abs(moved[1.0]).max() == pytest.approx(1e-3, rel=0.05), "Adam's first step"
    assert np.allclose(moved[0.25], 0.25 * moved[1.0], atol=1e-6)


@pytest.mark.tried(
    "A gradient of `pi0.parallel` is not finite", "The weights stay as they are, and the update is counted"
)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(number):
    agent = make_agent(epochs=1, minibatch=16)
    batch = made_batch(agent, 48)
    agent.update(batch)
    order = torch.randperm(48, generator=torch.Generator().set_state(agent.generator.get_state()))
    bad = batch.returns.clone()
    bad[order[20]] = number  # one sample of the second minibatch
    told: list[tuple[bool, bool]] = []
    flats = [agent.network.flat()]

    def between(finite: bool) -> None:
        flats.append(agent.network.flat())
        told.append((finite, np.array_equal(*flats[-2:])))

    metrics = agent.update(replace(batch, returns=bad), between=between)
    assert told == [(True, False), (False, True), (True, False)]
    assert (metrics["updates"], metrics["bad_updates"]) == (2, 1)
    assert all(math.isfinite(number) for number in metrics.values()), "the bad one is in no mean"


def test_gradients_are_scaled_down_to_the_norm():
    agent = make_agent(epochs=1, minibatch=16, grad_norm=1e-3)
    batch = made_batch(agent, 16)
    agent.optimizer = torch.optim.SGD(agent.network.parameters(), lr=1.0)
    agent.lr = 1.0
    before = agent.network.flat()
    metrics = agent.update(batch)
    assert metrics["grad_norm"] > 1e-3
    assert np.linalg.norm((agent.network.flat() - before).astype(float)) == pytest.approx(1e-3, rel=0.02)


def test_what_is_raised_between_two_steps_ends_the_update():
    agent = make_agent(epochs=3, minibatch=8)
    steps = []

    def between(finite: bool) -> None:
        steps.append(finite)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agent.update(made_batch(agent, 24), between=between)
    assert len(steps) == 2


def test_evaluation_in_parts_is_that_of_the_network(monkeypatch):
    monkeypatch.setattr("pi0.parallel.ppo.EVALUATE_AT_ONCE", 7)
    agent = make_agent()
    batch = made_batch(agent, 20)
    with torch.no_grad():
        logits, values = agent.network(batch.frames[batch.stacks])
    logs, found = agent.evaluate(batch.frames, batch.stacks, batch.actions)
    assert np.allclose(logs, logits.log_softmax(-1)[torch.arange(20), batch.actions].numpy(), atol=1e-5)
    assert np.allclose(found, values.numpy(), atol=1e-5)
    logs, found_again = agent.evaluate(batch.frames, batch.stacks)
    assert not logs.any()
    assert np.array_equal(found_again, found)


def test_it_learns_which_action_suits_which_picture():
    agent = make_agent(lr=2e-3, actions=2, epochs=2, minibatch=32, clip=0.2)
    frames = torch.zeros(2, 84, 84, dtype=torch.uint8)
    frames[1, :, 42:] = 255
    random = torch.Generator().manual_seed(0)
    right = []
    for _ in range(14):
        pictures = torch.randint(2, (64,), generator=random)
        stacks = pictures[:, None].expand(64, STACK)
        with torch.no_grad():
            logits, values = agent.network(frames[stacks])
        actions = torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(-1)
        rewards = (actions == pictures).float()
        right.append(float(rewards.mean()))
        log_probs = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
        batch = Batch(frames, stacks, actions, log_probs, rewards - values, rewards, values, torch.ones(64))
        agent.update(batch)
    assert 0.3 < right[0] < 0.7
    assert np.mean(right[-3:]) > 0.9, right


# Batches --------------------------------------------------------------------------------------------------


def slices_of(layout: Layout, lengths: list[int]) -> tuple[list[Filled], dict[str, np.ndarray]]:
    """One slice of each worker, with numbers that were made up, rewards of many sizes among them."""
    arrays = arrays_in(bytearray(nbytes(layout.table)), layout.table)
    random = np.random.default_rng(1)
    arrays["frames"][:-1] = random.integers(0, 256, (len(arrays["frames"]) - 1, 84, 84))
    arrays["ages"][:] = random.integers(0, 4, arrays["ages"].shape)
    arrays["actions"][:] = random.integers(0, 3, arrays["actions"].shape)
    for name in ("values", "bootstraps", "last_values"):
        arrays[name][:] = random.normal(size=arrays[name].shape)
    arrays["log_probs"][:] = -random.random(arrays["log_probs"].shape)
    arrays["rewards"][:] = random.choice([-250.0, 0.0, 0.5, 100.0], arrays["rewards"].shape)
    arrays["ended"][:] = random.random(arrays["ended"].shape) < 0.2
    arrays["bootstraps"] *= arrays["ended"]
    filled = [Filled(worker, 0, 1, steps, 0, {}, ()) for worker, steps in enumerate(lengths)]
    return filled, arrays


@pytest.mark.parametrize("mode", ["sync", "overlap", "async"])
def test_a_batch_is_its_slices_one_after_another_with_the_signs_of_rewards(mode):
    layout = Layout(workers=3, buffers=2, steps=6, actions=3)
    slices, arrays = slices_of(layout, [6, 2, 5])
    agent, config = make_agent(), Config(mode=mode, gamma=GAMMA, gae_lambda=LAMBDA)
    batch = make_batch(slices, layout, arrays, agent, config)
    assert len(batch) == 13
    start = 0
    for filled in slices:
        worker, steps = filled.worker, filled.steps
        rows = slice(start, start + steps)
        made = {
            name: arrays[name][1, worker, :steps] for name in ("rewards", "values", "ended", "bootstraps")
        }
        made |= {"rewards": np.sign(made["rewards"]), "last_value": float(arrays["last_values"][1, worker])}
        stacks = layout.stacks(1, worker, arrays["ages"][1, worker, : steps + 1])
        assert np.array_equal(batch.stacks[rows], stacks[:-1])
        actions = arrays["actions"][1, worker, :steps]
        acted = log_probs = arrays["log_probs"][1, worker, :steps]
        if mode != "sync":  # values and log-probabilities are those of the present weights
            logs, values = agent.evaluate(
                batch.frames, torch.from_numpy(stacks), torch.from_numpy(np.append(actions, 0))
            )
            log_probs = logs[:-1]
            made |= {"values": values[:-1], "last_value": float(values[-1])}
        if mode == "async":
            expected = vtrace(**made, log_ratios=log_probs - acted, gamma=GAMMA, gae_lambda=LAMBDA)
        else:
            expected = gae(**made, gamma=GAMMA, gae_lambda=LAMBDA)
        weights = np.exp(log_probs - acted) if mode == "overlap" else np.ones(steps)
        assert np.allclose(batch.weights[rows], weights, rtol=1e-4)
        assert np.allclose(batch.log_probs[rows], log_probs, atol=1e-4)
        assert np.allclose(batch.advantages[rows], expected[0], atol=1e-4)
        assert np.allclose(batch.returns[rows], expected[1], atol=1e-4)
        assert np.allclose(batch.values[rows], made["values"], atol=1e-4)
        assert np.array_equal(batch.actions[rows], actions)
        start += steps


def test_shuffled_advantages_are_the_same_numbers_in_another_order():
    layout = Layout(workers=3, buffers=2, steps=20, actions=3)
    slices, arrays = slices_of(layout, [20, 20, 20])
    plain, shuffled = (
        make_batch(slices, layout, arrays, make_agent(), Config(mode="sync", shuffle_advantages=shuffle))
        for shuffle in (False, True)
    )
    assert not torch.equal(plain.advantages, shuffled.advantages)
    assert torch.equal(plain.advantages.sort().values, shuffled.advantages.sort().values)
    assert torch.equal(plain.returns, shuffled.returns)


def test_the_explained_variance_is_1_for_perfect_values_and_0_for_constant_ones():
    returns = torch.randn(50)
    for values, expected in ((returns, 1.0), (torch.full((50,), 3.0), 0.0)):
        assert explained_variance(SimpleNamespace(returns=returns, values=values)) == pytest.approx(
            expected, abs=1e-6
        )
    assert explained_variance(SimpleNamespace(returns=torch.ones(5), values=torch.zeros(5))) is None
