"""Checkpoint directories as openpi and LeRobot write them, of small random weights.

Names and structure are spelt out here from their sources and not taken from the code under test: openpi,
src/openpi/models_pytorch/ and examples/convert_jax_model_to_pytorch.py; LeRobot, policies/pi0/ at its commits 638d411c
(February 2025) and abde7be3 (October 2025), and processor/pipeline.py.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

P, E = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
EMBED_TOKENS, LM_HEAD, EXPERT_HEAD = (
    P + "model.language_model.embed_tokens.weight",
    P + "lm_head.weight",
    E + "lm_head.weight",
)
VISION, WIDTH, EXPERT, VOCAB, LAYERS = 72, 48, 32, 300, 2  # features of each part, tokens, layers of each
HEADS, HEAD_DIM, ACTIONS, HORIZON = 8, 4, 32, 6
STATS = {
    "state": {"mean": [0.5] * 8, "std": [2.0] * 8, "q01": [-1.0] * 8, "q99": [3.0] * 8},
    "actions": {"mean": [0.25] * 7, "std": [0.5] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7},
}
OPENPI_CONFIG = {  # what the converter writes, with a horizon of ours
    "action_dim": ACTIONS,
    "action_horizon": HORIZON,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "float32",
}
NORM_MAP = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
LEROBOT_CONFIG = {
    "type": "pi0",
    "n_obs_steps": 1,
    "input_features": {
        "observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.images.image2": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.state": {"type": "STATE", "shape": [8]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    "normalization_mapping": NORM_MAP,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "chunk_size": HORIZON,
    "n_action_steps": HORIZON,
    "max_state_dim": ACTIONS,
    "max_action_dim": ACTIONS,
    "num_inference_steps": 10,
    "tokenizer_max_length": 48,
}


def shapes(pi05: bool = False, width: int = WIDTH, mlp: int = 64, vocab: int = VOCAB) -> dict[str, tuple]:
    """Shape of each tensor in openpi's model.safetensors."""
    found: dict[str, tuple] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        found[name + ".weight"] = (outputs, inputs)
        if bias:
            found[name + ".bias"] = (outputs,)

    tower = P + "model.vision_tower.vision_model."
    found[tower + "embeddings.patch_embedding.weight"] = (VISION, 3, 14, 14)
    found[tower + "embeddings.patch_embedding.bias"] = (VISION,)
    found[tower + "embeddings.position_embedding.weight"] = (4, VISION)  # images of 28 pixels
    for layer in range(LAYERS):
        own = f"{tower}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{own}self_attn.{name}", VISION, VISION)
        linear(own + "mlp.fc1", VISION, 96)
        linear(own + "mlp.fc2", 96, VISION)
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{own}{name}.weight": (VISION,), f"{own}{name}.bias": (VISION,)}
    found |= {tower + "post_layernorm.weight": (VISION,), tower + "post_layernorm.bias": (VISION,)}
    linear(P + "model.multi_modal_projector.linear", VISION, width)
    for prefix, w, m in ((P + "model.language_model.", width, mlp), (E + "model.", EXPERT, 40)):
        adaptive = pi05 and prefix.startswith(E)

        def norm(name: str, w: int = w, adaptive: bool = adaptive) -> None:
            if adaptive:
                linear(name + ".dense", w, 3 * w)
            else:
                found[name + ".weight"] = (w,)

        for layer in range(LAYERS):
            own = f"{prefix}layers.{layer}."
            linear(own + "self_attn.q_proj", w, HEADS * HEAD_DIM, bias=False)
            linear(own + "self_attn.k_proj", w, HEAD_DIM, bias=False)
            linear(own + "self_attn.v_proj", w, HEAD_DIM, bias=False)
            linear(own + "self_attn.o_proj", HEADS * HEAD_DIM, w, bias=False)
            linear(own + "mlp.gate_proj", w, m, bias=False)
            linear(own + "mlp.up_proj", w, m, bias=False)
            linear(own + "mlp.down_proj", m, w, bias=False)
            norm(own + "input_layernorm")
            norm(own + "post_attention_layernorm")
        norm(prefix + "norm")
    found |= {LM_HEAD: (vocab, width), EXPERT_HEAD: (vocab, EXPERT)}
    linear("action_in_proj", ACTIONS, EXPERT)
    linear("action_out_proj", EXPERT, ACTIONS)
    if pi05:
        linear("time_mlp_in", EXPERT, EXPERT)
        linear("time_mlp_out", EXPERT, EXPERT)
    else:
        linear("state_proj", ACTIONS, EXPERT)
        linear("action_time_mlp_in", 2 * EXPERT, EXPERT)
        linear("action_time_mlp_out", EXPERT, EXPERT)
    return found


def weights(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """Random weights under openpi's names."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for name, shape in shapes(**sizes).items()
    }


def write_openpi(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What openpi's converter leaves: the embedding under its tied name, statistics under assets/ASSET_ID."""
    assets = path / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={EMBED_TOKENS: LM_HEAD})
    write_json(path / "config.json", OPENPI_CONFIG)
    write_json(assets / "norm_stats.json", {"norm_stats": STATS})
    return path


def write_lerobot(
    path: Path, tensors: dict[str, torch.Tensor], output_head: torch.Tensor | None = None
) -> Path:
    """What LeRobot leaves since October 2025: an untied output head, statistics in processor files."""
    path.mkdir(parents=True)
    named = dict(tensors)
    named[EMBED_TOKENS] = named[LM_HEAD]
    named[LM_HEAD] = torch.randn(named[LM_HEAD].shape) if output_head is None else output_head
    save_file(
        {"model." + k: v for k, v in named.items()}, path / "model.safetensors", metadata={"format": "pt"}
    )
    write_json(path / "config.json", LEROBOT_CONFIG)
    state = {f"observation.state.{name}": torch.tensor(v) for name, v in STATS["state"].items()}
    action = {f"action.{name}": torch.tensor(v) for name, v in STATS["actions"].items()}
    for name, index, step in (
        ("policy_preprocessor", 5, "normalizer"),
        ("policy_postprocessor", 0, "unnormalizer"),
    ):
        file = f"{name}_step_{index}_{step}_processor.safetensors"
        save_file(state | action, path / file)
        steps = [{"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}] * index
        config = {"eps": 1e-8, "features": {}, "norm_map": NORM_MAP}
        steps.append({"registry_name": f"{step}_processor", "config": config, "state_file": file})
        write_json(path / f"{name}.json", {"name": name, "steps": steps})
    return path


def write_lerobot_early(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What LeRobot left in the first half of 2025: modules nested the old way, statistics among the weights."""
    path.mkdir(parents=True)
    renames = {
        P + "lm_head.": P + "language_model.lm_head.",
        P + "model.language_model.": P + "language_model.model.",
        P + "model.vision_tower.": P + "vision_tower.",
        P + "model.multi_modal_projector.": P + "multi_modal_projector.",
    }
    named = {}
    for key, tensor in tensors.items():
        old = next((old for old in renames if key.startswith(old)), "")
        named["model." + renames.get(old, "") + key.removeprefix(old)] = tensor
    return write_lerobot_buffers(path, named)


def write_lerobot_summer(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What LeRobot left in the summer of 2025: modules nested as today, statistics among the weights."""
    path.mkdir(parents=True)
    return write_lerobot_buffers(path, {"model." + key: tensor for key, tensor in tensors.items()})


def write_lerobot_buffers(path: Path, named: dict[str, torch.Tensor]) -> Path:
    """Weights with statistics among them, and the configuration of that time."""
    for name in ("mean", "std"):
        named[f"normalize_inputs.buffer_observation_state.{name}"] = torch.tensor(STATS["state"][name])
        for module in ("normalize_targets", "unnormalize_outputs"):
            named[f"{module}.buffer_action.{name}"] = torch.tensor(STATS["actions"][name])
    save_file(named, path / "model.safetensors")
    new = ("num_inference_steps", "paligemma_variant", "action_expert_variant")
    config = {key: value for key, value in LEROBOT_CONFIG.items() if key not in new}
    write_json(
        path / "config.json", config | {"num_steps": 10, "adapt_to_pi_aloha": False, "proj_width": EXPERT}
    )
    return path


def write_lerobot_converted(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """openpi's weights in LeRobot's directory, as LeRobot's loader takes them: it adds the prefix that is missing."""
    write_lerobot(path, tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
