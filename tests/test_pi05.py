"""pi0.5's network against an independent float64 reference, and what sets it apart from pi0."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from pi0 import PI0Policy
from pi0.data.chunks import Chunks
from pi0.model.config import GemmaDims, Pi0Config, SiglipDims
from pi0.model.network import POSITIVE, AdaptiveRMSNorm, Pi0Network, RMSNorm, unit_rms
from pi0.policy.folder import file_name
from pi0.policy.normalization import NormStats
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.training.flow_loss import Augmentation
from tests.support.finite_differences import finite_difference
from tests.support.networks import chunks_of, inputs_of
from tests.support.pi05_reference import BATCH, CAMERAS, CONFIG, GOLDEN, STEPS, make


def small_policy(awake: bool = True, **changes) -> PI0Policy:
    """A few thousand parameters in float64; `awake` gives the adaptive norms weights, as training does."""
    config = Pi0Config(
        vision=SiglipDims(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=8, image_size=16),
        gemma=GemmaDims(width=24, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8),
        action_expert=GemmaDims(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8),
        vocab_size=32,
        action_dim=8,
        action_horizon=4,
        prompt_length=6,
        cameras=CAMERAS,
        tokenizer="tiny",
        pi05=True,
    )
    torch.manual_seed(0)
    policy = PI0Policy(dataclasses.replace(config, **changes)).double()
    if awake:
        for module in policy.modules():
            if isinstance(module, AdaptiveRMSNorm):
                torch.nn.init.normal_(module.dense.weight, std=0.3)
                torch.nn.init.normal_(module.dense.bias, std=0.3)
    return policy


def encode(policy: PI0Policy, inputs: dict):
    return policy.network.encode_prefix(
        inputs["images"], inputs["image_masks"], inputs["tokenized_prompt"], inputs["tokenized_prompt_mask"]
    )


@pytest.fixture(scope="module")
def golden():
    """A policy with the golden weights in each precision, its inputs, and the stored outputs."""
    stored = load_file(GOLDEN)
    config = Pi0Config.from_dict(CONFIG)

    def policy(dtype: torch.dtype) -> PI0Policy:
        made = PI0Policy(config).to(dtype)
        weights = {name: stored[f"weights.{file_name(name)}"].to(dtype) for name in made.network.state_dict()}
        made.network.load_state_dict(weights)
        return made

    def inputs(dtype: torch.dtype) -> dict:
        return {
            "images": {name: stored[f"images.{name}"].to(dtype) for name in CAMERAS},
            "image_masks": {name: stored[f"image_masks.{name}"] for name in CAMERAS},
            "state": torch.zeros(BATCH, config.action_dim, dtype=dtype),
            "tokenized_prompt": stored["tokenized_prompt"],
            "tokenized_prompt_mask": stored["tokenized_prompt_mask"],
            "noise": stored["noise"].to(dtype),
        }

    return policy, inputs, stored


# float64 is not exact: rotary angles are float32 in any precision, as they are in openpi.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_loss_is_the_references(golden, dtype, tolerance):
    policy, inputs, stored = golden
    with torch.no_grad():
        loss = policy(dtype)(
            **inputs(dtype), actions=stored["actions"].to(dtype), time=stored["time"].to(dtype)
        )
    torch.testing.assert_close(loss.double(), stored["expected_loss"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_sampled_actions_are_the_references(golden, dtype, tolerance):
    policy, inputs, stored = golden
    actions = policy(dtype).sample_actions(**inputs(dtype), num_steps=STEPS)
    torch.testing.assert_close(actions.double(), stored["expected_actions"], rtol=0, atol=tolerance)


def test_bfloat16_experts_stay_near_the_reference(golden):
    policy, inputs, stored = golden
    half = policy(torch.float32)
    low = half.network.low_precision_parameters()
    for name, parameter in half.network.named_parameters():
        if name in low:
            parameter.data = parameter.data.bfloat16()
    assert half.network.expert.layers[0].input_layernorm.dense.weight.dtype == torch.float32
    actions = half.sample_actions(**inputs(torch.float32), num_steps=STEPS)
    error = (actions.double() - stored["expected_actions"]).abs().max()
    assert error < 0.03 * stored["expected_actions"].abs().max()


def test_golden_file_is_what_the_reference_computes():
    stored = load_file(GOLDEN)
    again = make()
    assert set(stored) == set(again)
    for name, value in again.items():
        np.testing.assert_allclose(stored[name].numpy(), value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_parameters_have_the_published_names():
    stored = {key.removeprefix("weights.") for key in load_file(GOLDEN) if key.startswith("weights.")}
    network = Pi0Network(Pi0Config.from_dict(CONFIG))
    assert {file_name(name) for name, _ in network.named_parameters()} == stored
    names = {name for name, _ in network.named_parameters()}
    assert {"time_mlp_in.weight", "time_mlp_out.bias", "expert.norm.dense.weight"} <= names
    assert not [name for name in names if name.startswith(("state_proj", "action_time_mlp"))]


def test_published_preset_has_the_published_size():
    with torch.device("meta"):
        ours, pi0 = (Pi0Network(Pi0Config.preset(name)) for name in ("pi05", "pi0"))
    # 37 norms of 1024 -> 3 * 1024 in place of as many weights of 1024, and two square maps of time.
    norms = 37 * (1024 * 3072 + 3072)
    assert sum(p.numel() for p in ours.expert.parameters()) == 311_464_960 - 37 * 1024 + norms
    same = ("vision", "projector", "token_embedding", "gemma")
    for name in same:
        assert [p.shape for p in getattr(ours, name).parameters()] == [
            p.shape for p in getattr(pi0, name).parameters()
        ]
    config = ours.config
    assert (config.prompt_length, config.discrete_state_input, config.use_quantile_norm) == (200, True, True)


def test_adaptive_norm_without_weights_only_norms_and_closes_its_gate():
    norm = AdaptiveRMSNorm(8)
    torch.nn.init.zeros_(norm.dense.weight)
    torch.nn.init.zeros_(norm.dense.bias)
    x = torch.randn(2, 6, 8)
    h, gate = norm(x, torch.randn(2, 3, 8))
    assert torch.equal(h, RMSNorm(8)(x))
    assert torch.equal(gate, torch.zeros_like(x))


def test_adaptive_norm_scales_shifts_and_gates_in_this_order():
    norm = AdaptiveRMSNorm(2)
    with torch.no_grad():
        norm.dense.weight.zero_()
        norm.dense.weight[0, 0] = 0.5  # scale of feature 0 by half of the condition's
        norm.dense.bias.copy_(torch.tensor([0.0, 1.0, 10.0, 20.0, 0.25, 0.75]))
    x = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])  # two chunks of one token
    h, gate = norm(x, torch.tensor([[[2.0, 0.0], [4.0, 0.0]]]))
    torch.testing.assert_close(h, torch.tensor([[[12.0, 22.0], [13.0, 18.0]]]), rtol=0, atol=1e-5)
    assert gate.tolist() == [[[0.25, 0.75], [0.25, 0.75]]]


def test_new_network_passes_actions_through_its_layers_unchanged():
    policy = small_policy(awake=False)
    network, x_t = policy.network, chunks_of(policy, 2)
    velocity = network.velocity(encode(policy, inputs_of(policy)), None, x_t, torch.rand(2).double())
    expected = network.action_out_proj(unit_rms(network.action_in_proj(x_t)))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-14)


def test_state_reaches_the_network_through_the_prompt_alone():
    policy = small_policy()
    inputs, noise = inputs_of(policy), chunks_of(policy, 2)
    before = policy.sample_actions(**inputs, noise=noise)
    inputs["state"] = inputs["state"] + 1
    assert torch.equal(policy.sample_actions(**inputs, noise=noise), before)
    inputs["tokenized_prompt"] = (inputs["tokenized_prompt"] + 1) % 32
    assert not torch.allclose(policy.sample_actions(**inputs, noise=noise), before)


def test_blocks_of_the_suffix_mask_hold_no_state():
    network = small_policy(action_horizon=2).network
    valid = torch.tensor([[True, False]])  # the prefix's second token is padding
    one = network._suffix_mask(valid, samples=1, dtype=torch.float32)
    assert (one[0, 0] == 0).int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 1]]
    several = network._suffix_mask(valid, samples=2, dtype=torch.float32)
    assert (several.chunk[:, 0, 0] == 0).int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 1]]


def test_flow_time_acts_on_its_own_chunk_alone():
    policy = small_policy()
    prefix, x_t = encode(policy, inputs_of(policy)), chunks_of(policy, 4)
    t = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    with torch.no_grad():
        before = policy.network.velocity(prefix, None, x_t, t)
        t[2] = 0.9
        after = policy.network.velocity(prefix, None, x_t, t)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, True, False]


def test_several_draws_share_a_prefix():
    policy = small_policy()
    inputs, actions = inputs_of(policy), chunks_of(policy, 2)
    noise, time = chunks_of(policy, 3, 2, seed=7), torch.rand(3, 2).double()
    together = policy(**inputs, actions=actions, noise=noise, time=time)
    one_by_one = [
        policy(**inputs, actions=actions, noise=n, time=t) for n, t in zip(noise, time, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=0, atol=1e-12)


def test_padding_changes_nothing():
    policy = small_policy()
    inputs, noise = inputs_of(policy), chunks_of(policy, 2)
    before = policy.sample_actions(**inputs, noise=noise)
    inputs["tokenized_prompt"][~inputs["tokenized_prompt_mask"]] = 7
    assert torch.equal(policy.sample_actions(**inputs, noise=noise), before)


def test_every_trained_parameter_gets_a_gradient():
    # Distributed training waits for the gradient of each parameter that asks for one.
    for awake in (False, True):
        policy = small_policy(awake, guidance=True)
        actions = chunks_of(policy, 2)
        condition = torch.tensor([POSITIVE, 0])
        policy(**inputs_of(policy), actions=actions, condition=condition).mean().backward()
        assert [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None] == []


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for checkpointed in (False, True):
        policy = small_policy()
        if checkpointed:
            policy.network.checkpoint_gradients()
        noise, time = chunks_of(policy, 2, seed=9), torch.tensor([0.3, 0.8]).double()
        policy(**inputs_of(policy), actions=chunks_of(policy, 2), noise=noise, time=time).mean().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_are_finite_differences():
    policy = small_policy()
    inputs, actions = inputs_of(policy), chunks_of(policy, 2)
    noise, time = chunks_of(policy, 2, seed=9), torch.tensor([0.3, 0.8]).double()

    def loss() -> torch.Tensor:
        return policy(**inputs, actions=actions, noise=noise, time=time).mean()

    loss().backward()
    layer = policy.network.expert.layers[0]
    for parameter in (
        policy.network.time_mlp_in.weight,
        policy.network.expert.norm.dense.weight,
        layer.input_layernorm.dense.weight,
        layer.post_attention_layernorm.dense.bias,
        layer.self_attn["q_proj"].weight,
    ):
        index = len(parameter.view(-1)) - 3
        difference = finite_difference(loss, parameter.data.view(-1), index)
        assert parameter.grad.view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_checkpoint_comes_back(tmp_path):
    policy = PI0Policy(Pi0Config.preset("pi05_tiny", guidance=True))
    policy.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path)
    assert loaded.config == policy.config
    ours, theirs = policy.network.state_dict(), loaded.network.state_dict()
    assert save(ours) == save(theirs)


def test_file_that_says_pi05_alone_has_openpis_defaults():
    config = Pi0Config.from_dict({k: v for k, v in CONFIG.items() if k != "prompt_length"})
    assert (config.prompt_length, config.discrete_state_input, config.use_quantile_norm) == (200, True, True)
    explicit = Pi0Config.from_dict(CONFIG | {"discrete_state_input": False})
    assert (explicit.prompt_length, explicit.discrete_state_input) == (5, False)


def test_state_in_the_prompt_of_pi0_is_refused():
    with pytest.raises(ValueError, match="only pi0.5 reads the state from its prompt"):
        Pi0Config.preset("pi0_tiny", discrete_state_input=True)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_ript_lowers_the_loss_of_a_new_policy(mixed_precision):
    config = Pi0Config.preset("pi05_tiny", guidance=True)
    rng = np.random.default_rng(0)
    chunks = Chunks(
        {name: torch.from_numpy(rng.integers(0, 256, (8, 64, 64, 3), np.uint8)) for name in config.cameras},
        torch.from_numpy(rng.uniform(-1, 1, (8, 8)).astype(np.float32)),
        ["put the bowl on the plate"] * 8,
        torch.from_numpy(rng.uniform(-1, 1, (8, 1, 7)).astype(np.float32)).expand(8, 10, 7),
        torch.ones(8, 10, dtype=torch.bool),
    )
    torch.manual_seed(0)
    policy = PI0Policy(config, NormStats.of(chunks.states.numpy(), chunks.actions.numpy()))
    adapter = PI0_CFG_Adapter(
        policy, mode="guidance", augmentation=Augmentation(), mixed_precision=mixed_precision
    )
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    batch = WeightedChunks(chunks, torch.ones(8), torch.full((8,), POSITIVE))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(adapter.accumulate_gradient(batch, torch.Generator().manual_seed(1), 1))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
