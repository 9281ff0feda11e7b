"""Configurations and normalisation statistics that openpi and LeRobot write beside the weights.

Both hold less than this project's config.json (no sizes of layers, no meaning of cameras). The rest comes from the
tensors' shapes and from constants in the code of openpi and LeRobot. Sources: openpi,
src/openpi/{models/pi0_config.py,models/gemma.py,training/checkpoints.py,shared/normalize.py} and
examples/convert_jax_model_to_pytorch.py; LeRobot, policies/pi0/configuration_pi0.py,
processor/{pipeline,normalize_processor}.py, and common/policies/normalize.py of February 2025.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.files import read_json, why_unreadable
from pi0.model.config import POSE_DIM, PUBLISHED_CAMERAS, GemmaDims, Pi0Config, SiglipDims
from pi0.policy.cameras import BASE, LEFT_WRIST, CameraChoice, choose_cameras
from pi0.policy.normalization import NormStats, NormStatsError, load_norm_stats, norm_stats_from
from pi0.policy.tensor_names import EMBEDDING, EXPERT, OUTPUT_HEAD, PALIGEMMA, holds_pi05

NORM_STATS_FILE = "norm_stats.json"
PREPROCESSOR_FILE, POSTPROCESSOR_FILE = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FEATURE, ACTION_FEATURE = "observation.state", "action"

# In transformers' PaliGemma, SigLIP So400m has 16 heads of 72 features. openpi's Gemma variants have one key-value
# head. Shapes show neither.
_SIGLIP_HEAD_DIM, _KV_HEADS = 72, 1
# Sizes of the transformers by openpi's names (get_config in src/openpi/models/gemma.py). LeRobot builds only these.
# openpi's `..._lora` variants add low-rank matrices, which its own PyTorch model cannot hold.
GEMMA_VARIANTS = {
    "gemma_2b": GemmaDims(2048, 18, 16384, 8, 1, 256),
    "gemma_300m": GemmaDims(1024, 18, 4096, 8, 1, 256),
}
_OPENPI_KEYS = {
    "action_dim",
    "action_horizon",
    "paligemma_variant",
    "action_expert_variant",
    "precision",
    "pi05",
}
# LeRobot's keys that change what the policy computes, with the only value of each that this project computes.
_LEROBOT_ONLY = {
    "n_obs_steps": 1,
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
    "min_period": 4e-3,
    "max_period": 4.0,
}
# LeRobot's keys for what is frozen; name and meaning are those in `Pi0Config`.
FREEZES = ("freeze_vision_encoder", "train_expert_only")

Shapes = Mapping[str, tuple[int, ...]]  # by openpi's names


def is_lerobot(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of a LeRobot config.json."""
    return "type" in content


def is_openpi(content: Mapping[str, Any]) -> bool:
    """Whether this is a config.json of openpi's converter, or one written by hand for openpi's own checkpoints."""
    return not is_lerobot(content) and "action_horizon" in content and "gemma" not in content


def published_config(
    content: Mapping[str, Any], shapes: Shapes, source: str, cameras: Mapping[str, str] | None = None
) -> Pi0Config:
    """The configuration of a policy folder of openpi or LeRobot.

    Args:
        content: content of its config.json. openpi's may also hold any other field of `Pi0Config`, which is used.
        shapes: shapes of the tensors. What they do not show is as in the published model.
        source: names config.json in errors.
        cameras: camera to image, if the names of LeRobot's image features do not tell (`choose_cameras`).

    Raises:
        CameraNameError: as `choose_cameras`.
        CheckpointError: a key is missing or needs something that this project does not compute; it names the key.
    """
    pi05 = holds_pi05(shapes)
    if content.get("pi05", pi05) != pi05:
        raise CheckpointError(
            f"{source}: pi05 is {content['pi05']}, but the tensors are those of another model"
        )
    base = Pi0Config.preset("pi05" if pi05 else "pi0")
    for key in ("paligemma_variant", "action_expert_variant"):
        if key in content and content[key] not in list(GEMMA_VARIANTS):
            raise CheckpointError(
                f"{source}: {key} is {content[key]!r}; known are {' and '.join(GEMMA_VARIANTS)}. Merge low-rank "
                "additions into the weights with the program that trained them, and name the variant without _lora"
            )
    if is_lerobot(content):
        translated = _from_lerobot(content, pi05, source, cameras)
        mapping = content.get("normalization_mapping") or norm_map(base.use_quantile_norm)
        quantiles = _mode(mapping, source) == "QUANTILES"
        if quantiles != base.use_quantile_norm:
            translated["use_quantile_norm"] = quantiles
    else:
        translated = _from_openpi(content, source)
    merged = base.to_dict() | _sizes(base, shapes) | translated
    try:
        return Pi0Config.from_dict(merged, source)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _from_openpi(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(Pi0Config)}
    unknown = sorted(set(content) - fields - _OPENPI_KEYS)
    if unknown:
        raise CheckpointError(
            f"{source}: unknown key {unknown[0]!r}; openpi's are {', '.join(sorted(_OPENPI_KEYS))}"
        )
    return {key: value for key, value in content.items() if key in fields | {"pi05"}}


def _from_lerobot(
    content: Mapping[str, Any], pi05: bool, source: str, cameras: Mapping[str, str] | None
) -> dict[str, Any]:
    expected = "pi05" if pi05 else "pi0"
    if content["type"] != expected:
        raise CheckpointError(f"{source}: type is {content['type']!r}, but the tensors are of {expected}")
    for key, only in _LEROBOT_ONLY.items():
        if content.get(key, only) != only:
            raise CheckpointError(f"{source}: {key} is {content[key]!r}; this project computes only {only!r}")
    missing = [key for key in ("chunk_size", "input_features", "output_features") if key not in content]
    if missing:
        raise CheckpointError(f"{source}: missing {', '.join(missing)}")
    width = content.get("max_action_dim", 32)
    if content.get("max_state_dim", width) != width:
        raise CheckpointError(
            f"{source}: max_state_dim {content['max_state_dim']} is not max_action_dim {width}"
        )
    translated = {
        "action_dim": width,
        "action_horizon": content["chunk_size"],
        "num_steps": content.get("num_inference_steps", content.get("num_steps", 10)),
        "prompt_length": content.get("tokenizer_max_length", 200 if pi05 else 48),
        "cameras": tuple(choice.camera for choice in camera_choices(content, source, cameras))
        or PUBLISHED_CAMERAS,
        **{key: content[key] for key in FREEZES if key in content},
    }
    for ours, part, key in (
        ("robot_state_dim", "input_features", STATE_FEATURE),
        ("robot_action_dim", "output_features", ACTION_FEATURE),
    ):
        shape = (content[part] or {}).get(key, {}).get("shape", [width])
        if shape != [width]:  # base models belong to no robot and have the padded width
            translated[ours] = shape[0]
    if content.get("use_relative_actions"):
        _require_relative_pose(content, source)
        translated["delta_actions"] = True
    return translated


def _require_relative_pose(content: Mapping[str, Any], source: str) -> None:
    """Raise `CheckpointError` unless the state is subtracted from exactly the first six actions, as in openpi.

    In LeRobot an action is absolute if its name contains an entry of `relative_exclude_joints`. Without names no
    action is absolute (processor/relative_action_processor.py).
    """
    names = content.get("action_feature_names") or []
    excluded = [str(name).lower() for name in content.get("relative_exclude_joints", ["gripper"]) if name]
    absolute = [
        index for index, name in enumerate(names) if any(part in str(name).lower() for part in excluded)
    ]
    if absolute != [POSE_DIM] or len(names) != POSE_DIM + 1:
        raise CheckpointError(
            f"{source}: use_relative_actions with relative_exclude_joints {excluded} and action_feature_names "
            f"{names or None} is not supported; this project subtracts the state from the {POSE_DIM} features of pose "
            "and leaves the gripper as it is"
        )


def norm_map(quantiles: bool) -> dict[str, str]:
    """LeRobot's normalization_mapping; by default pi0.5 uses quantiles and pi0 does not."""
    mode = "QUANTILES" if quantiles else "MEAN_STD"
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


def _mode(mapping: Mapping[str, str], source: str) -> str:
    """How states and actions are normalised: MEAN_STD or QUANTILES. In LeRobot a missing entry means IDENTITY."""
    modes = {mapping.get(part, "IDENTITY") for part in ("STATE", "ACTION")}
    if (
        mapping.get("VISUAL", "IDENTITY") != "IDENTITY"
        or len(modes) != 1
        or not modes <= {"MEAN_STD", "QUANTILES"}
    ):
        raise CheckpointError(
            f"{source}: normalises by {dict(mapping)}; this project needs IDENTITY for VISUAL, and MEAN_STD or "
            "QUANTILES for both STATE and ACTION"
        )
    return modes.pop()


def camera_choices(
    content: Mapping[str, Any], source: str, stated: Mapping[str, str] | None = None
) -> list[CameraChoice]:
    """This project's names of the image features in a LeRobot config.json, in their order.

    Empty cameras are left out: they are masked, so no output depends on them.

    Raises:
        CameraNameError: as `choose_cameras`.
    """
    features = [key for key in content["input_features"] or {} if key.startswith("observation.image")]
    images = [name for key in features if not (name := key.rsplit(".", 1)[-1]).startswith("empty_camera")]
    folder = Path(source).parent
    mend = f"python -m pi0.checkpoint convert {folder} OUTPUT --cameras {BASE}=IMAGE {LEFT_WRIST}=IMAGE"
    return choose_cameras(images, source, mend, stated)


def _sizes(base: Pi0Config, shapes: Shapes) -> dict[str, Any]:
    """Sizes under config.json's names, as far as the tensors show them; the rest is `base`'s."""
    assert isinstance(base.vision, SiglipDims)
    tower = PALIGEMMA + "model.vision_tower.vision_model."
    sizes: dict[str, Any] = {
        "siglip": _siglip(base.vision, tower, shapes),
        "gemma": _gemma(base.gemma, PALIGEMMA + "model.language_model.", shapes),
        "action_expert": _gemma(base.action_expert, EXPERT + "model.", shapes),
    }
    embedding = shapes.get(EMBEDDING, shapes.get(OUTPUT_HEAD))
    if embedding:
        sizes["vocab_size"] = embedding[0]
    if len(shapes.get("action_in_proj.weight", ())) == 2:
        sizes["action_dim"] = shapes["action_in_proj.weight"][1]
    return sizes


def _siglip(base: SiglipDims, prefix: str, shapes: Shapes) -> dict[str, int]:
    sizes = dataclasses.asdict(base) | {"depth": _depth(shapes, prefix + "encoder.", base.depth)}
    patches = shapes.get(prefix + "embeddings.patch_embedding.weight", ())
    if len(patches) == 4:
        sizes |= {"width": patches[0], "patch_size": patches[2]}
    if sizes["width"] % _SIGLIP_HEAD_DIM == 0:
        sizes["num_heads"] = sizes["width"] // _SIGLIP_HEAD_DIM
    mlp = shapes.get(prefix + "encoder.layers.0.mlp.fc1.weight")
    positions = shapes.get(prefix + "embeddings.position_embedding.weight")
    if mlp:
        sizes["mlp_dim"] = mlp[0]
    if positions:
        sizes["image_size"] = math.isqrt(positions[0]) * sizes["patch_size"]
    return sizes


def _gemma(base: GemmaDims, prefix: str, shapes: Shapes) -> dict[str, int]:
    sizes = dataclasses.asdict(base) | {"depth": _depth(shapes, prefix, base.depth)}
    q, k, gate = (
        shapes.get(f"{prefix}layers.0.{name}.weight", ())
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    )
    if len(q) == len(k) == 2 and k[0]:
        sizes |= {"width": q[1], "head_dim": k[0], "num_heads": q[0] // k[0], "num_kv_heads": _KV_HEADS}
    if len(gate) == 2:
        sizes["mlp_dim"] = gate[0]
    return sizes


def _depth(shapes: Shapes, prefix: str, otherwise: int) -> int:
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    layers = [int(found.group(1)) for key in shapes if (found := pattern.match(key))]
    return max(layers) + 1 if layers else otherwise


# Statistics


class FoundStats(NamedTuple):
    """Normalisation statistics of a policy folder, where they were, and floors that they got when they were read."""

    stats: NormStats | None
    place: str
    floors: tuple[str, ...] = ()


def find_norm_stats(directory: Path, buffers: Mapping[str, Any], config: Pi0Config) -> FoundStats:
    """The statistics that a policy folder holds.

    It searches in this order: norm_stats.json (this project's, openpi's); assets/ASSET_ID/norm_stats.json (openpi's
    checkpoints); LeRobot's processor files; buffers among the weights (LeRobot's before September 2025; they are
    infinite if nobody has set them). LeRobot divides by std + 1e-8 and multiplies by std. This project, like
    openpi, uses std + 1e-6 in both directions.

    Args:
        directory: the policy folder.
        buffers: those among the weights, arrays by their keys in the file.
        config: the policy's configuration.

    Raises:
        NormStatsError: the statistics are broken, there are several files of them, or they contradict `config`.
        FileNotFoundError: one of LeRobot's files is missing.
    """
    dims = config.robot_state_dim, config.robot_action_dim
    direct = directory / NORM_STATS_FILE
    assets = [direct] if direct.is_file() else sorted((directory / "assets").rglob(NORM_STATS_FILE))
    if len(assets) > 1:
        found = ", ".join(str(path.relative_to(directory)) for path in assets)
        raise NormStatsError(f"{directory} has several statistics: {found}; name one as norm_stats_path")
    if assets:
        return FoundStats(load_norm_stats(assets[0], *dims), str(assets[0].relative_to(directory)))
    if (directory / PREPROCESSOR_FILE).is_file():
        parts = _processor_stats(directory, config)
        path, label = directory / PREPROCESSOR_FILE, "processor files"
    else:
        parts = {
            "state": _under(buffers, "normalize_inputs.buffer_observation_state."),
            "actions": _under(buffers, "unnormalize_outputs.buffer_action."),
        }
        path, label = directory, "buffers among the weights"
        if any(np.isinf(value).any() for part in parts.values() for value in part.values()):
            return FoundStats(None, f"{label}, which nobody has set")
    if not any(parts.values()):
        return FoundStats(None, "nowhere")
    return FoundStats(norm_stats_from({k: v or None for k, v in parts.items()}, *dims, path), label)


def _under(vectors: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in vectors.items() if key.startswith(prefix)}


def _processor_stats(directory: Path, config: Pi0Config) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of states from the preprocessor's normalizer, of actions from the postprocessor's inverse."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for part, file, step, feature in (
        ("state", PREPROCESSOR_FILE, "normalizer_processor", STATE_FEATURE),
        ("actions", POSTPROCESSOR_FILE, "unnormalizer_processor", ACTION_FEATURE),
    ):
        path = directory / file
        if not path.is_file():
            raise MissingFileError(f"{directory} has a {PREPROCESSOR_FILE}, but no {file}")
        content = read_json(path, NormStatsError)
        try:
            entries = content["steps"]
            entry = next((e for e in entries if e.get("registry_name") == step), None)
            state_file = entry and entry.get("state_file")
            mapping = entry["config"].get("norm_map", {}) if entry else {}
        except (KeyError, TypeError, AttributeError) as error:
            raise NormStatsError(f"{path}: not a LeRobot processor file: {error!r}") from error
        parts[part] = {}
        if state_file is None:
            continue
        if (_mode(mapping, str(path)) == "QUANTILES") != config.use_quantile_norm:
            raise NormStatsError(f"{path}: normalises by {mapping}, which contradicts config.json")
        if Path(state_file).name != state_file or not (directory / state_file).is_file():
            raise MissingFileError(f"{path} names {state_file}, which is not in {directory}")
        try:
            vectors = {k: tensor.float().numpy() for k, tensor in load_file(directory / state_file).items()}
        except SafetensorError as error:
            why = why_unreadable(directory / state_file, error)
            raise NormStatsError(f"{directory / state_file}: not a safetensors file: {why}") from error
        parts[part] = _under(vectors, feature + ".")
    return parts
