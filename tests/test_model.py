"""The network against published outputs, against a joint-attention reference, and against finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pi0 import PI0Policy
from pi0.model.config import ConvDims, GemmaDims, Pi0Config
from pi0.model.network import NULL, POSITIVE, Pi0Network, rotary_angles, rotate, time_embedding
from pi0.model.vision import ConvTower
from tests.support.finite_differences import finite_difference
from tests.support.networks import REFERENCE, random_actions, random_inputs, small_config


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE.is_dir():
        pytest.skip(f"reference outputs are not at {REFERENCE}")
    stored = load_file(REFERENCE / "io.safetensors")
    inputs = {name: stored[name] for name in ("state", "tokenized_prompt", "tokenized_prompt_mask", "noise")}
    for part in ("images", "image_masks"):
        inputs[part] = {
            key.removeprefix(part + "."): value for key, value in stored.items() if key.startswith(part + ".")
        }
    inputs["images"] = {name: image.float() / 255 * 2 - 1 for name, image in inputs["images"].items()}
    return PI0Policy.from_pretrained(REFERENCE), inputs, stored


def test_loss_is_that_of_openpi(reference):
    policy, inputs, stored = reference
    loss = policy.forward(**inputs, actions=stored["actions"], time=stored["time"])
    torch.testing.assert_close(loss, stored["expected_loss"], rtol=1e-5, atol=1e-5)


def test_sampled_actions_are_those_of_openpi(reference):
    policy, inputs, stored = reference
    actions = policy.sample_actions(**inputs, num_steps=10)
    torch.testing.assert_close(actions, stored["expected_actions"], rtol=0, atol=1e-4)


def test_bfloat16_stays_near_openpi(reference):
    _, inputs, stored = reference
    policy = PI0Policy.from_pretrained(REFERENCE, dtype=torch.bfloat16)
    assert policy.network.expert.layers[0].mlp["up_proj"].weight.dtype == torch.bfloat16
    loss = policy.forward(**inputs, actions=stored["actions"], time=stored["time"])
    actions = policy.sample_actions(**inputs, num_steps=10)
    # bfloat16 rounds to one part in 256.
    assert (loss - stored["expected_loss"]).abs().max() < 0.01 * stored["expected_loss"].max()
    assert (actions - stored["expected_actions"]).abs().max() < 0.01 * stored["expected_actions"].abs().max()


def test_gradients_are_finite_differences():
    config = small_config(guidance=True)
    torch.manual_seed(0)
    policy = PI0Policy(config).double()
    inputs = random_inputs(config, 2, torch.float64) | random_actions(config, 2, torch.float64)
    condition = torch.tensor([POSITIVE, NULL])

    def loss() -> torch.Tensor:
        return policy.forward(**inputs, condition=condition).mean()

    loss().backward()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    pick = torch.Generator().manual_seed(3)
    for name, parameter in trained.items():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        index = torch.randint(len(flat), (1,), generator=pick).item()
        if name.endswith("token_embedding.weight"):
            index = inputs["tokenized_prompt"][1, 0].item() * config.gemma.width
        difference = finite_difference(loss, flat, index)
        assert gradient[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize(
    "name",
    [
        "vision.embeddings.patch_embedding.weight",
        "vision.encoder.layers.0.self_attn.v_proj.weight",
        "projector.weight",
        "gemma.layers.0.self_attn.q_proj.weight",
        "gemma.layers.2.self_attn.k_proj.weight",
        "expert.layers.0.input_layernorm.weight",
        "expert.layers.1.mlp.gate_proj.weight",
        "state_proj.weight",
        "action_time_mlp_in.weight",
        "action_out_proj.bias",
    ],
)
def test_gradients_of_the_reference_are_finite_differences(reference, name):
    _, inputs, stored = reference

    def in_type(dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """The parameter called `name`, and the loss."""
        policy = PI0Policy.from_pretrained(REFERENCE).to(dtype)
        seen = {**inputs, "actions": stored["actions"].to(dtype), "time": stored["time"].to(dtype)}
        seen |= {part: inputs[part].to(dtype) for part in ("state", "noise")}
        seen["images"] = {camera: image.to(dtype) for camera, image in inputs["images"].items()}
        return policy.network.get_parameter(name), lambda: policy.forward(**seen).mean()

    parameter, loss = in_type(torch.float64)
    (gradient,) = torch.autograd.grad(loss(), parameter)
    index = gradient.abs().argmax().item()
    difference = finite_difference(loss, parameter.data.view(-1), index)
    assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-6)
    parameter, loss = in_type(torch.float32)
    (gradient,) = torch.autograd.grad(loss(), parameter)
    assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-4)


def joint_velocity(network: Pi0Network, inputs: dict, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The published formulation: all tokens in one sequence, both experts in one attention, one big mask."""
    config = network.config
    cameras, heads = config.cameras, config.gemma.num_heads
    image_tokens = network.vision([inputs["images"][name] for name in cameras])
    prefix = [network.projector(tokens) for tokens in image_tokens]
    prefix.append(network.token_embedding(inputs["tokenized_prompt"]) * math.sqrt(config.gemma.width))
    valid = [inputs["image_masks"][n][:, None].expand(-1, network.vision.tokens) for n in cameras]
    valid = torch.cat([*valid, inputs["tokenized_prompt_mask"]], 1)
    mixed = torch.cat(
        [network.action_in_proj(x_t), time_embedding(t, 16)[:, None].expand(-1, config.action_horizon, -1)],
        -1,
    )
    mixed = network.action_time_mlp_out(F.silu(network.action_time_mlp_in(mixed)))
    streams = [torch.cat(prefix, 1), torch.cat([network.state_proj(inputs["state"])[:, None], mixed], 1)]
    length = streams[0].shape[1]
    valid = torch.cat([valid, valid.new_ones(len(x_t), streams[1].shape[1])], 1)
    block = torch.tensor([0] * length + [1] + [2] * config.action_horizon)
    allowed = (block[None, :] <= block[:, None]) & valid[:, None, :] & valid[:, :, None]
    rope = rotary_angles(valid.cumsum(1) - 1, config.gemma.head_dim)
    experts = [network.gemma, network.expert]
    for layers in zip(experts[0].layers, experts[1].layers, strict=True):
        normed = [layer.input_layernorm(x) for layer, x in zip(layers, streams, strict=True)]
        q, k, v = (
            torch.cat([layer.self_attn[name](h) for layer, h in zip(layers, normed, strict=True)], 1)
            .unflatten(-1, (-1, config.gemma.head_dim))
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (rotate(k, rope), v))
        scores = rotate(q, rope) @ k.transpose(-1, -2) / math.sqrt(config.gemma.head_dim)
        weights = scores.masked_fill(~allowed[:, None], -2.3819763e38).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2).split([length, len(block) - length], 1)
        for i, layer in enumerate(layers):
            x = streams[i] + layer.self_attn["o_proj"](attended[i])
            h = layer.post_attention_layernorm(x)
            h = F.gelu(layer.mlp["gate_proj"](h), approximate="tanh") * layer.mlp["up_proj"](h)
            streams[i] = x + layer.mlp["down_proj"](h)
    return network.action_out_proj(network.expert.norm(streams[1][:, 1:]))


def test_cached_prefix_equals_joint_attention():
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config).double()
    inputs = random_inputs(config, 3, torch.float64)
    noise = random_actions(config, 3, torch.float64)["noise"]
    cached = policy.sample_actions(**inputs, noise=noise, num_steps=4)
    x = noise
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - joint_velocity(policy.network, inputs, x, torch.full((3,), t, dtype=torch.float64)) / 4
    torch.testing.assert_close(cached, x, rtol=0, atol=1e-12)


def test_several_draws_share_a_prefix():
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config).double()
    inputs = random_inputs(config, 2, torch.float64)
    actions = torch.randn(2, 5, 8, dtype=torch.float64)
    noise, time = policy.draw_noise_and_time(actions, samples=3)
    together = policy.forward(**inputs, actions=actions, noise=noise, time=time)
    one_by_one = [
        policy.forward(**inputs, actions=actions, noise=n, time=t) for n, t in zip(noise, time, strict=True)
    ]
    assert together.shape == (3, 2, 5, 8)
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=0, atol=1e-12)


def test_padding_and_hidden_cameras_change_nothing():
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config).double()
    inputs = random_inputs(config, 2, torch.float64)
    noise = random_actions(config, 2, torch.float64)["noise"]
    before = policy.sample_actions(**inputs, noise=noise)
    inputs["tokenized_prompt"][~inputs["tokenized_prompt_mask"]] = 7
    inputs["images"]["left_wrist_0_rgb"][0] = 0.5
    torch.testing.assert_close(policy.sample_actions(**inputs, noise=noise), before, rtol=0, atol=0)
    inputs["images"]["base_0_rgb"][0] = 0.5
    assert not torch.allclose(policy.sample_actions(**inputs, noise=noise), before)


def test_rows_do_not_depend_on_their_companions():
    config = Pi0Config.preset("pi0_tiny")
    torch.manual_seed(0)
    policy = PI0Policy(config)
    inputs, noise = random_inputs(config, 4), random_actions(config, 4)["noise"]
    before = policy.sample_actions(**inputs, noise=noise)
    other = random_inputs(config, 4, seed=9)
    for name in config.cameras:
        inputs["images"][name][1:] = other["images"][name][1:]
    inputs["state"][1:] = other["state"][1:]
    inputs["tokenized_prompt"][1:] = other["tokenized_prompt"][1:]
    after = policy.sample_actions(**inputs, noise=noise)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1:], before[1:])


def allowed(mask: torch.Tensor) -> list:
    return (mask[0, 0] == 0).int().tolist()


def test_blocks_of_the_suffix_mask():
    network = Pi0Network(small_config(action_horizon=2))
    valid = torch.tensor([[True, False]])  # the prefix's second token is padding
    assert allowed(network._suffix_mask(valid, samples=1, dtype=torch.float32)) == [
        [1, 0, 1, 0, 0],  # the state sees prefix and state
        [1, 0, 1, 1, 1],
        [1, 0, 1, 1, 1],
    ]
    several = network._suffix_mask(valid, samples=3, dtype=torch.float32)
    assert allowed(several.state) == [[1, 0, 1]]
    assert several.chunk.shape == (3, 1, 1, 5)
    assert allowed(several.chunk) == [[1, 0, 1, 1, 1]]


def test_chunks_of_a_prefix_do_not_depend_on_each_other():
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config).double()
    inputs = random_inputs(config, 2, torch.float64)
    names = ("images", "image_masks", "tokenized_prompt", "tokenized_prompt_mask")
    prefix = policy.network.encode_prefix(*(inputs[name] for name in names))
    chunks = torch.randn(3, 2, config.action_horizon, config.action_dim).double()
    times = torch.rand(3, 2).double()
    together = policy.network.velocity(prefix, inputs["state"], chunks.flatten(0, 1), times.flatten())
    for number, found in enumerate(together.unflatten(0, (3, 2))):
        alone = policy.network.velocity(prefix, inputs["state"], chunks[number], times[number])
        assert torch.allclose(found, alone, atol=1e-12)


def test_every_trained_parameter_gets_a_gradient():
    # Distributed training waits for the gradient of each parameter that asks for one.
    for config in (small_config(guidance=True), Pi0Config.preset("pi0_tiny", guidance=True)):
        torch.manual_seed(0)
        policy = PI0Policy(config)
        policy.forward(**random_inputs(config, 2), **random_actions(config, 2)).mean().backward()
        without = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []


def test_checkpointed_gradients_are_the_same_and_keep_less():
    config = small_config()
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        policy = PI0Policy(config)
        if checkpointed:
            policy.network.checkpoint_gradients()
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = policy.forward(**random_inputs(config, 2), **random_actions(config, 2)).mean()
        kept.append(sum(saved.values()))
        loss.backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_unused_weights_change_nothing():
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config)
    inputs, noise = random_inputs(config, 2), random_actions(config, 2)["noise"]
    before = policy.sample_actions(**inputs, noise=noise)
    for parameter in policy.network.unused_parameters():
        parameter.data.normal_()
    assert torch.equal(policy.sample_actions(**inputs, noise=noise), before)


def test_published_preset_has_the_published_size():
    with torch.device("meta"):
        network = Pi0Network(Pi0Config.preset("pi0"))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in network.named_children()}
    assert sizes["vision"] == 412_442_352  # SigLIP So400m/14 at 224 pixels without its pooling head
    assert sizes["gemma"] + sizes["token_embedding"] == 2_508_531_712  # Gemma 2B as PaliGemma extends it
    assert sizes["expert"] == 311_464_960  # the 300M action expert
    assert network.token_embedding.weight.shape == (257_152, 2048)


def test_tiny_preset_fits_its_file():
    parameters = sum(p.numel() for p in Pi0Network(Pi0Config.preset("pi0_tiny")).parameters())
    assert parameters * 4 < 12e6


def test_conv_tower_finds_a_bright_spot():
    dims = ConvDims(channels=(1,), kernels=(3,), strides=(1,), keypoints=1, tokens=1, width=3, image_size=16)
    tower = ConvTower(dims)
    with torch.no_grad():
        for conv in (*tower.convs, tower.keypoint_maps):
            conv.weight.zero_()
            conv.bias.zero_()
        tower.convs[0].weight[0, 0, 1, 1] = 1.0
        tower.keypoint_maps.weight.fill_(50.0)
        tower.to_tokens.weight.copy_(torch.eye(3))
        tower.to_tokens.bias.zero_()
    image = torch.zeros(1, 3, 16, 16)
    image[0, :, 3, 12] = 1.0
    x, y, strength = tower(image)[0, 0].tolist()
    assert (x, y) == (pytest.approx(12 / 15 * 2 - 1, abs=1e-5), pytest.approx(3 / 15 * 2 - 1, abs=1e-5))
    assert strength == pytest.approx(50.0)


def test_cameras_share_conv_weights_only_when_asked():
    image = torch.rand(1, 3, 64, 64)
    for shared in (False, True):
        config = Pi0Config.preset("pi0_tiny", vision=ConvDims(shared=shared))
        torch.manual_seed(0)
        first, second = Pi0Network(config).vision([image, image])
        assert torch.equal(first, second) is shared


def test_missing_camera_is_named():
    config = small_config()
    policy = PI0Policy(config)
    inputs = random_inputs(config, 2)
    del inputs["images"]["left_wrist_0_rgb"]
    with pytest.raises(ValueError, match="left_wrist_0_rgb"):
        policy.sample_actions(**inputs, noise=random_actions(config, 2)["noise"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_dim": 4}, "action_dim 4 is below"),
        ({"cameras": ("a", "a")}, "distinct"),
        ({"tokenizer": "bpe"}, "not 'bpe'"),
        ({"gemma": GemmaDims(24, 2, 32, 4, 2, 8)}, "gemma.depth is 2 but action_expert.depth is 3"),
    ],
)
def test_contradicting_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_config(**change)


def test_config_survives_its_file():
    for config in (Pi0Config.preset("pi0"), Pi0Config.preset("pi0_tiny", guidance=True), small_config()):
        assert Pi0Config.from_dict(config.to_dict()) == config


def test_misspelt_config_key_is_named():
    content = small_config().to_dict()
    content["action_horizn"] = content.pop("action_horizon")
    with pytest.raises(
        ValueError, match="config.json: unknown key 'action_horizn'; did you mean 'action_horizon'"
    ):
        Pi0Config.from_dict(content)
