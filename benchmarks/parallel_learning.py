"""Does parallel PPO learn, how fast, and is it the reward that it learns from? Runs on Airstriker, with controls.

    make game peers                                           # the emulator, and the other trainers in .venv-peers
    python benchmarks/parallel_learning.py                    # 10 minutes for each run and seed, with nothing beside it
    python benchmarks/parallel_learning.py --runs overlap stable-baselines3 --seeds 0 1 2 --minutes 10
    python benchmarks/parallel_learning.py --runs overlap --seeds 0 --minutes 0.5 --episodes 2    # does it run?
    python benchmarks/parallel_learning.py --table benchmarks/results/parallel_learning --picture outputs/parallel_learning.png

| run | what it is |
|---|---|
| overlap, sync, async | `python -m pi0.parallel.train_parallel` in that mode with configs/parallel_quickstart.yaml |
| float32 | overlap, with convolutions in float32 |
| shuffled | overlap, but each transition has the advantage of another |
| combinations | overlap, with a logit for each combination of buttons |
| defaults | overlap, with the trainer's defaults: CleanRL's settings for Atari |
| stable-baselines3 | its PPO with 8 environments; settings, network, actions (`MultiDiscrete`) and frames as of overlap |

Each run first gets a short one of its own that shows how many updates fit the minutes; the learning rate falls to 0 over
that number. Stable-Baselines3 runs with 1 or 2 torch threads, whichever is faster. Scores are raw ones of whole
episodes: of the untrained policy, `--episodes` of them; of training, the last 100. A score is reached when the mean of
the last 100 episodes is that high. Intervals are Student's, 95%. Finished runs are kept, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from processes import PEERS, PEERS_PYTHON, end_on_sigterm, require_peers, start

from benchmarks.figures import save
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import write_json
from pi0.base.progress import progress
from pi0.base.stats import format_mean, mean_interval
from pi0.parallel.config import Config, load_config

CONFIG = ROOT / "configs" / "parallel_quickstart.yaml"
# What that file changes of how the agent learns.
DEFAULTS = {name: getattr(Config(), name) for name in ("lr", "clip", "entropy_weight")}
SB3 = "stable-baselines3"
OURS: dict[str, list[str]] = {
    "overlap": [],
    "sync": ["--mode", "sync"],
    "async": ["--mode", "async"],
    "float32": ["--precision", "float32"],
    "shuffled": ["--shuffle_advantages", "true"],
    "combinations": ["--factored", "false"],
    "defaults": [f"--{name}={default}" for name, default in DEFAULTS.items()],
}
RUNS = (*OURS, SB3)
SHORT = 6  # updates of the run that shows the speed; the first two do not count
RECENT = 100  # episodes of a score of training
Line = dict[str, Any]  # seconds since training began, steps, and the scores of the episodes that ended


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", action=Collect, nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", action=Collect, nargs="+", type=ranged(int, low=0), default=[0, 1, 2])
    parser.add_argument("--minutes", type=ranged(float, above=0), default=10.0, help="training of each run")
    parser.add_argument(
        "--episodes", type=ranged(int, low=2), default=100, help="of the scores before and after `overlap`"
    )
    parser.add_argument(
        "--scores", action=Collect, nargs="+", type=ranged(float, low=0), default=[200.0, 250.0, 300.0],
        help="the table says when each is reached",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="outputs/parallel_learning", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument("--table", metavar="FOLDER", help="only print the tables of this folder")
    parser.add_argument("--picture", metavar="FILE", help="draw the learning curves there, a PNG")
    options = parser.parse_args()
    folder = Path(options.table or options.output)
    if not options.table:
        measure(options, folder)
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-seed*/learned.json"))]
    if not runs:
        parser.error(f"{folder} has no finished run")
    print(tables(runs, options.scores))
    if options.picture:
        draw(runs, Path(options.picture))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Make the runs that are missing; all kinds of a seed before the next seed."""
    if SB3 in options.runs:
        require_peers()
    end_on_sigterm()
    missing = [
        (run, seed)
        for seed in options.seeds
        for run in options.runs
        if not (folder / f"{run}-seed{seed}" / "learned.json").exists()
    ]
    if not missing:
        return
    with progress(total=len(missing), label="learning", unit="run") as bar:
        for run, seed in missing:
            learned = learn(run, seed, folder, options)
            scores = [score for line in learned["lines"] for score in line["scores"]]
            bar.update(1, f"{run}, seed {seed}: {format_mean(scores[-RECENT:])}")


def learn(run: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; what it gave is also in learned.json of its folder."""
    from pi0.training.machine import machine  # takes seconds: not for `--help`

    rate, threads = speed(run, folder)
    place = folder / f"{run}-seed{seed}"
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
    a_update = rate["transitions"] / rate["steps_per_s"]
    updates = max(1, int(60 * options.minutes / a_update))
    episodes = options.episodes if run == "overlap" else 0
    lines, scores = train(run, place, updates, seed, threads, episodes)
    learned = {
        "run": run, "seed": seed, "updates": updates, "threads": threads, "minutes": options.minutes,
        "lines": lines, "scores": scores, "machine": machine(),
    }  # fmt: skip
    write_json(place / "learned.json", learned)
    return learned


def speed(run: str, folder: Path) -> tuple[dict[str, float], int]:
    """Steps a second and transitions of an update, and the torch threads with which a run is fastest; measured once."""
    file = folder / f"{run}-speed.json"
    if not file.exists():
        found = {}
        for threads in (1, 2) if run == SB3 else (0,):
            place = folder / f"{run}-short"
            shutil.rmtree(place, ignore_errors=True)
            lines, _ = train(run, place, SHORT, 0, threads, 0)
            first, last = lines[1], lines[-1]
            steps, seconds = (last[name] - first[name] for name in ("steps", "seconds"))
            found[threads] = {"transitions": steps / (SHORT - 2), "steps_per_s": steps / seconds}
        write_json(file, found)
    rates = json.loads(file.read_text())
    best = max(rates, key=lambda threads: rates[threads]["steps_per_s"])
    return rates[best], int(best)


def train(
    run: str, place: Path, updates: int, seed: int, threads: int, episodes: int
) -> tuple[list[Line], dict[str, Any]]:
    """A training: its lines, one for each update, and the scores before and after that were asked for."""
    place.mkdir(parents=True)
    if run == SB3:
        file = place / "lines.jsonl"
        start(
            PEERS_PYTHON, PEERS / "learning.py", "--updates", updates, "--seed", seed, "--threads", threads,
            "--output", file, *(f"--{name}={getattr(load_config(CONFIG, []), name)}" for name in DEFAULTS),
        )  # fmt: skip
        return read(file), {}
    start(
        sys.executable, "-m", "pi0.parallel.train_parallel", "--config_path", CONFIG, *OURS[run], "--seed", seed,
        "--max_updates", updates, "--max_episodes", 10**9, "--evaluation_episodes", episodes, "--render", "true" if episodes else "false",
        "--max_checkpoints", 2, "--logging.use_wandb", "false", "--output_dir", place, "--exp_name", "run",
    )  # fmt: skip
    (made,) = place.glob("run-*")
    lines = [
        {name: line[name] for name in ("seconds", "steps", "scores")} for line in read(made / "metrics.jsonl")
    ]
    scores = json.loads((made / "results.json").read_text())["scores"]
    ways = {
        when: {how: of_way["scores"] for how, of_way in scores[when].items()} for when in ("before", "after")
    }
    return lines, ways


def read(file: Path) -> list[Line]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


# Tables -------------------------------------------------------------------------------------------


def tables(runs: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> str:
    """Scores of each run; the means over seeds; minutes to scores and how they compare."""
    untrained = {
        each["seed"]: each["scores"]["before"]["sampled"] for each in runs if each["scores"].get("before")
    }
    lines = [
        "| run | seed | minutes | steps | untrained | last 100 episodes | over untrained | intervals apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in ordered(runs):
        last = scores_of(each)[-RECENT:]
        before = untrained.get(each["seed"])
        minutes, steps = each["lines"][-1]["seconds"] / 60, each["lines"][-1]["steps"]
        compared = "- | - | "
        if before:
            apart = mean_interval(before)[2] < mean_interval(last)[1]
            compared = (
                f"{statistics.mean(last) / statistics.mean(before):.2f} | {'yes' if apart else 'no'} | "
            )
        cells = (
            each["run"],
            each["seed"],
            f"{minutes:.1f}",
            f"{steps:,}",
            format_mean(before or []),
            format_mean(last),
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {compared.strip()}")
    lines += ["", "| run | seeds | mean of the last 100 episodes, over seeds |", "|---|---|---|"]
    for name in RUNS:
        means = [statistics.mean(scores_of(each)[-RECENT:]) for each in runs if each["run"] == name]
        if means:
            lines.append(f"| {name} | {len(means)} | {statistics.mean(means):.1f} |")
    lines += ["", "| score of whole episodes, overlap | seed | before | after |", "|---|---|---|---|"]
    for each in ordered(runs):
        for how in each["scores"].get("before", {}):
            cells = [format_mean(each["scores"][when][how]) for when in ("before", "after")]
            lines.append(f"| {how} | {each['seed']} | {' | '.join(cells)} |")
    names = [run for run in RUNS if any(each["run"] == run for each in runs)]
    lines += ["", "| minutes to a score of | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for level in levels:
        cells = []
        for name in names:
            times = [minutes_to(level, each) for each in ordered(runs) if each["run"] == name]
            cells.append(", ".join("not reached" if time is None else f"{time:.1f}" for time in times))
        lines.append(f"| {level:g} | {' | '.join(cells)} |")
    machine = runs[0]["machine"]
    threads = sorted({each["threads"] for each in runs if each["run"] == SB3})
    of_peer = f"; {SB3} with {' or '.join(map(str, threads))} torch threads" if threads else ""
    lines += ["", f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}{of_peer}"]
    return "\n".join(lines)


def ordered(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In the order of `RUNS`, then of seeds."""
    return sorted(runs, key=lambda each: (RUNS.index(each["run"]), each["seed"]))


def scores_of(run: Mapping[str, Any]) -> list[float]:
    """All raw scores of training, in order."""
    return [score for line in run["lines"] for score in line["scores"]]


def curve(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Minutes and the mean of the last 100 episodes, once there were so many."""
    scores: list[float] = []
    found = []
    for line in run["lines"]:
        scores += line["scores"]
        if len(scores) >= RECENT:
            found.append((line["seconds"] / 60, statistics.mean(scores[-RECENT:])))
    return found


def minutes_to(level: float, run: Mapping[str, Any]) -> float | None:
    """When the mean of the last 100 episodes first was so high; None: never."""
    return next((minutes for minutes, score in curve(run) if score >= level), None)


def draw(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Learning curves, one colour for each kind of run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for each in ordered(runs):
        color = f"C{RUNS.index(each['run'])}"
        first = each["seed"] == min(other["seed"] for other in runs if other["run"] == each["run"])
        axis.plot(
            *zip(*curve(each), strict=True), color=color, label=each["run"] if first else None, linewidth=1.2
        )
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("raw score, last 100 episodes")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    save(figure, file)


if __name__ == "__main__":
    run_command(main)
