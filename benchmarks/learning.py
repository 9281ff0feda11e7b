"""Does the policy learn, and does it learn from the reward? Runs the quickstart, or another configuration of stage 13,
over seeds, with controls.

    python benchmarks/learning.py --runs weighted --seeds 0 1 2
    python benchmarks/learning.py --runs weighted guidance shuffled cloning --seeds 0 1 2 --output outputs/learning
    python benchmarks/learning.py --runs weighted guidance shuffled cloning --seeds 0 --rehearse   # does everything run?
    python benchmarks/learning.py --table outputs/learning     # the table of finished runs

| run | what it is |
|---|---|
| weighted | configs/quickstart.yaml, or `--config_path`, unchanged |
| guidance | the same in guidance mode, failures with a tenth of the weight, evaluated with several guidance weights |
| ratio | the same in ratio mode: policy gradient with noise in the flow's steps |
| shuffled | the same with advantages shuffled inside groups |
| short | the same with 6 iterations in place of 13: 384 rollouts |
| critic | the same; critics that benchmarks/acrlpd_learning.py learned (its run `critics`) choose in the first 4 iterations |
| critic_short | the same with 6 iterations |
| critic_always | they choose in all iterations |
| cloning | no practice: the same wall time spent on more cloning of demonstrations, from the same policy |
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import call_python
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import InputError, run_command
from pi0.base.stats import format_rate, paired_difference
from pi0.ript.config import Config, load_config

SCRIPT = "13_train_production_ready.py"
CONFIG = "configs/quickstart.yaml"
OVERRIDES: dict[str, list[str]] = {
    "weighted": [],
    "guidance": ["algo.mode=guidance", "algo.negative_weight=0.1", "algo.num_epochs=3"],
    "ratio": ["algo.mode=ratio", "algo.ema_decay=0", "algo.replay_iterations=1"],
    "shuffled": ["algo.shuffle_advantages=true"],
    "short": ["training.num_train_steps=6"],
    "critic": [],
    "critic_short": ["training.num_train_steps=6"],
    "critic_always": ["algo.critic_iterations=null"],
}
GUIDANCE_WEIGHTS = (0.0, 1.0, 1.5, 2.0, 3.0)
# A rehearsal: an iteration of the shortest episodes that some of the policy's rollouts solve and others do not.
SHORT_RUN = (
    "training.num_train_steps=1", "algo.data_batch_size=4", "algo.rloo_batch_size=4", "task.max_episode_length=105",
    "algo.train_init_states=8", "evaluation.episodes=2", "features.save_video=false",
)  # fmt: skip
SHORT_EVALUATION = ("--episodes", "2", "--max_episode_length", "105")
SHORT_CLONING = ("--demonstrations", "1", "--score-every", "1", "--score-episodes", "2")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", action=Collect, nargs="+", choices=[*OVERRIDES, "cloning"], default=["weighted"]
    )
    parser.add_argument("--seeds", action=Collect, nargs="+", type=ranged(int, low=0), default=[0, 1, 2])
    parser.add_argument("--config_path", default=CONFIG, help="what stage 13 runs, a YAML file")
    parser.add_argument(
        "--output", default="outputs/learning", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument(
        "--override", action=Collect, nargs="*", default=[], help="further overrides for every run"
    )
    parser.add_argument(
        "--critics", type=Path, default=Path("outputs/acrlpd_learning"), metavar="FOLDER",
        help="where benchmarks/acrlpd_learning.py left its runs, for the runs with a critic",
    )  # fmt: skip
    parser.add_argument(
        "--cloning-minutes",
        type=ranged(float, low=0),
        default=6.0,
        help="cloning time of the cloning control",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="do the least of everything; the numbers mean nothing and are in another folder",
    )
    parser.add_argument("--table", help="only print the table of this folder")
    options = parser.parse_args()
    if options.rehearse:  # not beside real runs, where these would count as finished
        options.output, options.cloning_minutes = f"{options.output}_rehearsal", 0.0
    if options.table is None:
        for seed in options.seeds:
            for run in options.runs:
                folder = Path(options.output) / f"{run}-seed{seed}"
                if not (folder / "results.json").is_file():
                    start(run, seed, folder, options)
    print(table(Path(options.table or options.output)))


def start(run: str, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """Make one run; its results.json is then in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if run == "cloning":
        clone(seed, folder, options)
        return
    overrides = [
        f"training.seed={seed}",
        f"output_dir={folder}",
        "exp_name=run",
        *OVERRIDES[run],
        *([f"algo.critic_path={critic_of(seed, options.critics)}"] if run.startswith("critic") else ()),
        *(SHORT_RUN if options.rehearse else ()),
        *options.override,
    ]
    call_python(SCRIPT, "--config_path", options.config_path, "--override", *overrides)
    made = max(folder.glob("run-*"))
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()
    if run == "guidance":
        scores = {
            str(weight): evaluate(folder / "policy", folder / f"w{weight}", options, weight)
            for weight in GUIDANCE_WEIGHTS
        }
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "guidance_weights": scores}, indent=1))


def critic_of(seed: int, folder: Path) -> Path:
    """The critics that a run of benchmarks/acrlpd_learning.py has learned.

    Raises:
        InputError: there is no such run.
    """
    found = sorted(folder.glob(f"critics-seed{seed}/run-*/critic"))
    if not found:
        raise InputError(
            f"{folder} has no critics of seed {seed}: python benchmarks/acrlpd_learning.py --runs critics --seeds {seed}"
        )
    return found[-1]


def clone(seed: int, folder: Path, options: argparse.Namespace) -> None:
    """The control: continue cloning from the same policy, then evaluate on the same states and noise."""
    policy, config = folder / "policy", load_config(options.config_path)
    call_python(
        "-m", "pi0.warmstart", "--start-from", config.policy_path, "--output", str(policy), "--seed", str(seed + 100),
        *tasks_of(config), "--max-minutes", str(options.cloning_minutes), "--target-success", "1.1", "--lr", "2e-4",
        *(SHORT_CLONING if options.rehearse else ()),
    )  # fmt: skip
    before = evaluate(Path(config.policy_path), folder / "before", options)
    after = evaluate(policy, folder / "after", options)
    (folder / "results.json").write_text(
        json.dumps({"before": before, "after": after, "seconds": 60 * options.cloning_minutes})
    )


def tasks_of(config: Config) -> list[str]:
    """The options of a command that takes the configuration's tasks."""
    return ["--suite", config.task.benchmark_name, "--tasks", *map(str, config.task.chosen)]


def evaluate(
    policy: Path, output: Path, options: argparse.Namespace, guidance_weight: float | None = None
) -> dict:
    """The configuration's evaluation of a policy."""
    config, short = load_config(options.config_path), SHORT_EVALUATION if options.rehearse else ()
    guidance = [] if guidance_weight is None else ["--guidance_weight", str(guidance_weight)]
    call_python(
        "-m", "pi0.evaluate", "--policy_path", str(policy), *tasks_of(config),
        "--episodes", str(config.evaluation.episodes), "--assets", str(config.task.assets), "--output", str(output),
        *guidance, *short,
    )  # fmt: skip
    return json.loads((output / "results.json").read_text())


def table(folder: Path) -> str:
    """Markdown tables of the runs in `folder`: each run, all seeds of a kind together, and by guidance weight."""
    lines = [
        "| run | before | after | change, paired | minutes with scores | iterations alone |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, list[dict]] = {}
    extra = []
    files = sorted(folder.glob("*/results.json"))
    if not files:
        raise InputError(f"{folder} holds no finished run")
    for file in files:
        results = json.loads(file.read_text())
        before, after = results["before"], results["after"]
        kinds.setdefault(file.parent.name.rpartition("-seed")[0], []).append(results)
        pairs = [
            (first["success"], second["success"])
            for first, second in zip(before["outcomes"], after["outcomes"], strict=True)
            if None not in (first["success"], second["success"])  # its simulation broke
        ]
        change = paired_difference([first for first, _ in pairs], [second for _, second in pairs])
        cells = [format_rate(cell["successes"], cell["episodes"]) for cell in (before, after)]
        lines.append(
            f"| {file.parent.name} | {cells[0]} | {cells[1]} | {change} | {results['seconds'] / 60:.1f} | "
            f"{minutes_of_iterations(results):.1f} |"
        )
        for weight, cell in results.get("guidance_weights", {}).items():
            extra.append(
                f"| {file.parent.name} | {weight} | {format_rate(cell['successes'], cell['episodes'])} |"
            )
    lines += ["", "| run | seeds | before | after | mean change |", "|---|---|---|---|---|"]
    for kind, runs in kinds.items():
        counts = {
            when: [sum(run[when][what] for run in runs) for what in ("successes", "episodes")]
            for when in ("before", "after")
        }
        rates = [successes / episodes for successes, episodes in counts.values()]
        cells = [f"{successes}/{episodes}" for successes, episodes in counts.values()]
        lines.append(
            f"| {kind} | {len(runs)} | {cells[0]} | {cells[1]} | {100 * (rates[1] - rates[0]):+.1f} points |"
        )
    lines += ["", *by_task(kinds), "", *by_phase(kinds)]
    if extra:
        lines += ["", "| run | guidance weight | after |", "|---|---|---|", *extra]
    return "\n".join(lines)


def minutes_of_iterations(results: Mapping[str, Any]) -> float:
    """Minutes of rollouts and updates of a run: without scores, film and report. 0 for a run without iterations."""
    return sum(sum(each["phases"].values()) for each in results.get("history", ())) / 60


def by_phase(kinds: Mapping[str, Sequence[dict]]) -> list[str]:
    """Rows of a table: minutes of iterations in each phase, mean of the seeds; none of runs without iterations."""
    names = ("update", "physics", "inference", "render", "wait", "other")
    lines = [f"| minutes of | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for kind, runs in kinds.items():
        phases = [each["phases"] for run in runs for each in run.get("history", ())]
        if phases:
            minutes = [sum(each.get(name, 0.0) for each in phases) / len(runs) / 60 for name in names]
            lines.append(f"| {kind} | {' | '.join(f'{number:.1f}' for number in minutes)} |")
    return lines


def by_task(kinds: Mapping[str, Sequence[dict]]) -> list[str]:
    """Rows of a table: successes of each task before and after, all seeds together."""
    lines = ["| run | task | before | after |", "|---|---|---|---|"]
    for kind, runs in kinds.items():
        for task in sorted({outcome["task"] for run in runs for outcome in run["before"]["outcomes"]}):
            cells = []
            for when in ("before", "after"):
                outcomes = [
                    outcome["success"]
                    for run in runs
                    for outcome in run[when]["outcomes"]
                    if outcome["task"] == task and outcome["success"] is not None
                ]
                cells.append(f"{sum(outcomes)}/{len(outcomes)}")
            lines.append(f"| {kind} | {task} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    run_command(main)
