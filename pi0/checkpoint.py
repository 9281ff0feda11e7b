"""Policy folders of this project, openpi and LeRobot: describe one, or write it in another layout.

examples:
    python -m pi0.checkpoint inspect checkpoints/pi0_tiny_libero_spatial    # what it is, what fits, what is missing
    python -m pi0.checkpoint convert FOLDER OUTPUT                          # weights that openpi loads
    python -m pi0.checkpoint convert FOLDER OUTPUT --layout lerobot
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pi0.base.arguments import Collect
from pi0.base.errors import CheckpointError, InputError, attempt, run_command
from pi0.libero.environments import refuse_other_robots
from pi0.model.config import ConvDims, Pi0Config
from pi0.policy.cameras import CameraChoice, How
from pi0.policy.folder import (
    CONFIG_FILE,
    MODEL_FILE,
    Header,
    pair,
    read_cameras,
    read_config,
    read_header,
    read_norm_stats,
    require_finite,
)
from pi0.policy.normalization import NormStats
from pi0.policy.pi0_policy import PI0Policy
from pi0.policy.published import FoundStats
from pi0.policy.tensor_names import WRITABLE, describe, holds_pi05
from pi0.policy.tokenizer import PaligemmaTokenizer

FITS, STOP = "fits", "STOP"
LABEL_WIDTH = 13


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pi0.checkpoint",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="describe a policy folder: what fits, what is missing; status 1 if it cannot be loaded",
    )
    inspect.add_argument("path", help="a policy folder, or the model.safetensors in it")
    convert = commands.add_parser(
        "convert", help="write a policy in another layout; low-rank additions are merged into the weights"
    )
    convert.add_argument("path", help="a policy folder")
    convert.add_argument("output", help="folder to write; it must not hold weights yet")
    convert.add_argument(
        "--layout",
        default="openpi",
        choices=list(WRITABLE),
        help="openpi: this project's folder, with weights that openpi loads; lerobot: LeRobot's",
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="type of the experts and the vision tower; if the configuration freezes parts that have no low-rank "
        "additions, the trained part stays float32; default: as stored",
    )
    for command in (inspect, convert):
        command.add_argument(
            "--norm_stats_path", help="a norm_stats.json to use instead of the folder's own statistics"
        )
        command.add_argument(
            "--cameras",
            action=Collect,
            nargs="+",
            default=[],
            metavar="CAMERA=IMAGE",
            help="cameras of a LeRobot folder whose image features have names that do not tell, such as "
            "base_0_rgb=phone left_wrist_0_rgb=laptop; the converted folder names them itself",
        )
    options = parser.parse_args(arguments)
    options.cameras = dict(pair.partition("=")[::2] for pair in options.cameras)
    if not all(options.cameras.values()):
        parser.error("--cameras: give CAMERA=IMAGE for each camera")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Raises `InputError`."""
    options = parse_arguments(arguments)
    if options.command == "convert":
        convert_checkpoint(
            options.path,
            options.output,
            options.layout,
            options.dtype,
            options.norm_stats_path,
            options.cameras,
        )
        return 0
    status = 0
    for label, text in inspect_checkpoint(options.path, options.norm_stats_path, options.cameras):
        head, *more = text.split("\n")
        print(f"{label:<{LABEL_WIDTH}}{head}", *more, sep="\n" + " " * LABEL_WIDTH)
        status |= label == STOP
    return status


def convert_checkpoint(
    path: str,
    output: str,
    layout: str,
    dtype: str | None,
    norm_stats_path: str | None = None,
    cameras: Mapping[str, str] | None = None,
) -> None:
    """Load a policy folder, write it in another layout and print what was done.

    Low-rank additions are merged into the weights, since other programs do not know them.

    Raises:
        InputError: the policy cannot be loaded or written so; or it has an optimality condition, which other
            programs do not know and which cannot be merged.
    """
    if (Path(output) / MODEL_FILE).exists():
        raise InputError(f"{output} already holds a {MODEL_FILE}; name another folder")
    if read_config(path, cameras).guidance:
        raise CheckpointError(
            f"{Path(path) / CONFIG_FILE}: guidance is true; openpi and LeRobot have no place for the optimality "
            "condition that this policy learned, and do not sample with it, so only this project can use it. "
            "For other programs train with algo.mode=weighted"
        )
    policy = PI0Policy.from_pretrained(
        path,
        dtype=getattr(torch, dtype) if dtype else None,
        norm_stats_path=norm_stats_path,
        cameras=cameras,
    )
    ranks = policy.config.gemma.lora_rank, policy.config.action_expert.lora_rank
    if any(ranks):
        policy.merge_lora()
        print(f"low-rank additions (rank {ranks[0]} and {ranks[1]}) are merged into the weights")
    policy.save_pretrained(output, layout)
    if isinstance(policy.config.vision, ConvDims):
        print("only this project can load it: a convolutional tower has no place in openpi's model")
    print(f"{output} written")


def inspect_checkpoint(
    path: str | Path,
    norm_stats_path: str | Path | None = None,
    cameras: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str]]:
    """Describe a policy folder in pairs of a label and a text of one or more lines.

    The last pair's label is FITS or STOP: whether `PI0Policy.from_pretrained` loads it with the same
    `norm_stats_path` and `cameras`.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        CheckpointError: the weights are not a safetensors file.
    """
    path = Path(path)
    if path.is_file() and path.name != MODEL_FILE:
        raise InputError(f"{path}: the weights of a policy are called {MODEL_FILE}; name its folder")
    directory = path.parent if path.is_file() else path
    header = read_header(directory)
    kind = "pi0.5" if holds_pi05(header.shapes) else "pi0"
    yield "file", f"{header.path} ({header.path.stat().st_size / 1e9:.3g} GB)"
    yield "layout", f"{header.layout.title}: names like {next(iter(header.keys.values()), '(none)')}"
    yield "model", f"{kind}: {describe(header.shapes)}"
    yield "weights", _weights(header)
    try:
        config = read_config(directory, cameras)
        yield CONFIG_FILE, _config(config)
        if choices := read_cameras(directory, cameras):
            yield "cameras", "\n".join(map(_camera, choices))
        stats = read_norm_stats(directory, config, norm_stats_path)
        yield "statistics", "\n".join([f"{_statistics(stats.stats)}; found: {stats.place}", *_floors(stats)])
        if config.tokenizer == "paligemma":
            yield "tokenizer", _tokenizer(config)
        if misfit := attempt(refuse_other_robots, config):
            yield "not LIBERO", misfit
        with torch.device("meta"):
            network = PI0Policy(config, stats.stats).network
        sources = pair(header, {name: weight.shape for name, weight in network.named_parameters()})
        require_finite(header)
    except InputError as error:
        yield STOP, str(error)
        return
    if unread := [key for name, key in header.keys.items() if name not in sources.values()]:
        yield "not used", "\n".join(unread)
    yield FITS, f"all {len(sources)} tensors of the network are there and finite, and nothing else"


def _weights(header: Header) -> str:
    sizes: Counter[str] = Counter()
    for name, dtype in header.dtypes.items():
        sizes[str(dtype).removeprefix("torch.")] += math.prod(header.shapes[name])
    types = ", ".join(f"{_millions(count)} {dtype}" for dtype, count in sizes.most_common())
    return f"{len(header.shapes)} tensors, {_millions(sizes.total())} parameters: {types}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _config(config: Pi0Config) -> str:
    return (
        f"chunks of {config.action_horizon} actions of {config.action_dim} features; the robot uses "
        f"{config.robot_action_dim}; its state has {config.robot_state_dim}\n"
        f"cameras {', '.join(config.cameras)} at {config.image_size} pixels; prompt of {config.prompt_length} tokens"
    )


def _camera(choice: CameraChoice) -> str:
    return str(choice) + (
        "; if that is wrong, state the cameras: --cameras" if choice.how is How.ORDER else ""
    )


def _statistics(stats: NormStats | None) -> str:
    if stats is None:
        return "none, but acting needs them: name a norm_stats.json as norm_stats_path"
    quantiles = "with" if stats.state.q01 is not None and stats.actions.q01 is not None else "without"
    return f"state of {len(stats.state.mean)}, actions of {len(stats.actions.mean)} features, {quantiles} quantiles"


def _floors(found: FoundStats) -> list[str]:
    new = [f"{line}, because the feature is constant" for line in found.floors]
    stored = found.stats.floors[: -len(new) or None] if found.stats else ()
    return [*(f"{line} when they were computed" for line in stored), *new]


def _tokenizer(config: Pi0Config) -> str:
    try:
        tokenizer = PaligemmaTokenizer(config.tokenizer_path, config.prompt_length)
    except InputError as error:
        return f"acting needs it: {error}"
    return f"PaliGemma's, {tokenizer.path}"


if __name__ == "__main__":
    run_command(main)
