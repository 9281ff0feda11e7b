"""What of practice's gain stays under changes that nobody trained on? Scores a start and what it became. Prints a table.

    python benchmarks/generalise.py --suite libero_goal --practised outputs/suite_goal/weighted-seed0/policy
    python benchmarks/generalise.py --suite libero_goal --practised outputs/suite_goal/weighted-seed*/policy   # one of each seed
    python benchmarks/generalise.py --suite libero_spatial --start checkpoints/pi0_tiny_libero_spatial --tasks 3 8 --rehearse
    python benchmarks/generalise.py --table outputs/generalise/libero_goal

| change | what it is |
|---|---|
| none | LIBERO's recorded states |
| pro swap, object, lan, task | LIBERO-PRO (`make libero-pro`): exchanged places, other objects, other words, another goal |
| plus camera, robot, language, noise, layout | variants of LIBERO-plus (`make libero-plus`), each run once; `--sample` of them |

Every policy meets the same episodes with the same noise, so gains are paired. A policy may have no room for a longer instruction;
such tasks of LIBERO-PRO and such variants of LIBERO-plus are left out, and it says how many. A score that is there is kept, so a stopped benchmark
goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import call_python
from pi0 import PI0Policy
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import InputError, run_command
from pi0.base.files import read_json
from pi0.base.stats import format_rate, mean_interval, paired_difference
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PRO = ("swap", "object", "lan", "task")
PLUS = "plus"
NONE = "none"
CHANGES = (NONE, *(f"pro {kind}" for kind in PRO), PLUS)
START = "start"
Outcomes = dict[tuple[str, ...], bool]  # of each episode that did not break


def main() -> None:
    """Score what is not scored yet, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="libero_goal")
    parser.add_argument(
        "--tasks", action=Collect, nargs="+", type=ranged(int, low=0), default=[],
        help="of the suite, where nothing is changed; in LIBERO-PRO those with the same numbers; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--start", type=Path, help="policy before practice; default: checkpoints/suite_goal for libero_goal"
    )
    parser.add_argument(
        "--practised", action=Collect, nargs="+", type=Path, default=[], help="policies after practice"
    )
    parser.add_argument("--changes", action=Collect, nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument(
        "--episodes", type=ranged(int, low=1), default=200, help="of each change but LIBERO-plus"
    )
    parser.add_argument("--sample", type=ranged(int, low=1), default=500, help="variants of LIBERO-plus")
    parser.add_argument(
        "--output", type=Path, help="finished scores are kept; default: outputs/generalise/SUITE"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="do the least of everything, in another folder"
    )
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only print the table of this folder")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    output = options.output or ROOT / "outputs" / "generalise" / options.suite
    if options.rehearse:
        output = output.with_name(f"{output.name}-rehearsal")
    policies = {START: options.start or ROOT / "checkpoints" / options.suite.replace("libero", "suite")}
    policies |= {f"practised-{number}": path for number, path in enumerate(options.practised)}
    for name, path in policies.items():
        for change in options.changes:
            score(path, change, output / name / change.replace(" ", "-"), options)
    print(table(output))


def score(policy: Path, change: str, output: Path, options: argparse.Namespace) -> None:
    """Score a policy under a change, if it is not scored yet; its results.json is then in `output`."""
    if (output / "results.json").is_file():
        return
    source, _, kind = change.partition(" ")
    name = options.suite.removeprefix("libero_")
    count: list[object] = ["--episodes", 2 if options.rehearse else options.episodes]
    suite = {NONE: options.suite, PLUS: f"libero_plus/{name}"}.get(source)
    tasks = list(options.tasks)
    if source == PLUS:
        count, tasks = ["--sample", 7 if options.rehearse else options.sample], []
    elif suite is None:
        suite = f"libero_pro/{name}_{kind}"
        tasks = readable(policy, suite, tasks)
        if not tasks:
            return
    chosen: list[object] = ["--tasks", *tasks] if tasks else ["--tasks"]
    short = ["--max_episode_length", 20] if options.rehearse else []
    call_python(
        "-m", "pi0.evaluate", "--policy_path", policy, "--suite", suite, *chosen, *count, "--assets", "standins",
        "--output", output, *short,
    )  # fmt: skip


def readable(policy: Path, suite: str, tasks: Sequence[int]) -> list[int]:
    """Tasks whose instruction the policy has room for."""
    acting = ActingPolicy(PI0Policy.from_pretrained(policy))
    of_suite = [task for task in find_tasks(suite, []) if not tasks or task.index in tasks]
    read = [task.index for task in of_suite if acting.reads(task.prompt)]
    print(f"{suite}: {policy} has room for {len(read)} of {len(of_suite)} instructions")
    return read


def table(folder: Path) -> str:
    """Success under each change before and after practice, the gain, and its share of the gain without a change."""
    found: dict[str, dict[str, Outcomes]] = {}
    for file in sorted(folder.glob("*/*/results.json")):
        for change, outcomes in by_change(file.parent.name, read_json(file)).items():
            found.setdefault(change, {})[file.parents[1].name] = outcomes
    if not any(START in of_change for of_change in found.values()):
        raise InputError(f"{folder} holds no score of a start")
    lines = ["| change | before | after | gain, points | share of the gain |", "|---|---|---|---|---|"]
    whole: float | None = None
    for change in sorted(found, key=order):
        before = found[change].pop(START, None)
        if before is None:
            continue
        cells, gain = compared(before, list(found[change].values()))
        if change == NONE:
            whole = gain
        share = "" if gain is None or not whole else f"{100 * gain / whole:.0f}%"
        lines.append(f"| {change} | {rate(before)} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def order(change: str) -> tuple[int, str]:
    """Nothing, LIBERO-PRO, LIBERO-plus."""
    return CHANGES.index(PLUS if change.startswith(PLUS) else change), change


def by_change(change: str, results: Mapping[str, Any]) -> dict[str, Outcomes]:
    """Outcomes of a score by kind of change; those of LIBERO-plus also all together."""
    found: dict[str, Outcomes] = {}
    for episode in results["outcomes"]:
        if episode["success"] is None:  # its simulation broke
            continue
        key = str(episode["task"]), str(episode["state"]), str(episode.get("name"))
        kinds = (
            [f"plus {episode['kind']}", "plus, all kinds"]
            if "kind" in episode
            else [change.replace("-", " ")]
        )
        for kind in kinds:
            found.setdefault(kind, {})[key] = episode["success"]
    return found


def compared(before: Outcomes, practised: Sequence[Outcomes]) -> tuple[list[str], float | None]:
    """Cells of success after practice and of the gain, on the episodes that all have; and the gain."""
    if not practised:
        return ["", ""], None
    gains = []
    for outcomes in practised:
        shared = [key for key in before if key in outcomes]
        gains.append(paired_difference([before[key] for key in shared], [outcomes[key] for key in shared]))
    after = ", ".join(f"{100 * sum(outcomes.values()) / len(outcomes):.1f}%" for outcomes in practised)
    if len(gains) == 1:
        (gain,) = gains
        interval = f"{100 * gain.difference:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        return [rate(practised[0]), interval], gain.difference
    mean, low, high = mean_interval([gain.difference for gain in gains])
    return [after, f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"], mean


def rate(outcomes: Outcomes) -> str:
    """A success count as text."""
    return format_rate(sum(outcomes.values()), len(outcomes))


if __name__ == "__main__":
    run_command(main)
