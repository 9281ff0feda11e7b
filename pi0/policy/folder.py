"""Policy folders: weights with their configuration. It reads those of this project, openpi and LeRobot.

It writes this project's and LeRobot's. This project's holds model.safetensors under openpi's names
(pi0.policy.tensor_names), config.json and norm_stats.json. openpi and LeRobot have their own configurations
(pi0.policy.published). docs/checkpoints.md tells where to get them. Only safetensors and JSON are read, never pickles.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.files import read_json, why_unreadable
from pi0.base.progress import progress
from pi0.base.tensors import count_not_finite, write_tensors
from pi0.model.config import ConvDims, Pi0Config
from pi0.policy.cameras import CameraChoice
from pi0.policy.lerobot_files import lerobot_files
from pi0.policy.normalization import NormStats, load_norm_stats
from pi0.policy.published import (
    NORM_STATS_FILE,
    FoundStats,
    camera_choices,
    find_norm_stats,
    is_lerobot,
    is_openpi,
    published_config,
)
from pi0.policy.tensor_names import (
    EMBEDDING,
    LEROBOT,
    OPENPI,
    OUTPUT_HEAD,
    STATISTICS,
    UNUSED,
    WRITABLE,
    Layout,
    describe,
    file_name,
    layout_of,
)

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
SLAB_BYTES = 2 << 20  # bytes read at a time: twice this is the memory that loading needs beside the weights
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, by openpi's names.

    Args:
        keys: each weight's key in the file.
        shapes, dtypes: shape and type of each weight.
        statistics: keys of LeRobot's normalisation buffers.
        metadata: the free text in the header.
    """

    path: Path
    layout: Layout
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    statistics: tuple[str, ...]
    metadata: dict[str, str] | None


@dataclass(frozen=True)
class Origin:
    """What a loaded policy keeps of its file, to write the same file again.

    Args:
        layout, metadata: those of the file.
        dtypes: types of its tensors, by openpi's names; they also show which names the embedding had.
        unread: tensors that no output depends on, by openpi's names. They are mapped, so they take no memory.
        config: content of a LeRobot config.json, else None.
    """

    layout: Layout
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str] | None
    unread: dict[str, Tensor]
    config: dict[str, Any] | None

    def __deepcopy__(self, _memo: dict) -> Origin:
        return self  # a copy would read the mapped tensors


def read_header(directory: str | Path) -> Header:
    """Names, shapes and types of the weights in a policy folder; the weights are not read.

    Raises:
        FileNotFoundError: no such folder, or no model.safetensors; the message describes the folder.
        CheckpointError: not a safetensors file, a tensor of a type that weights cannot have, or two keys for one
            tensor.
    """
    path = _directory(directory) / MODEL_FILE
    if not path.is_file():
        raise MissingFileError(_no_weights(path.parent))
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    layout = layout_of(slices)
    keys: dict[str, str] = {}
    shapes, dtypes = {}, {}
    for key, entry in slices.items():
        if key.startswith(STATISTICS):
            continue
        name = layout.to_openpi(key)
        if name in keys:
            raise CheckpointError(f"{path}: {keys[name]} and {key} are names of the same tensor")
        if entry.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{path}: {key} has type {entry.get_dtype()}; weights are {', '.join(_DTYPES)}"
            )
        keys[name], shapes[name], dtypes[name] = key, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()]
    statistics = tuple(key for key in slices if key.startswith(STATISTICS))
    return Header(path, layout, keys, shapes, dtypes, statistics, metadata)


def read_config(directory: str | Path, cameras: Mapping[str, str] | None = None) -> Pi0Config:
    """The configuration in config.json of a policy folder; openpi's and LeRobot's are translated.

    Args:
        directory: the policy folder.
        cameras: camera to image, if the names in LeRobot's config.json do not tell (`read_cameras`).

    Raises:
        FileNotFoundError: no such folder or no config.json in it.
        CheckpointError: config.json is broken, or needs something that this project does not compute.
    """
    content = _read_config_file(_directory(directory))
    source = str(Path(directory) / CONFIG_FILE)
    if cameras and not is_lerobot(content):
        raise CheckpointError(
            f"{source} names its cameras itself; cameras can be stated for LeRobot's folders only"
        )
    if is_lerobot(content) or is_openpi(content):
        return published_config(content, read_header(directory).shapes, source, cameras)
    try:
        return Pi0Config.from_dict(content, source)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_cameras(directory: str | Path, stated: Mapping[str, str] | None = None) -> list[CameraChoice]:
    """How the cameras of LeRobot's image features were decided; empty for other layouts, which name them."""
    content = _read_config_file(_directory(directory))
    return camera_choices(content, str(Path(directory) / CONFIG_FILE), stated) if is_lerobot(content) else []


def read_norm_stats(
    directory: str | Path, config: Pi0Config, norm_stats_path: str | Path | None = None
) -> FoundStats:
    """The statistics in `norm_stats_path` if it is given, else those of the policy folder (`find_norm_stats`).

    The divisor of a constant feature gets a floor (`NormStats.with_floors`).
    """
    found = _stored_norm_stats(Path(directory), config, norm_stats_path)
    if found.stats is None:
        return found
    stats = found.stats.with_floors("quantiles" if config.use_quantile_norm else "std")
    return FoundStats(stats, found.place, stats.floors[len(found.stats.floors) :])


def _stored_norm_stats(directory: Path, config: Pi0Config, norm_stats_path: str | Path | None) -> FoundStats:
    if norm_stats_path:
        stats = load_norm_stats(norm_stats_path, config.robot_state_dim, config.robot_action_dim)
        return FoundStats(stats, str(norm_stats_path))
    buffers = {}
    if (directory / MODEL_FILE).is_file():
        header = read_header(directory)
        if header.statistics:
            with _opened(header.path) as file:
                buffers = {key: file.get_tensor(key).float().numpy() for key in header.statistics}
    return find_norm_stats(directory, buffers, config)


def load_weights(
    directory: str | Path,
    expected: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
    device: str | torch.device,
) -> tuple[dict[str, Tensor], Origin]:
    """Read model.safetensors into tensors under the network's own names.

    The file is mapped. A few megabytes at a time are cast and copied; nothing else of the file stays in memory.

    Args:
        directory: the policy folder.
        expected: shape of each of the network's parameters.
        dtypes: type that each parameter gets.
        device: where the tensors go.

    Returns:
        The tensors, and what `save_checkpoint_files` needs to write the file back.

    Raises:
        FileNotFoundError: no model.safetensors.
        CheckpointError: an unreadable file, or missing, surplus or mis-shaped tensors (it lists all of them), or one that
            is not finite.
    """
    header = read_header(directory)
    sources = pair(header, expected)
    content = _read_config_file(Path(directory))
    weights = {}
    for parameter, name in sources.items():
        target = torch.empty(expected[parameter], dtype=dtypes[parameter], device=device)
        for start, slab in _slabs(header, name):
            target[start : start + len(slab)] = slab
        weights[parameter] = target
    with _opened(header.path) as file:
        unread = {name: file.get_tensor(header.keys[name]) for name in _unread(header)}
    origin = Origin(
        layout=header.layout,
        dtypes=header.dtypes,
        metadata=header.metadata,
        unread=unread,
        config=content if is_lerobot(content) else None,
    )
    return weights, origin


def require_finite(header: Header) -> None:
    """Read all weights of a file; raises `CheckpointError` with the tensor's key if one is not finite."""
    names = [name for name in header.keys if name not in _unread(header)]
    with progress(len(names), "reading weights", "tensor", delay=1) as bar:
        for name in names:
            for _ in _slabs(header, name):
                pass
            bar.update()


def _slabs(header: Header, name: str) -> Iterator[tuple[int, Tensor]]:
    """A weight a few megabytes at a time, with the index of the slab's first row; it is checked to be finite."""
    key, shape = header.keys[name], header.shapes[name]
    rows = max(1, SLAB_BYTES // max(1, math.prod(shape[1:]) * header.dtypes[name].itemsize))
    for start in range(0, shape[0], rows):
        # Opened again each time: pages that were read count as this process's memory until the map is closed.
        with _opened(header.path) as file:
            slab = file.get_slice(key)[start : start + rows]
            if bad := count_not_finite(slab):
                raise CheckpointError(
                    f"{header.path}: {key} holds {bad} values that are not finite, from row {start}; no policy can act "
                    "with it. Take an earlier checkpoint, or download the file again"
                )
            yield start, slab


def save_checkpoint_files(
    directory: str | Path,
    weights: Mapping[str, Tensor],
    config: Pi0Config,
    norm_stats: NormStats | None,
    origin: Origin | None = None,
    layout: str = OPENPI.name,
) -> None:
    """Write a policy folder; each file is complete before it takes its name.

    Weights that came from a file are written in the file's types where that loses nothing, and tensors that no
    output depends on are written unchanged. A policy that was loaded in float32 and not changed is written byte by
    byte as before (unless the header has several entries of free text, whose order safetensors does not keep).

    Args:
        weights: tensors by the network's own names.
        config: the policy's configuration.
        norm_stats: statistics to write; None: none.
        origin: what `load_weights` returned, if the policy came from a file.
        layout: "openpi" writes this project's folder. openpi's PyTorch code and LeRobot load its
            model.safetensors, unless it holds parts that only this project has: low-rank additions, an optimality
            condition, a convolutional tower. "lerobot" writes a folder that LeRobot loads, with its configuration
            and processors.

    Raises:
        CheckpointError: the layout cannot hold a part of the model, the folder holds a policy of another layout, or a
            weight is not finite.
        OSError, OutputError: the disk refuses.
    """
    chosen = WRITABLE.get(layout)
    if chosen is None:
        raise CheckpointError(
            f"layout is {' or '.join(WRITABLE)}, not {layout!r}; LeRobot's earlier layouts can be read but not written: "
            f"choose {LEROBOT.name}, which LeRobot reads today"
        )
    directory = Path(directory)
    if (directory / CONFIG_FILE).is_file() and is_lerobot(_read_config_file(directory)) != (
        chosen is LEROBOT
    ):
        # Statistics of one layout would stay beside the weights of the other.
        raise CheckpointError(f"{directory} holds a policy of another layout; choose another folder")
    files: dict[str, bytes | dict[str, Tensor]]
    if chosen is LEROBOT:
        files = lerobot_files(config, norm_stats, origin.config if origin else None)
    else:
        files = {CONFIG_FILE: _json(config.to_dict())}
        if norm_stats:
            files[NORM_STATS_FILE] = _json(norm_stats.to_dict())
    same = origin is not None and origin.layout is chosen
    if origin and same:
        metadata = origin.metadata
    else:  # two names are tied; openpi's files hold one of them, and their metadata maps the absent name to it
        metadata = {"format": "pt"} if chosen is LEROBOT else {EMBEDDING: OUTPUT_HEAD}
    tensors = {
        chosen.from_openpi(name): tensor for name, tensor in _tensors(weights, config, origin, chosen).items()
    }
    for name, tensor in tensors.items():
        if bad := count_not_finite(tensor):
            raise CheckpointError(
                f"{directory}: {name} holds {bad} values that are not finite, so no policy is written; what was there "
                "stays. Train with a lower learning rate"
            )
    files[MODEL_FILE] = tensors

    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                temporary[name].write_bytes(content)
            else:
                write_tensors(temporary[name], content, metadata if name == MODEL_FILE else None)
                # safetensors lets only the owner read; the weights get the same permissions as the other files.
                temporary[name].chmod(temporary[CONFIG_FILE].stat().st_mode)
        for name, path in temporary.items():
            os.replace(path, directory / name)
        if NORM_STATS_FILE not in files:  # statistics of an earlier policy would be read as this one's
            (directory / NORM_STATS_FILE).unlink(missing_ok=True)
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def pair(header: Header, expected: Mapping[str, torch.Size]) -> dict[str, str]:
    """For each of the network's parameters the openpi name of the tensor that holds it.

    Raises:
        CheckpointError: they do not match one to one; it lists all keys that differ and describes the file.
    """
    shapes = {name: shape for name, shape in header.shapes.items() if name not in _unread(header)}
    sources = {parameter: file_name(parameter) for parameter in expected}
    if EMBEDDING in shapes:
        sources = {p: EMBEDDING if name == OUTPUT_HEAD else name for p, name in sources.items()}
    wanted = {name: tuple(expected[parameter]) for parameter, name in sources.items()}
    key = header.keys.get
    found = {
        "missing": [header.layout.from_openpi(name) for name in wanted if name not in shapes],
        "surplus": [key(name, name) for name in shapes if name not in wanted],
        "of another shape": [
            f"{key(name)} {list(shapes[name])}, expected {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    problems = [f"{len(keys)} {kind}:\n    " + "\n    ".join(keys) for kind, keys in found.items() if keys]
    if problems:
        looks = f"It looks like {describe(shapes)}; its names are those of {header.layout.title}."
        raise CheckpointError(
            "\n  ".join([f"{header.path} does not fit its {CONFIG_FILE}.", *problems, looks])
        )
    return sources


def _unread(header: Header) -> set[str]:
    """Names of the tensors that no output depends on."""
    return {UNUSED} & set(header.keys) | (
        {OUTPUT_HEAD} if {EMBEDDING, OUTPUT_HEAD} <= set(header.keys) else set()
    )


def _tensors(
    weights: Mapping[str, Tensor], config: Pi0Config, origin: Origin | None, layout: Layout
) -> dict[str, Tensor]:
    """The tensors to write, by openpi's names."""
    tensors = {file_name(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    unread = dict(origin.unread) if origin else {}
    if origin:
        stored = origin.dtypes | (
            {OUTPUT_HEAD: origin.dtypes[EMBEDDING]} if EMBEDDING in origin.dtypes else {}
        )
        tensors = {name: _narrowed(tensor, stored.get(name)) for name, tensor in tensors.items()}
    head = unread.pop(OUTPUT_HEAD, None)
    same = origin is not None and origin.layout is layout
    if layout is LEROBOT and (head is not None or not same):
        # openpi's loader refuses a file with both names. LeRobot's model has both, and some releases (0.4.4) load
        # nothing at all, with a warning, from a file that lacks one.
        embedding = tensors[OUTPUT_HEAD]
        tensors |= {EMBEDDING: embedding, OUTPUT_HEAD: embedding.clone() if head is None else head}
    elif origin and same and head is None and EMBEDDING in origin.dtypes:
        tensors[EMBEDDING] = tensors.pop(OUTPUT_HEAD)  # the one name that the file had
    if UNUSED not in unread and not isinstance(config.vision, ConvDims):
        dtype = tensors[file_name("gemma.layers.0.mlp.up_proj.weight")].dtype
        unread[UNUSED] = torch.zeros(config.vocab_size, config.action_expert.width, dtype=dtype)
    return tensors | unread


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in a narrower type, if that loses nothing."""
    if dtype is None or dtype.itemsize >= tensor.dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_file():
        raise MissingFileError(f"{directory} is a file; name its folder, which holds {MODEL_FILE}")
    if not directory.is_dir():
        raise MissingFileError(f"policy folder {directory} not found")
    return directory


def _read_config_file(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        if not (directory / MODEL_FILE).is_file():
            raise MissingFileError(_no_weights(directory))
        raise MissingFileError(
            f"{directory} has no {CONFIG_FILE}; it holds {_listing(directory)}. If openpi's training made it, write "
            '{"action_horizon": 50} there, with the action_horizon of its training configuration'
        )
    content = read_json(path, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {content!r:.80}")
    return content


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {why_unreadable(path, error)}"
        ) from error


def _no_weights(directory: Path) -> str:
    """The message for a folder without model.safetensors."""
    message = f"{directory} has no {MODEL_FILE}; it holds {_listing(directory)}"
    names = {path.name for path in directory.iterdir()}
    if "params" in names or "_METADATA" in names:
        return f"{message}. This is openpi's JAX checkpoint: convert it as docs/checkpoints.md shows"
    if MODEL_FILE + ".index.json" in names:
        return f"{message}. It is split into shards: join them as docs/checkpoints.md shows"
    if "adapter_model.safetensors" in names:
        return (
            f"{message}. It holds an adapter only: merge it into its base model with the tool that trained it"
        )
    if inner := _policies_in(directory):
        return f"{message}. The policy folder is {' or '.join(map(str, inner[:5]))}"
    if any(Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl") for name in names):
        return f"{message}; this project reads only safetensors, never pickles"
    return message


# Where a folder that is none itself has policy folders: LeRobot's runs, this project's and their checkpoints, others.
_RUN = ("pretrained_model", "checkpoints/last/pretrained_model", "policy")
_STEPS = (
    "checkpoints/*/pretrained_model",
    "*/pretrained_model",
    "checkpoints/step-*/policy",
    "step-*/policy",
)


def _policies_in(directory: Path) -> list[Path]:
    """Policy folders in a folder that is none; of a run only the newest."""
    for pattern in (*_RUN, *_STEPS, "*"):
        if found := sorted(path.parent for path in directory.glob(f"{pattern}/{MODEL_FILE}")):
            return found[-1:] if pattern in _STEPS else found
    return []


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return (", ".join(names[:10]) + (" ..." if len(names) > 10 else "")) or "nothing"


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
