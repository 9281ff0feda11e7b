"""How few demonstrations are enough? Clones 1, 3, 5 and 10 of each task, practises from each, over seeds. Prints tables.

    python benchmarks/few_demonstrations.py                                       # 12 runs of about 12 minutes on 2 cores
    python benchmarks/few_demonstrations.py --demonstrations 1 10 --seeds 0
    python benchmarks/few_demonstrations.py --demonstrations 1 --seeds 0 --rehearse        # does it run? the numbers mean nothing
    python benchmarks/few_demonstrations.py --table outputs/few_demonstrations --picture outputs/few_demonstrations.png

A run clones so many demonstrations of each of the quickstart's two tasks for `--cloning-minutes`, from new weights, and then
practises as configs/quickstart.yaml says, with as many rollouts in every run. Where practice solves nothing in its first
iteration there is nothing to learn from; the table shows it. Scores are of 100 of LIBERO's recorded states, the same before
and after. Finished runs are kept, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import save
from benchmarks.processes import call_python
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.stats import format_rate

SCRIPT, CONFIG = "13_train_production_ready.py", "configs/quickstart.yaml"
SHORT_CLONING = ("--score-every", "1", "--score-episodes", "2")
SHORT_RUN = (
    "training.num_train_steps=1", "algo.data_batch_size=4", "algo.rloo_batch_size=4", "task.max_episode_length=20",
    "algo.train_init_states=8", "evaluation.episodes=2", "features.save_video=false",
)  # fmt: skip


def main() -> None:
    """Make the runs that are missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--demonstrations", action=Collect, nargs="+", type=ranged(int, low=1), default=[1, 3, 5, 10],
        help="of each task",
    )  # fmt: skip
    parser.add_argument("--seeds", action=Collect, nargs="+", type=ranged(int, low=0), default=[0, 1, 2])
    parser.add_argument(
        "--cloning-minutes", type=ranged(float, low=0), default=3.0, help="cloning time of every run"
    )
    parser.add_argument(
        "--output", default="outputs/few_demonstrations", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="do the least of everything, in another folder"
    )
    parser.add_argument("--table", metavar="FOLDER", help="only print the table of this folder")
    parser.add_argument("--picture", metavar="FILE", help="draw success against demonstrations there, a PNG")
    options = parser.parse_args()
    if options.rehearse:
        options.output, options.cloning_minutes = f"{options.output}_rehearsal", 0.0
    if options.table is None:
        for seed in options.seeds:
            for count in options.demonstrations:
                learn(count, seed, options)
    runs = read(Path(options.table or options.output))
    if not runs:
        parser.error("there is no finished run")
    print(table(runs))
    if options.picture:
        draw(runs, Path(options.picture))


def learn(count: int, seed: int, options: argparse.Namespace) -> None:
    """Clone and practise once, unless it is done."""
    folder = Path(options.output) / f"demonstrations{count}-seed{seed}"
    if list(folder.glob("run-*/results.json")):
        return
    start = folder / "start"
    if not (start / "warmstart.json").exists():
        call_python(
            "-m", "pi0.warmstart", "--demonstrations", str(count), "--seed", str(seed), "--output", str(start),
            "--max-minutes", str(options.cloning_minutes), "--target-success", "1.1",
            *(SHORT_CLONING if options.rehearse else ()),
        )  # fmt: skip
    call_python(
        SCRIPT, "--config_path", CONFIG, "--override", f"training.seed={seed}", f"output_dir={folder}", "exp_name=run",
        f"policy_path={start}", *(SHORT_RUN if options.rehearse else ()),
    )  # fmt: skip


def read(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Results of the finished runs, by number of demonstrations."""
    runs: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("demonstrations*-seed*/run-*/results.json")):
        count, _, seed = file.parents[1].name.removeprefix("demonstrations").partition("-seed")
        first = json.loads((file.parent / "metrics.jsonl").read_text().splitlines()[0])
        runs.setdefault(int(count), []).append(
            {"seed": int(seed), "first_iteration": first, **json.loads(file.read_text())}
        )
    return dict(sorted(runs.items()))


def table(runs: dict[int, list[dict[str, Any]]]) -> str:
    """Markdown tables: each run, and all seeds together."""
    lines = [
        "| demonstrations of a task | seed | cloned | practised | first iteration's rollouts that succeeded | minutes of practice |",
        "|---|---|---|---|---|---|",
    ]
    for count, results in runs.items():
        for run in results:
            cells = [
                format_rate(run[when]["successes"], run[when]["episodes"]) for when in ("before", "after")
            ]
            first = run["first_iteration"]
            lines.append(
                f"| {count} | {run['seed']} | {cells[0]} | {cells[1]} | {first['successes']}/{first['rollouts']} "
                f"| {run['seconds'] / 60:.1f} |"
            )
    lines += ["", "| demonstrations of a task | seeds | cloned | practised |", "|---|---|---|---|"]
    for count, results in runs.items():
        totals = [
            format_rate(
                sum(run[when]["successes"] for run in results), sum(run[when]["episodes"] for run in results)
            )
            for when in ("before", "after")
        ]
        lines.append(f"| {count} | {len(results)} | {totals[0]} | {totals[1]} |")
    return "\n".join(lines)


def draw(runs: dict[int, list[dict[str, Any]]], file: Path) -> None:
    """Success before and after practice against demonstrations, a point for each seed, a line for their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for when, name, colour in (("before", "cloned", "tab:orange"), ("after", "practised", "tab:blue")):
        rates = {
            count: [100 * run[when]["successes"] / run[when]["episodes"] for run in results]
            for count, results in runs.items()
        }
        axes.plot(list(rates), [sum(r) / len(r) for r in rates.values()], color=colour, label=name)
        for count, each in rates.items():
            axes.plot([count] * len(each), each, "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(list(runs), list(map(str, runs)))
    axes.minorticks_off()
    axes.set_xlabel("demonstrations of each task")
    axes.set_ylabel("success on recorded states, %")
    axes.set_ylim(0, 102)
    axes.legend()
    save(figure, file)


if __name__ == "__main__":
    run_command(main)
