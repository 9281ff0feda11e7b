"""What does the network cost? Size, loading, sampling and training steps, in time and memory; prints tables.

    python benchmarks/pi0.py --preset pi0_tiny --repeats 20       # seconds
    python benchmarks/pi0.py --shrink 4                           # the published proportions, widths a quarter: minutes
    python benchmarks/pi0.py --device cuda --dtypes bfloat16 --batches 1 8     # full size, on a card of 80 GB
    python benchmarks/pi0.py --tables sampling sharing --compile

Weights and inputs are random; the measurements do not depend on them. Every row is measured in a process of its own,
after two calls that do not count, and is a median (lowest to highest). Ratios compare neighbours that take turns in
one process. Memory is the most that was allocated on the GPU, or resident in the process, with the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from benchmarks.checkpoint import reset_peak, shrunk, status, write_checkpoint
from pi0 import PI0Policy, pick_device
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import write_json
from pi0.model.config import Pi0Config
from pi0.model.network import Pi0Network
from pi0.training.machine import machine
from pi0.training.optimizer import make_optimizer
from pi0.training.settings import OptimizerConfig

GROUP = 8  # rollouts that begin from one observation
LEAST_GAIN = 3.0  # goal for sharing its prefix, at the published proportions
WARM_UP = 2
TABLES = ("model", "sampling", "sharing", "training")


def main() -> None:
    """Measure every row in a process of its own, save, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="pi0", choices=["pi0", "pi05", "pi0_tiny", "pi05_tiny"])
    parser.add_argument("--shrink", type=int, default=1, choices=[1, 2, 4, 8], help="divisor of all widths")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: the GPU if there is one")
    parser.add_argument("--threads", type=ranged(int, low=1), help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--dtypes", action=Collect, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--batches",
        action=Collect,
        nargs="+",
        type=ranged(int, low=1),
        default=[1, 8],
        help="observations at once",
    )
    parser.add_argument(
        "--steps",
        action=Collect,
        nargs="+",
        type=ranged(int, low=1),
        help="Euler steps; default: one, and the preset's",
    )
    parser.add_argument(
        "--trainable",
        action=Collect,
        nargs="+",
        default=["all", "expert", "lora"],
        choices=["all", "without_vision", "expert", "lora"],
        help="what a training step trains",
    )
    parser.add_argument("--train-batch", type=ranged(int, low=1), default=4, help="chunks in a training step")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile beside eager")
    parser.add_argument("--repeats", type=ranged(int, low=1), default=5, help="timed calls of each row")
    parser.add_argument("--tables", action=Collect, nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--output", default="outputs/pi0.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(json.loads(options.row))))
        return
    done = []
    for row in rows(options):
        run = subprocess.run(
            [sys.executable, __file__, "--row", json.dumps(row)],
            capture_output=True,
            text=True,
            check=False,
        )
        outcome = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else failure(run)
        done.append({**row, **outcome})
        print(f"{label(row)}: {shown(done[-1])}", flush=True)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(options.output), {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": done})
    print_tables(done)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows to measure, a dictionary for each process."""
    common = {name: getattr(options, name) for name in ("preset", "shrink", "device", "threads", "repeats")}
    steps = options.steps or [1, Pi0Config.preset(options.preset).num_steps]
    passes = [False, True] if options.compile else [False]
    made: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        if "model" in options.tables and options.preset == "pi0":  # `write_checkpoint` writes only this one
            made.append({"table": "model", "dtype": dtype})
        if "sampling" in options.tables:
            made += [
                {"table": "sampling", "dtype": dtype, "compile": compiled, "batch": batch, "steps": count}
                for compiled in passes
                for batch in options.batches
                for count in steps
            ]
        if "sharing" in options.tables:
            made += [{"table": "sharing", "dtype": dtype, "compile": compiled} for compiled in passes]
        if "training" in options.tables:
            made += [
                {
                    "table": "training",
                    "dtype": dtype,
                    "compile": compiled,
                    "batch": options.train_batch,
                    "trainable": trainable,
                    "checkpointing": checkpointing,
                }
                for compiled in passes
                for trainable in options.trainable
                for checkpointing in (False, True)
                # torch.compile itself decides what to keep for the backward pass.
                if not (compiled and checkpointing)
            ]
    return [common | row for row in made]


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Measure one row, in this process."""
    if row["threads"]:
        torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    kind = {"model": load, "sampling": sample, "sharing": share, "training": train}[row["table"]]
    with torch.set_grad_enabled(row["table"] == "training"):
        return kind(row, pick_device(row["device"]))


def load(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Load a file of the published tensors from disk to the device."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), row["shrink"], torch.bfloat16)
        PI0Policy.from_pretrained(ROOT / "checkpoints" / "pi0_tiny_libero_spatial")  # so that all is imported
        reset_peak()
        before, started = status("VmRSS"), time.perf_counter()
        policy = PI0Policy.from_pretrained(folder, device, getattr(torch, row["dtype"]))
        wait_for(device)
        seconds = time.perf_counter() - started
        parameters = list(policy.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "seconds": [seconds],
            "memory": memory(device) - (0 if device.type == "cuda" else before),
        }


def sample(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Sample action chunks for a batch of observations."""
    policy = make_policy(row, device)
    inputs = observations(policy, row["batch"])
    noise = noise_for(policy, row["batch"])
    seconds = timed(
        lambda: policy.sample_actions(**inputs, noise=noise, num_steps=row["steps"]), row["repeats"], device
    )
    return {"seconds": seconds, "memory": memory(device)}


def share(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Sample chunks of a group that begins from one observation: the prefix runs once, or once for each rollout."""
    policy = make_policy(row, device)
    once, noise = observations(policy, 1), noise_for(policy, GROUP)
    alike = {name: repeat(value, GROUP) for name, value in once.items()}

    def shared() -> Tensor:
        return policy.sample_actions(**once, noise=noise[:, None])[:, 0]

    def recomputed() -> Tensor:
        return policy.sample_actions(**alike, noise=noise)

    difference = (shared() - recomputed()).abs().max().item()
    tolerance = 0.2 if row["dtype"] == "bfloat16" else 1e-3
    if not difference < tolerance:
        raise SystemExit(f"sharing changes the actions by {difference}")
    seconds: dict[str, list[float]] = {"shared": [], "recomputed": []}
    for turn in range(WARM_UP + row["repeats"]):
        order = [("shared", shared), ("recomputed", recomputed)][:: 1 if turn % 2 else -1]
        for name, call in order:
            taken = timed(call, 1, device, warm_up=0)
            if turn >= WARM_UP:
                seconds[name] += taken
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds["shared"], "recomputed": seconds["recomputed"], "ratios": ratios}


def train(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Compute loss, gradients and an optimizer step for a batch of chunks."""
    policy = make_policy(row, device)
    policy.choose_trained(row["trainable"])
    policy.train()
    if row["checkpointing"]:
        policy.network.checkpoint_gradients()
    optimizer = make_optimizer(policy, 1e-5, OptimizerConfig())
    inputs = observations(policy, row["batch"])
    actions = noise_for(policy, row["batch"])

    def step() -> None:
        policy(**inputs, actions=actions).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, row["repeats"], device)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return {"seconds": seconds, "memory": memory(device), "trained": trained}


def make_policy(row: dict[str, Any], device: torch.device) -> PI0Policy:
    """A policy of the row's size with random weights, made on the device and in its type."""
    with torch.device("meta"):
        policy = PI0Policy(sized(row))
    low = policy.network.low_precision_parameters() if row["dtype"] == "bfloat16" else set()
    weights = {
        name: torch.empty(p.shape, dtype=torch.bfloat16 if name in low else torch.float32, device=device)
        .normal_(std=0.02 if p.ndim > 1 else 0.0)
        .requires_grad_(p.requires_grad)
        for name, p in policy.network.named_parameters()
    }
    trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    policy.network.load_state_dict(weights, assign=True)
    for name, parameter in policy.network.named_parameters():
        parameter.requires_grad_(name in trained)
    policy.compiled = row.get("compile", False)
    return policy.eval()


def sized(row: dict[str, Any]) -> Pi0Config:
    """The row's sizes."""
    config = Pi0Config.preset(row["preset"])
    return shrunk(config, row["shrink"]) if row["shrink"] > 1 else config


def observations(policy: PI0Policy, count: int) -> dict[str, Any]:
    """Random inputs of the network, with two cameras and a masked third one, as in LIBERO."""
    config, device = policy.config, policy.device
    pixels = (count, 3, config.image_size, config.image_size)
    return {
        "images": {name: torch.rand(pixels, device=device) * 2 - 1 for name in config.cameras},
        "image_masks": {
            name: torch.full((count,), index < 2, device=device) for index, name in enumerate(config.cameras)
        },
        "state": torch.randn(count, config.action_dim, device=device),
        "tokenized_prompt": torch.randint(config.vocab_size, (count, config.prompt_length), device=device),
        "tokenized_prompt_mask": torch.ones(count, config.prompt_length, dtype=torch.bool, device=device),
    }


def noise_for(policy: PI0Policy, count: int) -> Tensor:
    """Standard normal [count, horizon, action dim]."""
    return torch.randn(count, policy.config.action_horizon, policy.config.action_dim, device=policy.device)


def repeat(value: Any, count: int) -> Any:
    """A batch of one observation, `count` times."""
    if isinstance(value, dict):
        return {name: repeat(part, count) for name, part in value.items()}
    return value.expand(count, *value.shape[1:]).contiguous()


def timed(call: Callable[[], Any], repeats: int, device: torch.device, warm_up: int = WARM_UP) -> list[float]:
    """Seconds of each of `repeats` calls."""
    seconds = []
    for turn in range(warm_up + repeats):
        wait_for(device)
        started = time.perf_counter()
        call()
        wait_for(device)
        if turn >= warm_up:
            seconds.append(time.perf_counter() - started)
    return seconds


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> int:
    """Peak of memory until now, bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def failure(run: subprocess.CompletedProcess) -> dict[str, Any]:
    """Why a row has no numbers."""
    if run.returncode == -9 or "OutOfMemoryError" in run.stderr or "can't allocate memory" in run.stderr:
        return {"failed": "out of memory"}
    sys.exit(f"a row failed:\n{run.stderr[-3000:]}")


def label(row: dict[str, Any]) -> str:
    """Describe a row in words."""
    left_out = ("preset", "shrink", "device", "threads", "repeats", "table")
    return row["table"] + " " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in left_out)


def shown(row: dict[str, Any]) -> str:
    """A row's numbers as text."""
    if "failed" in row:
        return row["failed"]
    text = f"{spread([1000 * s for s in row['seconds']])} ms"
    return text + (f", ratio {spread(row['ratios'])}" if "ratios" in row else "")


def spread(values: list[float]) -> str:
    """Median, and lowest to highest if there are several."""
    middle, low, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def print_tables(done: list[dict[str, Any]]) -> None:
    """Print all rows as Markdown."""
    config = sized(done[0])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Pi0Network(config).parameters())
    print(
        f"\n{done[0]['preset']}, widths / {done[0]['shrink']}: {parameters / 1e6:.1f} M parameters, "
        f"{len(config.cameras)} cameras of {config.image_size} pixels, {config.prompt_length} prompt tokens, "
        f"chunks of {config.action_horizon}"
    )
    columns: dict[str, dict[str, Callable[[dict], str]]] = {
        "model": {
            "weights, GB": lambda r: f"{r['bytes'] / 1e9:.2f}",
            "loaded in, s": lambda r: spread(r["seconds"]),
            "peak while loading, GB": lambda r: f"{r['memory'] / 1e9:.2f}",
        },
        "sampling": {"ms": milliseconds, "peak, GB": gigabytes},
        "sharing": {
            f"group of {GROUP}, ms": milliseconds,
            "prefix for each, ms": lambda r: spread([1000 * s for s in r["recomputed"]]),
            f"ratio (goal: {LEAST_GAIN:g})": lambda r: spread(r["ratios"]),
        },
        "training": {
            "trained, M": lambda r: f"{r['trained'] / 1e6:.1f}",
            "ms": milliseconds,
            "peak, GB": gigabytes,
        },
    }
    for table, numbers in columns.items():
        chosen = [row for row in done if row["table"] == table]
        if not chosen:
            continue
        keys = [
            k for k in chosen[0] if k in ("dtype", "compile", "batch", "steps", "trainable", "checkpointing")
        ]
        print(f"\n| {' | '.join([*keys, *numbers])} |\n|{'---|' * (len(keys) + len(numbers))}")
        for row in chosen:
            values = [row.get("failed") or show(row) for show in numbers.values()]
            print(f"| {' | '.join([*(word(row[k]) for k in keys), *values])} |")


def milliseconds(row: dict[str, Any]) -> str:
    """A row's time."""
    return spread([1000 * seconds for seconds in row["seconds"]])


def gigabytes(row: dict[str, Any]) -> str:
    """A row's memory."""
    return f"{row['memory'] / 1e9:.2f}"


def word(value: Any) -> str:
    """A value of a row's key."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    run_command(main)
