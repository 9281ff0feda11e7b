"""Our critics beside qc's own code, on OGBench's cube-single: same data, sizes and updates. Prints tables.

    make qc                                                            # OGBench and what qc imports, in .venv-qc
    git clone https://github.com/ColinQiyangLi/qc ../qc
    python benchmarks/qc.py --qc ../qc --seeds 0 1 2
    python benchmarks/qc.py --qc ../qc --seeds 0 --updates 100 --episodes 2 --count 2 --output outputs/qc_rehearsal
    python benchmarks/qc.py --table benchmarks/results/qc

Data are episodes of OGBench's own oracle ("play": it moves the cube from place to place) with the rewards of a task: 0 where
the cube is in its place, -1 elsewhere. Both sides clone it with a flow of chunks, learn two critics of chunks, and act with the
best of N chunks: qc with `actor_type=best-of-n`, ours with `acrlpd.awr_weight=0`, `best_weight=0` and `bc_loss_weight=1`, all
episodes counted as successful. Networks have the same hidden layers, with their own inner shape on each side. Seeds of the
scored first states are the same. What differs is what the trainers differ in: ours counts windows in which an episode ends,
clamps targets to possible values, feeds the chunk in at every layer of the critics, and acts with averages of the weights.

qc's repository is not part of this project; its code runs unchanged from the folder given.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.processes import PEERS, run
from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent, LossSettings
from pi0.acrlpd.loss_functions import possible_values
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import InputError, run_command
from pi0.base.files import write_json
from pi0.base.progress import progress
from pi0.base.stats import format_rate, mean_interval
from pi0.policy.critics import CriticNetworks
from pi0.training.machine import machine
from pi0.training.memory import release

PYTHON = ROOT / ".venv-qc" / "bin" / "python"
CUBE = PEERS / "cube.py"
SIDES = ("qc", "ours")
FLOW_STEPS = 10


def main() -> None:
    """Make data, learn and score what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qc", type=Path, help="folder of qc's repository")
    parser.add_argument("--sides", action=Collect, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", action=Collect, nargs="+", type=ranged(int, low=0), default=[0, 1, 2])
    parser.add_argument("--task", type=ranged(int, low=1, high=5), default=2, help="of cube-single")
    parser.add_argument(
        "--episodes", type=ranged(int, low=1), default=100, help="of the oracle, 1000 steps each"
    )
    parser.add_argument("--updates", type=ranged(int, low=1), default=20_000)
    parser.add_argument("--hidden", type=ranged(int, low=1), default=128, help="width of hidden layers")
    parser.add_argument("--samples", type=ranged(int, low=1), default=8, help="chunks of the best of N")
    parser.add_argument("--count", type=ranged(int, low=1), default=100, help="episodes of a score")
    parser.add_argument("--output", type=Path, default=Path("outputs/qc"), help="finished runs are kept")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only print the tables of this folder")
    options = parser.parse_args()
    if options.table:
        print(tables(options.table))
        return
    if not PYTHON.exists():
        raise InputError("OGBench and what qc imports are not installed (.venv-qc): run `make qc`")
    if "qc" in options.sides and not (options.qc and (options.qc / "agents" / "acfql.py").is_file()):
        raise InputError(
            f"--qc {options.qc} is no checkout of qc; git clone https://github.com/ColinQiyangLi/qc, and give its folder"
        )
    settings = {
        "task": options.task, "updates": options.updates, "hidden": options.hidden, "layers": 3, "batch": 256,
        "samples": options.samples, "horizon": 5, "discount": 0.99, "lr": 3e-4, "target_update_rate": 0.005,
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / f"task{options.task}-{options.episodes}.npz"
    if not data.is_file():
        unfinished = data.with_suffix(".part.npz")
        print(f"making {options.episodes} episodes of data")
        run(
            PYTHON,
            CUBE,
            "data",
            "--task",
            options.task,
            "--episodes",
            options.episodes,
            "--output",
            unfinished,
            shows_errors=True,
        )
        unfinished.rename(data)
    for number, seed in enumerate(options.seeds):
        for side in options.sides if number % 2 == 0 else reversed(options.sides):
            file = options.output / f"{side}-seed{seed}.json"
            if file.is_file():
                continue
            began = time.monotonic()
            found = {"qc": learn_theirs, "ours": learn_ours}[side](data, seed, settings, options)
            solved = sum(found["outcomes"])
            write_json(
                file,
                {
                    "side": side, "seed": seed, "settings": settings, "data": data.name, **found,
                    "minutes": (time.monotonic() - began) / 60, "machine": machine(),
                },
            )  # fmt: skip
            print(f"{side}, seed {seed}: {format_rate(solved, options.count)}")
    print(tables(options.output))


def learn_theirs(
    data: Path, seed: int, settings: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """qc's learner, in its own environment."""
    return run(
        PYTHON, CUBE, "learn", "--qc", options.qc, "--data", data, "--seed", seed, "--count", options.count,
        "--task", options.task, "--settings", json.dumps(settings), shows_errors=True,
    )  # fmt: skip


# Ours ---------------------------------------------------------------------------------------------


class ChunkFlow(nn.Module):
    """A flow of chunks that is an MLP of state, noisy chunk and time, which is 1 at the noise.

    Args:
        state_dim, action_dim: features of a state and of an action.
        chunk: actions of a chunk.
        hidden, layers: of the MLP.
    """

    def __init__(self, state_dim: int, action_dim: int, chunk: int, hidden: int, layers: int):
        super().__init__()
        self.chunk, self.action_dim = chunk, action_dim
        widths = [state_dim + chunk * action_dim + 1, *[hidden] * layers]
        parts: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            parts += [nn.Linear(inputs, outputs), nn.GELU()]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, chunk * action_dim))

    def velocity(self, state: Tensor, chunks: Tensor, time: Tensor) -> Tensor:
        """[..., S], [..., C, A], [...] to [..., C, A]."""
        x = torch.cat([state, chunks.flatten(-2), time[..., None]], -1)
        return self.layers(x).unflatten(-1, (self.chunk, self.action_dim))

    @torch.no_grad()
    def sample(self, observations: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """See `pi0.acrlpd.actor.Actor`."""
        state = observations["state"].expand(len(noise), -1, -1)
        for step in range(FLOW_STEPS):
            time = torch.full(noise.shape[:2], 1 - step / FLOW_STEPS)
            noise = noise - self.velocity(state, noise, time) / FLOW_STEPS
        return noise

    def flow_loss(
        self,
        observations: Mapping[str, Tensor],
        actions: Tensor,
        valid: Tensor,
        generator: torch.Generator,
        samples: int,
    ) -> Tensor:
        """See `pi0.acrlpd.actor.Actor`."""
        kinds, batch = actions.shape[:2]
        noise = torch.randn(samples, *actions.shape, generator=generator)
        time = torch.rand(samples, kinds, batch, generator=generator)
        noisy = time[..., None, None] * noise + (1 - time[..., None, None]) * actions
        state = observations["state"].expand(samples, kinds, -1, -1)
        errors = (self.velocity(state, noisy, time) - (noise - actions)).square().mean((0, 4))
        return (errors * valid).sum(-1) / valid.sum(-1).clamp(min=1)

    def carried_out(self, actions: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """See `pi0.acrlpd.actor.Actor`."""
        return actions.clamp(-1, 1)

    def copy(self) -> ChunkFlow:
        """See `pi0.acrlpd.actor.Actor`."""
        return copy.deepcopy(self)


class States(nn.Module):
    """What critics see: the state."""

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """[B, S]."""
        return observations["state"]


class Windows:
    """Windows of H steps that begin anywhere in the data.

    A window ends with the step that put the cube in its place or with its episode; the chunk is what the data do after it
    began.

    Args:
        data: of `cube.py data`.
        horizon: H.
    """

    def __init__(self, data: Mapping[str, np.ndarray], horizon: int):
        self._data = {name: torch.from_numpy(values) for name, values in data.items()}
        self._horizon = horizon

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Any]:
        """A batch as in docs/acrlpd.md."""
        data, steps = self._data, torch.arange(self._horizon)
        starts = torch.randint(len(data["actions"]) - self._horizon + 1, (count,), generator=generator)
        rows = starts[:, None] + steps
        placed, ended = data["masks"][rows] == 0, data["terminals"][rows] > 0
        over = (placed | ended).int().cumsum(1)
        valid = (over - (placed | ended).int() == 0).float()
        last = valid.sum(1).long() - 1
        done = placed.gather(1, last[:, None])[:, 0]
        now, then = data["observations"][starts], data["next_observations"][starts + last]
        yes = torch.ones(count, dtype=torch.bool)
        return {
            "observations": {"state": now},
            "next_observations": {"state": then},
            "actions": data["actions"][rows],
            "rewards": data["rewards"][rows] * valid,
            "masks": 1 - placed.int().cumsum(1).clamp(max=1).float(),
            "valid": valid,
            "terminals": over > 0,
            "next_terminal": done,
            "sequence_mask": yes,
            "success": yes,
        }


def learn_ours(
    data: Path, seed: int, settings: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Our agent, with a small flow for its actor."""
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}
    agent = make_agent(arrays["observations"].shape[1], arrays["actions"].shape[1], seed, settings)
    windows, order = Windows(arrays, settings["horizon"]), torch.Generator().manual_seed(seed)
    release()  # as the trainer does
    started = time.perf_counter()
    with progress(total=settings["updates"], label=f"ours, seed {seed}", unit="update") as bar:
        for number in range(settings["updates"]):
            info = agent.train_step(windows.draw(settings["batch"], order))[1]
            bar.update(1, f"critic loss {info['critic_loss']:.4f}" if number % 50 == 0 else "")
    seconds = time.perf_counter() - started
    return {"outcomes": play_ours(agent, options), "updates_per_s": settings["updates"] / seconds}


def make_agent(state_dim: int, action_dim: int, seed: int, settings: Mapping[str, Any]) -> ACRLPDPi0Agent:
    """An agent with the settings of both sides."""
    torch.manual_seed(seed)
    horizon, hidden, layers = settings["horizon"], settings["hidden"], settings["layers"]
    actor = ChunkFlow(state_dim, action_dim, horizon, hidden, layers)
    critics = CriticNetworks(state_dim, state_dim, horizon, action_dim, 2, hidden, layers)
    return ACRLPDPi0Agent(
        actor,
        critics,
        States(),
        settings["samples"],
        horizon,
        action_dim,
        settings["discount"],
        settings["target_update_rate"],
        bc_loss_weight=1.0,
        pi0_opt_state=torch.optim.Adam(actor.parameters(), settings["lr"], fused=True),
        critic_opt_state=torch.optim.Adam(critics.parameters(), settings["lr"], fused=True),
        settings=LossSettings(
            aggregation="mean",
            awr_weight=0,
            best_weight=0,
            flow_samples=1,
            value_range=possible_values(-1.0, 0.0, 10**6, settings["discount"]),
            grad_norm=math.inf,
        ),
        seed=seed,
    )


@torch.no_grad()
def play_ours(agent: ACRLPDPi0Agent, options: argparse.Namespace) -> list[bool]:
    """Outcomes of episodes with the best of N chunks; the simulation runs in its own environment."""
    command = [PYTHON, CUBE, "play", "--task", options.task, "--count", options.count]
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "outcomes" in message:
                return message["outcomes"]
            seen = {"state": torch.tensor([message["seen"]], dtype=torch.float32)}
            candidates = agent.sample(seen)
            observed = agent.critic_ema.observe(agent.features(seen), seen["state"])
            best, _ = agent.best_of(candidates, observed, seen)
            process.stdin.write(json.dumps(candidates[best[0], 0].tolist()) + "\n")
            process.stdin.flush()
    raise InputError(f"{CUBE.name} ended with status {process.returncode} before its episodes were played")


# Tables -------------------------------------------------------------------------------------------


def tables(folder: Path) -> str:
    """Scores of each seed, their means, the difference, and updates a second."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*-seed*.json"))]
    if not found:
        raise InputError(f"{folder} holds no finished run")
    lines = ["| side | seed | in its place | updates/s | minutes |", "|---|---|---|---|---|"]
    rates: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for each in found:
        outcomes = each["outcomes"]
        rates[each["side"]][each["seed"]] = 100 * sum(outcomes) / len(outcomes)
        lines.append(
            f"| {each['side']} | {each['seed']} | {format_rate(sum(outcomes), len(outcomes))} | "
            f"{each['updates_per_s']:.1f} | {each['minutes']:.1f} |"
        )
    lines += ["", "| side | seeds | mean, % |", "|---|---|---|"]
    for side, of_side in rates.items():
        if of_side:
            lines.append(f"| {side} | {len(of_side)} | {interval(list(of_side.values()))} |")
    both = sorted(set(rates["qc"]) & set(rates["ours"]))
    if both:
        gains = [rates["ours"][seed] - rates["qc"][seed] for seed in both]
        lines.append(f"| ours less qc, points | {len(both)} | {interval(gains)} |")
    settings = found[0]["settings"]
    lines += [
        "",
        ", ".join(f"{name} {value}" for name, value in settings.items()) + f", data {found[0]['data']}",
    ]
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Mean with Student's 95% interval over seeds: "81.0 (70.2 to 91.8)"."""
    mean, low, high = mean_interval(list(values))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    run_command(main)
