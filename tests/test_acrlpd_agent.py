"""The agent of `pi0.acrlpd` with a small actor: what its losses have gradients of, its steps and its averages."""

import copy

import pytest
import torch

from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent
from pi0.acrlpd.loss_functions import chunk_target
from pi0.policy.critics import CriticNetworks
from tests.support.small_actor import (
    ACTION_DIM,
    BATCH,
    CHUNK,
    REAL,
    STATE,
    SmallActor,
    StateFeatures,
    made_batch,
    make_agent,
)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first, second) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_best_of_n_is_the_one_of_highest_mean_value():
    agent, batch = make_agent(), made_batch()
    now = batch["observations"]
    candidates = agent.sample(now)
    assert candidates.shape == (5, BATCH, CHUNK, ACTION_DIM)
    best, values = agent.best_of(candidates, agent.critic_ema.observe(now["state"], now["state"]), now)
    for row in range(BATCH):
        alone = [
            float(
                agent.critic_ema(
                    now["state"][[row]], now["state"][[row]], candidates[s, [row], :, :REAL].clamp(-1, 1)
                )
                .mean()
                .detach()
            )
            for s in range(5)
        ]
        assert values[:, row].tolist() == pytest.approx(alone, abs=1e-5)
        assert best[row] == max(range(5), key=lambda s: alone[s])


def test_one_sample_is_plain_sampling():
    agent, batch = make_agent(samples=1), made_batch()
    now = batch["observations"]
    twin = torch.Generator().manual_seed(0)
    noise = torch.randn(1, BATCH, CHUNK, ACTION_DIM, generator=twin)
    assert torch.equal(agent.sample(now), agent.pi0_model.sample(now, noise))


def test_a_chunk_beyond_the_range_is_valued_as_it_would_be_carried_out():
    agent, batch = make_agent(), made_batch()
    now = batch["observations"]
    actions = 5 * torch.ones(BATCH, CHUNK, ACTION_DIM)
    assert torch.equal(agent.valued(actions, now), torch.ones(BATCH, CHUNK, REAL))


def test_the_critic_loss_is_that_of_its_definition():
    agent, batch = make_agent(aggregation="mean", value_range=(-1.0, 1.0)), made_batch()
    for parameter in agent.critic_networks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the target critics and the averages stay as they were
    twin = copy.deepcopy(agent)
    loss, info = agent.compute_critic_loss(batch)
    then = batch["next_observations"]
    candidates = twin.sample(then)
    clipped = candidates[..., :REAL].clamp(-1, 1)
    state = then["state"]
    with torch.no_grad():
        chosen = torch.stack(
            [
                max(
                    (clipped[s, b] for s in range(5)),
                    key=lambda chunk, b=b: float(twin.critic_ema(state[[b]], state[[b]], chunk[None]).mean()),
                )
                for b in range(BATCH)
            ]
        )
        next_values = twin.target_critic(state, state, chosen).mean(0)
        targets = chunk_target(
            batch["rewards"], batch["masks"], batch["valid"], next_values, 0.99, (-1.0, 1.0)
        )
        now = batch["observations"]["state"]
        values = twin.critic_networks(now, now, batch["actions"][..., :REAL].clamp(-1, 1))
    known = batch["sequence_mask"]
    assert loss.item() == pytest.approx((values - targets).square()[:, known].mean().item(), rel=1e-5)
    assert info["known"] == pytest.approx(known.float().mean().item())


def test_the_actor_loss_is_that_of_its_definition():
    agent, batch = make_agent(temperature=0.05, best_weight=0.7), made_batch()
    for parameter in agent.critic_ema.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin = copy.deepcopy(agent)
    loss, info = agent.compute_actor_loss(batch)
    now, state = batch["observations"], batch["observations"]["state"]

    candidates = twin.sample(now)
    with torch.no_grad():
        taken = twin.critic_ema(state, state, batch["actions"][..., :REAL].clamp(-1, 1)).mean(0).double()
        values = torch.stack(
            [twin.critic_ema(state, state, each[..., :REAL].clamp(-1, 1)).mean(0) for each in candidates]
        ).double()
    advantages = taken - values.mean(0)
    weights = (advantages / agent.log_temperature.exp().item()).exp()
    weights = weights / weights.mean()
    best = torch.stack([candidates[int(values[:, b].argmax()), b] for b in range(BATCH)])
    chunks = torch.stack([batch["actions"], best])
    valid = torch.stack([batch["valid"], torch.ones(BATCH, CHUNK)])
    flow, of_best = twin.pi0_model.flow_loss(now, chunks, valid, twin.generator, 4).detach().double()
    distilled = of_best.mean().item()
    weighted = (weights * flow).mean().item()
    assert info["weighted_loss"] == pytest.approx(weighted, rel=1e-4)
    assert info["best_loss"] == pytest.approx(distilled, rel=1e-4)
    assert loss.item() == pytest.approx(weighted + 0.7 * distilled, rel=1e-4)
    assert info["sample_size"] < BATCH


def test_only_what_a_loss_is_of_gets_its_gradient():
    agent, batch = make_agent(), made_batch()
    for loss, learns, stays in (
        (agent.compute_critic_loss, agent.critic_networks, agent.pi0_model),
        (agent.compute_actor_loss, agent.pi0_model, agent.critic_networks),
        (agent.compute_bc_loss, agent.pi0_model, agent.critic_networks),
    ):
        for module in (agent.pi0_model, agent.critic_networks):
            module.zero_grad()
        loss(batch)[0].backward()
        assert all(parameter.grad is not None for parameter in learns.parameters())
        assert all(parameter.grad is None for parameter in stays.parameters())
    for module in (agent.target_critic, agent.critic_ema, agent.pi0_ema):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_loss_whose_weight_is_0_is_not_computed():
    agent, batch = make_agent(awr_weight=0.0), made_batch()
    agent.bc_loss_weight = 0.0
    given = []
    learn = agent.pi0_model.flow_loss
    agent.pi0_model.flow_loss = lambda observations, actions, *rest: (
        given.append(actions) or learn(observations, actions, *rest)
    )
    loss, info = agent.compute_loss(batch)
    (chunks,) = given
    assert chunks.shape == (1, BATCH, CHUNK, ACTION_DIM)
    assert not torch.equal(chunks[0], batch["actions"])
    assert loss.item() == pytest.approx(info["critic_loss"] + info["best_loss"], rel=1e-5) == info["loss"]
    assert not {"weighted_loss", "bc_loss"} & set(info)


def test_cloning_alone_asks_the_critics_nothing_and_still_moves_the_actor():
    agent, batch = make_agent(awr_weight=0.0, best_weight=0.0), made_batch()
    agent.bc_loss_weight = 1.0
    sampled = []
    sample = agent.pi0_ema.sample
    agent.pi0_ema.sample = lambda seen, noise: sampled.append(len(noise)) or sample(seen, noise)
    before = weights(agent.pi0_model)
    info = agent.train_step(batch)[1]
    assert sampled == [5]  # for the targets
    assert info["loss"] == pytest.approx(info["critic_loss"] + info["bc_loss"])
    assert not same(before, weights(agent.pi0_model))
    assert "actor_loss" not in info


def test_failures_are_not_cloned():
    batch = made_batch()
    agent = make_agent()
    first = agent.compute_bc_loss(batch)[0].item()
    other = {**batch, "actions": torch.where(batch["success"][:, None, None], batch["actions"], 9.0)}
    agent.generator.manual_seed(0)
    assert agent.compute_bc_loss(other)[0].item() == pytest.approx(first)
    none = agent.compute_bc_loss({**batch, "success": torch.zeros(BATCH, dtype=torch.bool)})[0]
    none.backward()
    assert none.item() == 0
    assert not any(parameter.grad.any() for parameter in agent.pi0_model.parameters())


def test_a_step_says_what_the_losses_say_and_moves_all_that_learns():
    agent, batch = make_agent(learned_temperature=True), made_batch()
    before = [weights(module) for module in (agent.pi0_model, agent.critic_networks)]
    told = copy.deepcopy(agent).compute_loss(batch)[1]
    back, info = agent.train_step(batch)
    assert back is agent
    assert {name: info[name] for name in told} == pytest.approx(told)
    assert not same(before[0], weights(agent.pi0_model))
    assert not same(before[1], weights(agent.critic_networks))
    assert agent.log_temperature.item() != pytest.approx(torch.tensor(0.1).log().item())


def test_targets_and_averages_after_three_steps_are_those_by_hand():
    agent, batch = make_agent(), made_batch()
    target, average, actor = (weights(m) for m in (agent.target_critic, agent.critic_ema, agent.pi0_ema))
    for _ in range(3):
        agent.train_step(batch)
        for slow, fast, share in (
            (target, agent.critic_networks, 0.005),
            (average, agent.critic_networks, 0.01),
            (actor, agent.pi0_model, 0.001),
        ):
            for number, weight in enumerate(weights(fast)):
                slow[number] = (1 - share) * slow[number].double() + share * weight.double()
    for slow, module in ((target, agent.target_critic), (average, agent.critic_ema), (actor, agent.pi0_ema)):
        for expected, found in zip(slow, weights(module), strict=True):
            assert torch.allclose(found.double(), expected.double(), atol=1e-6)


def test_a_critic_step_leaves_the_actor_as_it_was():
    agent, batch = make_agent(), made_batch()
    before = weights(agent.pi0_model), weights(agent.pi0_ema)
    agent.critic_step(batch)
    assert same(before[0], weights(agent.pi0_model))
    assert same(before[1], weights(agent.pi0_ema))


def test_a_gradient_that_is_not_finite_changes_nothing():
    agent, batch = make_agent(), made_batch()
    bad = {**batch, "rewards": batch["rewards"] * float("nan")}
    before = [weights(m) for m in (agent.pi0_model, agent.critic_networks, agent.target_critic)]
    with pytest.raises(FloatingPointError, match="critic_grad_norm not finite"):
        agent.train_step(bad)
    after = [weights(m) for m in (agent.pi0_model, agent.critic_networks, agent.target_critic)]
    assert all(map(same, before, after))


def test_kept_features_and_candidates_give_the_same_losses():
    agent, batch = make_agent(), made_batch()
    twin = copy.deepcopy(agent)
    candidates = twin.sample(batch["next_observations"])
    fresh = agent.compute_critic_loss(batch)[0]
    kept = {
        **batch,
        "next_candidates": candidates,
        "features": batch["observations"]["state"],
        "next_features": batch["next_observations"]["state"],
    }
    assert torch.equal(twin.compute_critic_loss(kept)[0], fresh)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_action_samples": 0}, "num_action_samples is 0"),
        ({"discount": 1.5}, "discount is 1.5"),
        ({"horizon_length": 9}, "chunks have 4 actions"),
        ({"real_action_dim": 1}, "critics value 4 actions of 2 features"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, said):
    critics = CriticNetworks(STATE, STATE, CHUNK, REAL)
    given = {"num_action_samples": 2, "horizon_length": CHUNK, "real_action_dim": REAL} | changes
    with pytest.raises(ValueError, match=said):
        ACRLPDPi0Agent(SmallActor(), critics, StateFeatures(), **given)


def layer_norm_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_critics_are_mlps_that_see_the_chunk_at_every_layer():
    """Against each critic by itself in float64, with one weight matrix a layer and the inputs joined."""
    torch.manual_seed(3)
    critics = CriticNetworks(5, 3, CHUNK, REAL, critics=3, hidden=7, layers=3)
    with torch.no_grad():
        for weight in critics.parameters():  # also of those that begin as 0 or 1
            weight.copy_(torch.randn_like(weight))
    features, state, chunks = torch.randn(6, 5), torch.randn(6, 3), torch.randn(4, 6, CHUNK, REAL)
    found = critics.values(critics.observe(features, state), chunks)
    w = {name: tensor.detach().double() for name, tensor in critics.named_parameters()}
    seen = layer_norm_of(features.double()) * w["feature_norm.weight"] + w["feature_norm.bias"]
    seen = torch.cat([seen, state.double()], 1)
    for k in range(3):
        for sample in range(4):
            chunk = chunks[sample].flatten(1).double()
            x = seen @ w["observation.weight"][k] + w["observation.bias"][k]
            x = x + chunk @ w["chunk.weight"][k] + w["chunk.bias"][k]
            for layer in range(3):
                if layer:
                    name = f"later.{layer - 1}"
                    x = torch.cat([x, chunk], 1) @ w[f"{name}.weight"][k] + w[f"{name}.bias"][k]
                x = layer_norm_of(x) * w[f"norms.{layer}.scale"][k] + w[f"norms.{layer}.shift"][k]
                x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
            value = torch.cat([x, chunk], 1) @ w["value.weight"][k] + w["value.bias"][k]
            torch.testing.assert_close(found[k, sample].double(), value[:, 0], rtol=1e-4, atol=1e-4)


def standard_train_step(agent: ACRLPDPi0Agent, batch: dict) -> tuple[ACRLPDPi0Agent, dict]:
    """The user's sketch of a step, whose state is the agent itself."""
    agent, info = agent.train_step(batch)
    return agent, {**info, "step_loss": info["critic_loss"] + info["actor_loss"]}


def test_the_sketched_step_moves_the_state_in_place():
    agent, batch = make_agent(learned_temperature=True), made_batch()
    state = agent.to_train_state(step=3, epoch=1)
    assert list(state) == [
        "pi0_params", "pi0_ema_params", "critic_params", "critic_ema_params", "target_critic_params",
        "pi0_opt_state", "critic_opt_state", "temp_opt_state", "step", "epoch",
    ]  # fmt: skip
    before = copy.deepcopy(state)
    moved, info = standard_train_step(agent, batch)
    assert moved is agent
    assert info["step_loss"] == pytest.approx(info["critic_loss"] + info["actor_loss"])
    for name in (
        "pi0_params",
        "pi0_ema_params",
        "critic_params",
        "critic_ema_params",
        "target_critic_params",
    ):
        changed = [not torch.equal(state[name][key], before[name][key]) for key in state[name]]
        assert any(changed), name
    assert before["pi0_opt_state"]["state"] == {} and len(agent.to_train_state()["pi0_opt_state"]["state"])


def test_openpis_training_state_is_of_the_actor_alone():
    agent = make_agent()
    state = agent.create_openpi_train_state(step=7)
    assert list(state) == ["step", "params", "opt_state", "ema_decay", "ema_params"]
    assert (state["step"], state["ema_decay"]) == (7, 0.999)
    for name, module in (("params", agent.pi0_model), ("ema_params", agent.pi0_ema)):
        assert state[name].keys() == module.state_dict().keys()
        assert same(state[name].values(), module.state_dict().values())


def test_a_train_state_holds_the_parts_of_a_checkpoint():
    state = make_agent().create_train_state(step=2)
    assert state.can_be_saved and state.step == 2
    assert set(state.shared) == set(make_agent().to_train_state()) - {"step", "epoch"}


def test_the_average_of_a_bfloat16_actor_moves():
    agent = make_agent()
    actor, critics = agent.pi0_model.bfloat16(), agent.critic_networks
    coarse = ACRLPDPi0Agent(actor, critics, agent.features, 2, CHUNK, REAL)
    before = weights(coarse.pi0_ema)
    assert {weight.dtype for weight in before} == {torch.float32}
    with torch.no_grad():
        for weight in actor.parameters():
            weight *= 1.01
    coarse.update_ema_parameters()
    for old, new, now in zip(before, weights(coarse.pi0_ema), weights(actor), strict=True):
        expected = old.double() + 0.001 * (now.double() - old.double())
        assert torch.allclose(new.double(), expected, atol=1e-7)
    assert not same(before, weights(coarse.pi0_ema))
