"""What does ACRLPD learn, and from what? Runs the quickstart over seeds, with controls and ablations, scored part by part.

    python benchmarks/acrlpd_learning.py --runs full --seeds 0 1 2
    python benchmarks/acrlpd_learning.py --runs shuffled windows untrained cloning --seeds 0 1 2
    python benchmarks/acrlpd_learning.py --runs critics --choices 1 2 4 8 16 32 --seeds 0 1 2
    python benchmarks/acrlpd_learning.py --runs suite --seeds 0 1 2
    python benchmarks/acrlpd_learning.py --runs full --seeds 0 --rehearse    # does everything run? the numbers mean nothing
    python benchmarks/acrlpd_learning.py --table benchmarks/results/acrlpd_learning     # of finished runs
    python benchmarks/acrlpd_learning.py --table benchmarks/results/acrlpd_learning_slower --ript benchmarks/results/learning \
        --picture outputs/acrlpd_learning.png

| run | what it is |
|---|---|
| full | configs/acrlpd_quickstart.yaml: record, critics, offline, practice |
| critics | the same, until the critics are learned; the policy stays as it was |
| shuffled | critics, with success and failure exchanged between recorded episodes: reward teaches nothing |
| windows | critics, with all that followed exchanged between windows: not even lengths of episodes teach anything |
| untrained | critics without an update |
| own | critics with a small network of their own in place of the policy's tokens |
| horizon | critics, where an episode that reached its horizon has failed |
| few, fewer | critics from 200 and from 100 rollouts |
| offline | until the end of the offline part: flow loss on the best of N alone |
| weighted | offline, with the weighted flow loss alone |
| both | offline, with both and behaviour cloning of successful episodes |
| cloning | offline, with behaviour cloning of successful episodes alone: the same data without a critic |
| suite | critics, all ten tasks of libero_spatial from `checkpoints/suite_spatial`: 1,000 rollouts, 3,000 updates |

Scores are of 100 of LIBERO's recorded states, with the same noise before and after. Minutes are of recording
and learning, without scores. Finished runs are kept, so a stopped benchmark goes on. Where the full run of a seed is
finished, the others of that seed take the rollouts that it recorded and record none, so their minutes are without it.
`--choices` scores the unchanged policy with the critics of the run `critics`, which chooses among so many chunks. One
chunk, and as many as the run itself chose among, are not scored again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import save
from benchmarks.learning import minutes_of_iterations
from benchmarks.processes import call_python
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import read_json
from pi0.base.stats import format_rate, mean_interval, paired_difference

CONFIG = "acrlpd_quickstart"
CRITICS = ["training.num_train_steps=1", "training.offline_iterations=1"]
OFFLINE = ["training.num_train_steps=2", "training.offline_iterations=2", "training.score_parts=false"]
OVERRIDES: dict[str, list[str]] = {
    "full": [],
    "critics": CRITICS,
    "shuffled": [*CRITICS, "data.shuffle_outcomes=true"],
    "windows": [*CRITICS, "data.shuffle_windows=true"],
    "untrained": [*CRITICS, "training.critic_updates=0", "training.updates=0"],
    "own": [*CRITICS, "acrlpd.features=own"],
    "horizon": [*CRITICS, "data.horizon_is_failure=true"],
    "few": [*CRITICS, "data.rollouts=200"],
    "fewer": [*CRITICS, "data.rollouts=100"],
    "offline": OFFLINE,
    "weighted": [*OFFLINE, "acrlpd.best_weight=0", "acrlpd.awr_weight=1"],
    "both": [*OFFLINE, "acrlpd.awr_weight=1", "acrlpd.bc_loss_weight=0.1"],
    "cloning": [*OFFLINE, "acrlpd.best_weight=0", "acrlpd.bc_loss_weight=1"],
    "suite": [
        *CRITICS, "policy_path=checkpoints/suite_spatial", "task.task_names_to_use=[]", "data.rollouts=1000",
        "training.critic_updates=3000",
    ],
}  # fmt: skip
RECORDS_ITSELF = ("full", "suite")
POLICY = "checkpoints/pi0_tiny_libero_spatial"
SHORT = [
    "data.rollouts=4", "data.init_states=2", "task.max_episode_length=20", "training.critic_updates=2",
    "training.updates=1", "training.rollouts=2", "evaluation.episodes=2",
]  # fmt: skip


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", action=Collect, nargs="+", choices=list(OVERRIDES), default=["full"])
    parser.add_argument("--seeds", action=Collect, nargs="+", type=ranged(int, low=0), default=[0, 1, 2])
    parser.add_argument(
        "--output", default="outputs/acrlpd_learning", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument(
        "--override", action=Collect, nargs="*", default=[], help="further overrides for every run"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="do the least of everything, in another folder"
    )
    parser.add_argument(
        "--choices", action=Collect, nargs="+", type=ranged(int, low=1), default=[], metavar="N",
        help="after the runs, score the policy with the best of so many chunks",
    )  # fmt: skip
    parser.add_argument("--table", metavar="FOLDER", help="only print the tables of this folder")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw success of --runs against minutes and rollouts, a PNG"
    )
    parser.add_argument(
        "--ript", type=Path, default=Path("outputs/learning"), metavar="FOLDER",
        help="RIPT's runs (benchmarks/learning.py --runs short weighted), compared with full ones and drawn beside them",
    )  # fmt: skip
    parser.add_argument("--recorded", type=Path, help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recorded:
        train_with(options.recorded, options.train)
        return
    if options.rehearse:
        options.output = f"{options.output}_rehearsal"
    if options.table is None:
        for seed in options.seeds:
            for run in options.runs:
                learn(run, seed, options)
            for number in options.choices:
                choose(number, seed, options)
    runs = read(Path(options.table or options.output))
    if not runs:
        parser.error("there is no finished run")
    print(tables(runs))
    if beside := beside_ript(runs.get("full", ()), read_ript(options.ript)):
        print(f"\n{beside}")
    if choices := read_choices(Path(options.table or options.output)):
        print(f"\n{choices_table(choices)}")
    if options.picture:
        shown = {kind: of_kind for kind, of_kind in runs.items() if kind in options.runs}
        draw(curves(shown, read_ript(options.ript)), choices, Path(options.picture))


def learn(run: str, seed: int, options: argparse.Namespace) -> None:
    """Make one run, if it is not there; its folder is then OUTPUT/RUN-seedN."""
    folder = Path(options.output) / f"{run}-seed{seed}"
    if list(folder.glob("run-*/results.json")):
        return
    overrides = [
        f"training.seed={seed}", f"output_dir={folder}", "exp_name=run", "training.score_parts=true",
        "logging.use_wandb=false", *OVERRIDES[run], *(SHORT if options.rehearse else ()), *options.override,
    ]  # fmt: skip
    command = ["--config", CONFIG, "--override", *overrides]
    if list(folder.glob("run-*/checkpoints")):  # of a benchmark that was stopped
        command.append("--resume")
    recorded = None if run in RECORDS_ITSELF else recorded_by_full(seed, options)
    trainer = (
        ["-m", "pi0.acrlpd.train"] if recorded is None else [__file__, "--recorded", recorded, "--train"]
    )
    call_python(*trainer, *command)


def recorded_by_full(seed: int, options: argparse.Namespace) -> Path | None:
    """The newest checkpoint's episodes of the seed's full run, if that is finished: those it recorded come first."""
    finished = list(Path(options.output).glob(f"full-seed{seed}/run-*/results.json"))
    files = sorted(file for each in finished for file in each.parent.glob("checkpoints/step-*/rank0.pt"))
    return files[-1] if files else None


def train_with(recorded: Path, arguments: Sequence[str]) -> None:
    """`pi0.acrlpd.train`, with the first episodes of a checkpoint in place of rollouts to record."""
    from pi0.acrlpd import train, trainer
    from pi0.acrlpd.practice import Practice
    from pi0.acrlpd.replay import ReplayBuffer
    from pi0.training.checkpoint_store import load_state

    earlier = ReplayBuffer(10**9)
    earlier.load_state_dict(load_state(recorded)["data"]["replay"])
    episodes, practise = iter(earlier.episodes), trainer.practise

    def recall(environments: Any, policy: Any, rollouts: Sequence[Any], horizon: int, label: str) -> Practice:
        if label.startswith("recording"):
            return Practice(list(itertools.islice(episodes, len(rollouts))))
        return practise(environments, policy, rollouts, horizon, label)

    trainer.practise = recall
    train.main(list(arguments))


def choose(number: int, seed: int, options: argparse.Namespace) -> None:
    """Score the unchanged policy with the best of so many chunks by the critics of the run `critics`, if it has not."""
    folder = Path(options.output)
    if str(number) in scored_itself(read_json(next(folder.glob(f"critics-seed{seed}/run-*/results.json")))):
        return
    output = Path(options.output) / f"choices-seed{seed}" / str(number)
    if (output / "results.json").is_file():
        return
    (critic,) = Path(options.output).glob(f"critics-seed{seed}/run-*/critic")
    short = ["--episodes", 2, "--max_episode_length", 20] if options.rehearse else ["--episodes", 100]
    call_python(
        "-m", "pi0.evaluate", "--policy_path", POLICY, "--tasks", 3, 8, "--assets", "standins",
        "--critic_path", critic, "--samples", number, "--output", output, *short,
    )  # fmt: skip


def scored_itself(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Scores of a run `critics`, which leaves the policy as it was, by number of chunks."""
    scores = results["scores"].items()
    return {"1" if name == "one sample" else name.removeprefix("best of "): score for name, score in scores}


def read_choices(folder: Path) -> dict[int, dict[str, tuple[int, int]]]:
    """Successes and episodes of the unchanged policy, by number of chunks and seed."""
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for file in folder.glob("critics-seed*/run-*/results.json"):
        for number, score in scored_itself(read_json(file)).items():
            counts = score["successes"], score["episodes"]
            found.setdefault(int(number), {})[file.parts[-3].rpartition("seed")[2]] = counts
    for file in folder.glob("choices-seed*/*/results.json"):
        score = read_json(file)
        counts = score["successes"], score["episodes"]
        found.setdefault(int(file.parts[-2]), {})[file.parts[-3].rpartition("seed")[2]] = counts
    return dict(sorted(found.items()))


def choices_table(found: Mapping[int, Mapping[str, tuple[int, int]]]) -> str:
    """Successes by number of chunks and seed, and their mean."""
    seeds = sorted({seed for rates in found.values() for seed in rates}, key=int)
    lines = [
        f"| best of | {' | '.join(f'seed {seed}' for seed in seeds)} | mean, % |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for number, rates in found.items():
        cells = [format_rate(*rates[seed]) if seed in rates else "-" for seed in seeds]
        lines.append(f"| {number} | {' | '.join(cells)} | {statistics.mean(percent(rates)):.1f} |")
    return "\n".join(lines)


def percent(rates: Mapping[str, tuple[int, int]]) -> list[float]:
    """Success of each seed."""
    return [100 * solved / count for solved, count in rates.values()]


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished runs, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-seed*/run-*/results.json")):
        found.setdefault(file.parts[-3].rpartition("-seed")[0], []).append(read_json(file))
    return {kind: found[kind] for kind in OVERRIDES if kind in found}


def tables(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each run's scores, then the means over seeds."""
    lines = [
        "| run | seed | before | part | score | change, paired | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    means = ["| run | part | seeds | mean score, % | of each seed |", "|---|---|---|---|---|"]
    for kind, of_kind in runs.items():
        parts: dict[str, list[float]] = {}
        for results in of_kind:
            before = results["before"]
            for part, score in results["scores"].items():
                pairs = [
                    (first["success"], second["success"])
                    for first, second in zip(before["outcomes"], score["outcomes"], strict=True)
                    if None not in (first["success"], second["success"])
                ]
                change = paired_difference([first for first, _ in pairs], [second for _, second in pairs])
                rates = [format_rate(each["successes"], each["episodes"]) for each in (before, score)]
                minutes = results["minutes"][part]
                lines.append(
                    f"| {kind} | {results['config']['training']['seed']} | {rates[0]} | {part} | {rates[1]} | "
                    f"{change} | {minutes:.1f} |"
                )
                parts.setdefault(part, []).append(100 * score["success_rate"])
        for part, rates in parts.items():
            mean, low, high = mean_interval(rates)
            spread = f" ({max(low, 0):.1f} to {min(high, 100):.1f})" if len(rates) > 1 else ""
            each = ", ".join(f"{rate:.0f}" for rate in rates)
            means.append(f"| {kind} | {part} | {len(rates)} | {mean:.1f}{spread} | {each} |")
    return "\n".join([*lines, "", *means, *by_task(runs.get("suite", ()))])


def by_task(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of successes of each task before and by each score, all runs together; no line without runs."""
    if not runs:
        return []
    names = ["before", *runs[0]["scores"]]
    counts: dict[int, dict[str, list[bool]]] = {}
    for run in runs:
        for name, score in {"before": run["before"], **run["scores"]}.items():
            for outcome in score["outcomes"]:
                if outcome["success"] is not None:  # its simulation broke
                    counts.setdefault(outcome["task"], {}).setdefault(name, []).append(outcome["success"])
    lines = ["", f"| task of suite | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for task, of_task in sorted(counts.items()):
        cells = [f"{sum(of_task[name])}/{len(of_task[name])}" for name in names]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def rollouts_until(part: str, config: Mapping[str, Any]) -> int:
    """Rollouts that a run of this configuration has made at the end of a part, or at its own end, without a name."""
    training = config["training"]
    practised = 0 if part else training["num_train_steps"] - training["offline_iterations"]
    return config["data"]["rollouts"] + practised * training["rollouts"]


def read_ript(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of RIPT's runs without a critic, by kind: benchmarks/learning.py."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("short", "weighted"):
        for file in sorted(folder.glob(f"{kind}-seed*/results.json")):
            found.setdefault(kind, []).append(read_json(file))
    return found


def rollouts_of_ript(results: Mapping[str, Any]) -> int:
    """Rollouts of all iterations of a RIPT run."""
    return sum(each["rollouts"] for each in results["history"])


def beside_ript(
    full: Sequence[Mapping[str, Any]], ript: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str | None:
    """A table of full runs less RIPT's of the same seeds, each score beside the runs of the nearest number of rollouts;
    None without either."""
    if not full or not ript:
        return None
    lines = [
        "| ACRLPD | rollouts | RIPT | rollouts | of each seed, points | mean (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    counts = {kind: rollouts_of_ript(runs[0]) for kind, runs in ript.items()}
    for name in full[0]["scores"]:
        made = rollouts_until(name.rpartition(", ")[0], full[0]["config"])
        kind = min(counts, key=lambda each: abs(counts[each] - made))
        theirs = {run["config"]["training"]["seed"]: run["after"]["success_rate"] for run in ript[kind]}
        ours = {run["config"]["training"]["seed"]: run["scores"][name]["success_rate"] for run in full}
        points = [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if not points:
            continue
        mean, low, high = mean_interval(points)
        each = ", ".join(f"{point:+.0f}" for point in points)
        lines.append(
            f"| {name} | {made} | {kind} | {counts[kind]} | {each} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    return "\n".join(lines)


def curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], ript: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, list[tuple[float, float, float]]]:
    """Points of each line, means over seeds: minutes, rollouts, success in %."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for kind, of_kind in runs.items():
        label = "ACRLPD" if kind == "full" else kind
        for way in ("one sample", "best of"):
            points: dict[str, list[tuple[float, float, float]]] = {}
            for results in of_kind:
                points.setdefault("before", []).append((0, 0, 100 * results["before"]["success_rate"]))
                for name, score in results["scores"].items():
                    part, _, how = name.rpartition(", ")  # at the end of a run without the part's name
                    if how.startswith(way):
                        made = rollouts_until(part, results["config"])
                        where = (results["minutes"][name], made, 100 * score["success_rate"])
                        points.setdefault(part, []).append(where)
            if len(points) > 1:
                shown = f"{label}, {way.replace('best of', 'best of N')}"
                found[shown] = [middle(each) for each in points.values()]
    ends: dict[str, list[tuple[float, float, float]]] = {"before": []}
    for kind, of_kind in ript.items():
        for results in of_kind:
            ends["before"].append((0, 0, 100 * results["before"]["success_rate"]))
            where = (minutes_of_iterations(results), rollouts_of_ript(results))
            ends.setdefault(kind, []).append((*where, 100 * results["after"]["success_rate"]))
    if ends["before"]:
        found["RIPT, one sample"] = [middle(each) for each in ends.values()]
    return found


def middle(points: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Mean of points."""
    return tuple(sum(values) / len(values) for values in zip(*points, strict=True))


def draw(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    choices: Mapping[int, Mapping[str, tuple[int, int]]],
    path: Path,
) -> None:
    """Success against minutes, against rollouts, and, if there are any, against the number of chunks to choose from."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    count = 3 if choices else 2
    figure, panels = plt.subplots(1, count, figsize=(5.5 * count, 4.5), sharey=True)
    for label, points in lines.items():
        minutes, rollouts, success = zip(*points, strict=True)
        for axes, x in zip(panels[:2], (minutes, rollouts), strict=True):
            axes.plot(x, success, marker="o", label=label)
    panels[0].set_xlabel("minutes of recording and learning")
    panels[1].set_xlabel("rollouts")
    panels[0].set_ylabel("success (%), 100 episodes, mean over seeds")
    panels[0].set_ylim(0, 102)
    panels[1].legend(fontsize=8)
    if choices:
        last = panels[2]
        last.plot(list(choices), [statistics.mean(percent(rates)) for rates in choices.values()])
        for number, rates in choices.items():
            last.plot([number] * len(rates), percent(rates), "o", color="tab:blue", markersize=4)
        last.set_xscale("log", base=2)
        last.set_xticks(list(choices), list(map(str, choices)))
        last.set_xlabel("chunks that the critics choose from; policy unchanged, each seed")
    save(figure, path)


if __name__ == "__main__":
    run_command(main)
