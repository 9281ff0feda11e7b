"""Which variants of a suite are evaluated: all that can be, or a stated sample of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.libero.changes import KINDS
from pi0.libero.suites import Task, every_task, find_tasks, left_out

NO_ROOM = "the policy has no room for its instruction"


@dataclass(frozen=True)
class Chosen:
    """The variants of an evaluation.

    Attributes:
        tasks: those that are run, in the order of the suite.
        sample: how many were wanted; None for all.
        seed: with which the sample was drawn.
        left_out: those of the suite that cannot be run, and why.
    """

    tasks: list[Task]
    sample: int | None
    seed: int
    left_out: dict[Task, str]

    def reasons(self, kind: str) -> dict[str, int]:
        """Why variants of a kind are left out, and how many for each reason."""
        return dict(Counter(why for task, why in self.left_out.items() if _kind(task) == kind))

    def describe(self) -> dict[str, Any]:
        """For JSON: the sample, and by kind of change how many are run and how many left out, with their names."""
        return {
            "sample": self.sample,
            "sample_seed": None if self.sample is None else self.seed,
            "variants": _counts(self.tasks),
            "left_out": _counts(self.left_out),
            "left_out_names": {task.name: why for task, why in self.left_out.items()},
        }


def choose(
    suite: str, names: Sequence[str | int], reads: Callable[[str], bool], sample: int | None, seed: int
) -> Chosen:
    """The variants of a suite that can be run, or a sample of them.

    A sample has of each kind of change the same share as the suite, so its rate of all kinds estimates the suite's.

    Args:
        suite: of LIBERO-plus.
        names: variants by index or name; none: all.
        reads: whether the policy can read an instruction.
        sample: how many; None for all.
        seed: the same seed draws the same sample.

    Raises:
        InputError: unknown variants, fewer than the sample, or none at all.
    """
    gone = left_out(suite)
    unusable = {task: gone[task.name] for task in every_task(suite) if task.name in gone}
    tasks = find_tasks(suite, list(names))
    unusable |= {task: NO_ROOM for task in tasks if not reads(task.prompt)}
    tasks = sorted((task for task in tasks if task not in unusable), key=lambda task: task.index)
    if not tasks:
        raise InputError(f"no variant of {suite} is left: {NO_ROOM}")
    if sample is not None:
        if sample > len(tasks):
            raise InputError(f"a sample of {sample} is more than the {len(tasks)} variants that can be run")
        tasks = _sample(tasks, sample, seed)
    return Chosen(tasks, sample, seed, unusable)


def _sample(tasks: list[Task], count: int, seed: int) -> list[Task]:
    random = np.random.default_rng(seed)
    kinds = {kind: [task for task in tasks if _kind(task) == kind] for kind in KINDS}
    exact = {kind: count * len(of_kind) / len(tasks) for kind, of_kind in kinds.items()}
    wanted = {kind: int(share) for kind, share in exact.items()}
    # The largest remainders get what is left.
    by_remainder = sorted(KINDS, key=lambda kind: wanted[kind] - exact[kind])
    for kind in by_remainder[: count - sum(wanted.values())]:
        wanted[kind] += 1
    drawn = [
        of_kind[index]
        for kind, of_kind in kinds.items()
        for index in random.permutation(len(of_kind))[: wanted[kind]]
    ]
    return sorted(drawn, key=lambda task: task.index)


def _kind(task: Task) -> str:
    return "" if task.change is None else task.change.kind


def _counts(tasks: Sequence[Task] | dict[Task, str]) -> dict[str, int]:
    counts = Counter(map(_kind, tasks))
    return {kind: counts[kind] for kind in KINDS}
