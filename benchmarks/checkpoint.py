"""How much memory and time does it take to load a published policy, and to act with it once?

    python benchmarks/checkpoint.py                          # full size: 7 GB of disk, 9 GB of memory, minutes
    python benchmarks/checkpoint.py --stored float32         # 14 GB of disk and, to write it, of memory
    python benchmarks/checkpoint.py --shrink 8               # widths and vocabulary an eighth: seconds

It writes a policy folder with the published model's tensors and random weights, as openpi's converter does, loads it
in another process and samples one chunk of actions on the CPU. Memory is the resident memory of that process. The
ratio is the most memory that loading needed, divided by the size of the weights in their target type.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file

from pi0 import PI0Policy
from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.model.config import Pi0Config
from pi0.model.network import Pi0Network
from pi0.policy.tensor_names import EMBEDDING, OUTPUT_HEAD, UNUSED, file_name


def main() -> None:
    """Write, load, sample, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shrink", type=int, default=1, choices=[1, 2, 4, 8], help="divisor of all widths")
    parser.add_argument(
        "--stored", default="bfloat16", choices=["float32", "bfloat16"], help="type in the file"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="type to load in"
    )
    parser.add_argument(
        "--steps", type=ranged(int, low=0), default=10, help="Euler steps of sampling; 0: load only"
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="folder for the temporary files")
    parser.add_argument("--load", metavar="FOLDER", help="only load this policy, and print time and memory")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_and_sample(options.load, getattr(torch, options.dtype), options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        started = time.monotonic()
        write_checkpoint(Path(folder), options.shrink, getattr(torch, options.stored))
        written = time.monotonic() - started
        size = (Path(folder) / "model.safetensors").stat().st_size
        arguments = ["--load", folder, "--dtype", options.dtype, "--steps", str(options.steps)]
        run = subprocess.run(
            [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
    result = json.loads(run.stdout)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    print(
        f"{torch.get_num_threads()} threads; widths / {options.shrink}; {options.stored} to {options.dtype}"
    )
    print(f"file                    {size / 1e9:8.2f} GB, written in {written:.0f} s")
    print(f"parameters              {result['parameters'] / 1e6:8.1f} M, {result['weights'] / 1e9:.2f} GB")
    print(f"loaded in               {result['load_seconds']:8.1f} s")
    print(
        f"peak while loading      {result['load_peak'] / 1e9:8.2f} GB, {result['ratio']:.3f} of the weights"
    )
    if options.steps:
        print(f"sampled one chunk in    {result['sample_seconds']:8.1f} s, {options.steps} steps")
        print(f"peak of the process     {result['peak'] / 1e9:8.2f} GB")


def write_checkpoint(directory: Path, shrink: int, dtype: torch.dtype) -> None:
    """Write a folder like openpi's converter: random weights, and a configuration without sizes."""
    config = shrunk(Pi0Config.preset("pi0"), shrink)
    with torch.device("meta"):
        shapes = {file_name(name): p.shape for name, p in Pi0Network(config).named_parameters()}
    shapes[UNUSED] = torch.Size([config.vocab_size, config.action_expert.width])
    torch.manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=dtype).normal_(std=0.02 if len(shape) > 1 else 0.0)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={EMBEDDING: OUTPUT_HEAD})
    content = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(content))


def shrunk(config: Pi0Config, divisor: int) -> Pi0Config:
    """The same model with widths, head sizes, MLPs and vocabulary divided; depths and tokens stay."""

    def divide(dims, *names):
        return dataclasses.replace(dims, **{name: getattr(dims, name) // divisor for name in names})

    return dataclasses.replace(
        config,
        vision=divide(config.vision, "width", "mlp_dim", "num_heads"),
        gemma=divide(config.gemma, "width", "mlp_dim", "head_dim"),
        action_expert=divide(config.action_expert, "width", "mlp_dim", "head_dim"),
        vocab_size=config.vocab_size // divisor,
    )


def load_and_sample(path: str, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Load a policy and sample one chunk; returns seconds and bytes of this process."""
    PI0Policy.from_pretrained(ROOT / "checkpoints" / "pi0_tiny_libero_spatial")  # so that all is imported
    reset_peak()
    before, started = status("VmRSS"), time.monotonic()
    policy = PI0Policy.from_pretrained(path, dtype=dtype)
    result = {"load_seconds": time.monotonic() - started, "load_peak": status("VmHWM") - before}
    weights = [*policy.network.parameters()]
    result["parameters"] = sum(p.numel() for p in weights)
    result["weights"] = sum(p.numel() * p.element_size() for p in weights)
    result["ratio"] = result["load_peak"] / result["weights"]
    if steps:
        config, started = policy.config, time.monotonic()
        size = config.image_size
        actions = policy.sample_actions(
            images={name: torch.rand(1, 3, size, size) * 2 - 1 for name in config.cameras},
            image_masks={name: torch.ones(1, dtype=torch.bool) for name in config.cameras},
            state=torch.randn(1, config.action_dim),
            tokenized_prompt=torch.randint(config.vocab_size, (1, config.prompt_length)),
            tokenized_prompt_mask=torch.ones(1, config.prompt_length, dtype=torch.bool),
            noise=torch.randn(1, config.action_horizon, config.action_dim),
            num_steps=steps,
        )
        if not actions.isfinite().all():
            raise SystemExit("the sampled actions are not finite")
        result["sample_seconds"] = time.monotonic() - started
    return result | {"peak": status("VmHWM")}


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """Reset VmHWM, the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    run_command(main)
