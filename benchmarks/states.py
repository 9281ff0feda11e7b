"""Does success depend on the initial state, or on the noise? Compares scores of one policy with several seeds of the noise.

    python -m pi0.evaluate --policy_path outputs/RUN/policy --tasks 3 8 --seed 1 --output outputs/seed1
    python benchmarks/states.py --task 3 outputs/RUN/results.json outputs/seed1/results.json

Files are results.json of `pi0.evaluate`, or of a training run, whose score after training counts. The table has how many
states were solved in none, one, ... of the scores, and how many it would be if success were equally likely on every state.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from pi0.base.arguments import ranged
from pi0.base.errors import InputError, run_command
from pi0.base.files import read_json

SHUFFLES = 10_000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results.json of each score")
    parser.add_argument("--task", type=ranged(int, low=0), required=True, help="task by index in its suite")
    options = parser.parse_args()
    print(table(solved(options.files, options.task)))


def solved(files: Sequence[Path], task: int) -> np.ndarray:
    """Whether each score solved each state of the task, bool [scores, states].

    Raises:
        InputError: there are fewer than two scores, one has no episode of the task, or they have different states.
    """
    if len(files) < 2:
        raise InputError("name at least two scores; one does not show what depends on the noise")
    by_file = []
    for file in files:
        results = read_json(file)
        outcomes = results.get("after", results)["outcomes"]
        by_file.append({each["state"]: each["success"] for each in outcomes if each["task"] == task})
        if not by_file[-1]:
            raise InputError(f"{file} has no episode of task {task}")
        if by_file[-1].keys() != by_file[0].keys():
            raise InputError(f"{file} and {files[0]} have different states of task {task}")
    return np.array([[states[state] for state in sorted(by_file[0])] for states in by_file])


def table(outcomes: np.ndarray) -> str:
    """Markdown of `solved`'s outcomes, bool [scores, states], and how likely chance makes states so unequal.

    The last line is a permutation test: outcomes are shuffled over the states within each score.
    """
    scores, states = outcomes.shape
    rate = outcomes.mean()
    counts = np.bincount(outcomes.sum(0), minlength=scores + 1)
    lines = [
        f"solved in each score, of {states} states: {', '.join(str(count) for count in outcomes.sum(1))}",
        "",
        "| solved in | states | if all were equally hard |",
        "|---|---|---|",
    ]
    for times, count in enumerate(counts):
        expected = states * math.comb(scores, times) * rate**times * (1 - rate) ** (scores - times)
        lines.append(f"| {times} of {scores} | {count} | {expected:.1f} |")
    generator = np.random.default_rng(0)
    shuffled = (generator.permuted(outcomes, axis=1).sum(0).var() for _ in range(SHUFFLES))
    # Rounding must not decide between shuffles that are as unequal as what was seen.
    seen = outcomes.sum(0).var() * (1 - 1e-12)
    as_unequal = 1 + sum(bool(variance >= seen) for variance in shuffled)
    return "\n".join([*lines, "", f"p = {as_unequal / (1 + SHUFFLES):.2g} ({SHUFFLES:,} shuffles)"])


if __name__ == "__main__":
    run_command(main)
