"""The files that LeRobot needs beside model.safetensors for a pi0 or pi0.5: its configuration and two processors.

Sources: LeRobot, policies/pi0/{configuration_pi0,processor_pi0}.py and the same files of policies/pi05,
processor/{pipeline,normalize_processor,tokenizer_processor,device_processor,relative_action_processor}.py and
configs/policies.py, whose parser refuses unknown keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pi0.base.errors import CheckpointError
from pi0.model.config import ConvDims, GemmaDims, Pi0Config
from pi0.policy.normalization import NormStats, Stats
from pi0.policy.published import (
    ACTION_FEATURE,
    FREEZES,
    GEMMA_VARIANTS,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    STATE_FEATURE,
    norm_map,
)

# This project's names for LIBERO's actions; LeRobot finds the absolute ones by name.
_POSE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw")


def lerobot_files(
    config: Pi0Config, norm_stats: NormStats | None, original: Mapping[str, Any] | None = None
) -> dict[str, bytes | dict[str, Tensor]]:
    """LeRobot's config.json, policy_preprocessor.json, policy_postprocessor.json and their statistics.

    Args:
        config: the policy's configuration.
        norm_stats: statistics to write; None: none.
        original: content of the LeRobot config.json that the policy came with, if any. Its other keys are kept,
            unless it is older than October 2025: LeRobot's parser refuses some keys of those today.

    Returns:
        By file name: text, or tensors for a safetensors file.

    Raises:
        CheckpointError: LeRobot cannot build the model; the message gives the reason.
    """
    content = lerobot_config(config, original)
    tensors: dict[str, Tensor] = {}
    if norm_stats is not None:
        for part, kind, feature, stats in (
            ("input_features", "STATE", STATE_FEATURE, norm_stats.state),
            ("output_features", "ACTION", ACTION_FEATURE, norm_stats.actions),
        ):
            # A base model's features have the padded width; the statistics have the robot's.
            content[part] = {**(content[part] or {}), feature: _feature(kind, len(stats.mean))}
            tensors |= {f"{feature}.{name}": vector for name, vector in _vectors(stats).items()}
    features = {**(content["input_features"] or {}), **(content["output_features"] or {})}
    modes = norm_map(config.use_quantile_norm)
    normalize = _step("normalizer_processor", eps=1e-8, features=features, norm_map=modes)
    tokenize = _step(
        "tokenizer_processor",
        max_length=config.prompt_length,
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name="google/paligemma-3b-pt-224",
    )
    to_device = _step("device_processor", device=content.get("device") or "cpu", float_dtype=None)
    spell = _step("pi05_prepare_state_tokenizer_processor_step")
    subtract, add = [], []
    if config.delta_actions:
        subtract = [
            _step(
                "relative_actions_processor",
                enabled=True,
                exclude_joints=content["relative_exclude_joints"],
                action_names=content["action_feature_names"],
            )
        ]
        add = [_step("absolute_actions_processor", enabled=True)]
    before = [
        _step("rename_observations_processor", rename_map={}),
        _step("to_batch_processor"),
        # pi0.5's prompt spells the normalised state.
        *(
            [*subtract, normalize, spell, tokenize, to_device]
            if config.pi05
            else [_step("pi0_new_line_processor"), tokenize, to_device, *subtract, normalize]
        ),
    ]
    after = [
        _step("unnormalizer_processor", eps=1e-8, features=content["output_features"], norm_map=modes),
        *add,
        _step("device_processor", device="cpu", float_dtype=None),
    ]
    files: dict[str, bytes | dict[str, Tensor]] = {"config.json": _json(content)}
    for file, steps in ((PREPROCESSOR_FILE, before), (POSTPROCESSOR_FILE, after)):
        name = file.removesuffix(".json")
        for index, step in enumerate(steps):
            if tensors and "norm_map" in step["config"]:
                step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
                files[step["state_file"]] = tensors
        files[file] = _json({"name": name, "steps": steps})
    return files


def lerobot_config(config: Pi0Config, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a LeRobot config.json; see `lerobot_files`."""
    for unfit, what in (
        (isinstance(config.vision, ConvDims), "a convolutional tower"),
        (config.guidance, "an optimality condition (guidance)"),
        (config.tokenizer != "paligemma", f"the tokenizer {config.tokenizer!r}"),
        (config.pi05 and not config.discrete_state_input, "a pi0.5 whose prompt does not spell the state"),
        (config.pad_discrete_state, "a prompt that spells the state's padding (today's code no longer does)"),
    ):
        if unfit:
            raise CheckpointError(f"LeRobot cannot hold {what}; save it in the layout 'openpi'")
    if config.gemma.lora_rank or config.action_expert.lora_rank:
        raise CheckpointError(
            "LeRobot cannot hold low-rank additions; `python -m pi0.checkpoint convert` merges them into the weights"
        )
    content: dict[str, Any] = {
        "type": "pi05" if config.pi05 else "pi0",
        "n_obs_steps": 1,
        "input_features": {
            **{
                f"observation.images.{camera}": _feature("VISUAL", 3, config.image_size, config.image_size)
                for camera in config.cameras
            },
            STATE_FEATURE: _feature("STATE", config.robot_state_dim),
        },
        "output_features": {ACTION_FEATURE: _feature("ACTION", config.robot_action_dim)},
        "normalization_mapping": norm_map(config.use_quantile_norm),
        "n_action_steps": min(10, config.action_horizon),
        "dtype": "float32",
        "image_resolution": [config.image_size, config.image_size],
    }
    if original is None or "paligemma_variant" not in original:
        content |= {
            "paligemma_variant": _variant(config.gemma, "gemma"),
            "action_expert_variant": _variant(config.action_expert, "action_expert"),
        }
    else:
        content = dict(original)
    if config.delta_actions and content.get("use_relative_actions"):
        content = {"relative_exclude_joints": ["gripper"]} | content  # LeRobot's default
    elif config.delta_actions:
        content |= {
            "use_relative_actions": True,
            "relative_exclude_joints": ["gripper"],
            "action_feature_names": [*_POSE_NAMES, "gripper"],
        }
    for key in FREEZES:
        # They are left out if they change nothing, for releases whose parser does not know them.
        if getattr(config, key) or key in content:
            content[key] = getattr(config, key)
    return content | {
        "chunk_size": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.num_steps,
        "tokenizer_max_length": config.prompt_length,
    }


def _variant(dims: GemmaDims, name: str) -> str:
    for variant, known in GEMMA_VARIANTS.items():
        if dims == known:
            return variant
    raise CheckpointError(f"LeRobot builds only {' and '.join(GEMMA_VARIANTS)}; {name} is neither: {dims}")


def _vectors(stats: Stats) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in vars(stats).items() if value is not None}


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=4) + "\n").encode()
