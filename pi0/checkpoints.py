"""Checkpoint files: a directory of model.safetensors, config.json and norm_stats.json.

Tensor names are those of openpi's PyTorch checkpoints, where the network's parts have other names; `PREFIXES`
is the whole mapping. Parts that published checkpoints do not have (the convolutional tower, the condition
embedding) keep a name of their own. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi0.errors import InputError, MissingFileError
from pi0.model.config import ConvDims, Pi0Config

MODEL_FILE, CONFIG_FILE, NORM_STATS_FILE = "model.safetensors", "config.json", "norm_stats.json"

_PALIGEMMA = "paligemma_with_expert.paligemma."
_EXPERT = "paligemma_with_expert.gemma_expert."

# name in the network -> name in the file, by prefix; a name that none matches is the same in both
PREFIXES = (
    ("vision.towers.", "conv_vision_tower."),
    ("vision.", _PALIGEMMA + "model.vision_tower.vision_model."),
    ("projector.", _PALIGEMMA + "model.multi_modal_projector.linear."),
    ("token_embedding.", _PALIGEMMA + "lm_head."),
    ("gemma.", _PALIGEMMA + "model.language_model."),
    ("expert.", _EXPERT + "model."),
)
# The embedding is tied to the output head; files hold either name, or both.
TIED = {_PALIGEMMA + "model.language_model.embed_tokens.weight": _PALIGEMMA + "lm_head.weight"}
# In published files, but nothing is computed from it. Not read; written as zeros, as openpi's loader wants it.
UNUSED = _EXPERT + "lm_head.weight"


class CheckpointError(InputError, ValueError):
    """A checkpoint that cannot be used as it is; the message names the file and what is wrong."""


def file_name(parameter: str) -> str:
    """Name in a checkpoint file of one of the network's parameters."""
    for ours, theirs in PREFIXES:
        if parameter.startswith(ours):
            return theirs + parameter.removeprefix(ours)
    return parameter


def read_config(directory: str | Path) -> Pi0Config:
    """Read config.json of a checkpoint directory.

    Raises:
        FileNotFoundError: no such directory or no config.json in it.
        CheckpointError: config.json is broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"checkpoint directory {directory} not found")
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"{directory} has no {CONFIG_FILE}; it holds {_listing(directory)}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {content!r:.80}")
    try:
        return Pi0Config.from_dict(content, source=str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def load_weights(
    directory: str | Path, expected: dict[str, torch.Size], device: str | torch.device
) -> dict[str, Tensor]:
    """Read model.safetensors into tensors under the network's own names.

    Args:
        directory: the checkpoint.
        expected: shape of each of the network's parameters.
        device: where the tensors go.

    Raises:
        FileNotFoundError: no model.safetensors.
        CheckpointError: an unreadable file, or missing, surplus or mis-shaped tensors, all of them listed.
    """
    path = Path(directory) / MODEL_FILE
    if not path.is_file():
        hint = "; only safetensors are read, never pickles" if _pickles(Path(directory)) else ""
        raise MissingFileError(f"{directory} has no {MODEL_FILE}; it holds {_listing(Path(directory))}{hint}")
    names = {file_name(parameter): parameter for parameter in expected}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            sources = _match(stored, names, expected, path)
            return {names[name]: file.get_tensor(key) for name, key in sources.items()}
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {error}"
        ) from error


def save_checkpoint_files(
    directory: str | Path, weights: dict[str, Tensor], config: Pi0Config, norm_stats: dict | None
) -> None:
    """Write a checkpoint directory; each file is complete before it takes its name.

    Args:
        weights: by the network's own names.
        norm_stats: content of norm_stats.json, or None for none.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {file_name(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if not isinstance(config.vision, ConvDims):
        tensors[UNUSED] = torch.zeros(
            config.vocab_size,
            config.action_expert.width,
            dtype=tensors[file_name("gemma.layers.0.mlp.up_proj.weight")].dtype,
        )
    texts = {CONFIG_FILE: config.to_dict()} | ({NORM_STATS_FILE: norm_stats} if norm_stats else {})
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in [*texts, MODEL_FILE]}
    try:
        for name, content in texts.items():
            temporary[name].write_text(json.dumps(content, indent=1) + "\n")
        write_tensors(temporary[MODEL_FILE], tensors, TIED)
        # safetensors lets only the owner read; a checkpoint is as readable as its other files.
        temporary[MODEL_FILE].chmod(temporary[CONFIG_FILE].stat().st_mode)
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a disk that refuses is an OSError, as it is for any other file."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} is not written: {error}; make room or choose another folder") from error


def _match(stored: dict[str, tuple], names: dict[str, str], expected: dict, path: Path) -> dict[str, str]:
    """For each wanted name the key that holds it in the file; raises when they do not pair up one to one."""
    sources = {TIED.get(key, key): key for key in sorted(stored, reverse=True) if key != UNUSED}
    missing = [name for name in names if name not in sources]
    surplus = [key for name, key in sources.items() if name not in names]
    shapes = [
        f"{key} {list(stored[key])}, expected {list(expected[names[name]])}"
        for name, key in sources.items()
        if name in names and stored[key] != tuple(expected[names[name]])
    ]
    problems = [
        f"{len(found)} {kind}:\n    " + "\n    ".join(found)
        for kind, found in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if found
    ]
    if problems:
        lines = "\n  ".join(
            [f"{path} does not fit its {CONFIG_FILE}.", *problems, f"It looks like {describe(stored)}."]
        )
        raise CheckpointError(lines)
    return sources


def describe(stored: dict[str, tuple]) -> str:
    """In words, what kind of model tensors of these names and shapes belong to."""
    if not stored:
        return "an empty file"
    parts = []
    for label, prefix in (
        ("a SigLIP tower", _PALIGEMMA + "model.vision_tower."),
        ("a convolutional tower", "conv_vision_tower."),
        ("a Gemma prefix expert", _PALIGEMMA + "model.language_model."),
        ("an action expert", _EXPERT + "model."),
    ):
        keys = [key for key in stored if key.startswith(prefix)]
        if keys:
            layers = {int(m.group(1)) for key in keys if (m := re.search(r"\.layers\.(\d+)\.", key))}
            widths = {
                stored[key][0]
                for key in keys
                if key.endswith(("model.norm.weight", "language_model.norm.weight"))
            }
            detail = [f"{len(layers)} layers"] * bool(layers) + [f"width {w}" for w in widths]
            parts.append(label + (f" ({', '.join(detail)})" if detail else ""))
    if "action_in_proj.weight" in stored:
        parts.append(f"actions of {stored['action_in_proj.weight'][-1]} features")
    if "time_mlp_in.weight" in stored:
        parts.append("the time embedding of pi0.5")
    if not parts:
        return f"no pi0 checkpoint in openpi's layout: its tensors begin with {', '.join(sorted(stored)[:3])}"
    return "a model with " + ", ".join(parts)


def _pickles(directory: Path) -> list[str]:
    return [p.name for p in directory.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")]


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return (", ".join(names[:10]) + (" ..." if len(names) > 10 else "")) or "nothing"
