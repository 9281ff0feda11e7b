"""Run under torchrun by test_iteration.py: stage 13's iteration on ranks, one run after another.

Usage: rank_practice.py FOLDER RUNS

RUNS is a list in JSON. A run has a `name`, which is that of its folder in FOLDER, and may have keys of `algo` and
`training`; `iterations`; `stopped_after`, the iterations after which it is left and resumed; `resume`, where it is one
that is there; `spoilt`, how many gradients of the last rank are no numbers. Rank 0 writes what came of it to
NAME/outcome.json: the rows of its metrics and a digest of all that decides how each rank continues.
"""

import hashlib
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pi0.ranks.collectives import gather
from tests.support.iteration import Practice
from tests.support.rank_end import leave_together


def spoil_gradients(practice: Practice, count: int) -> None:
    """The next `count` gradients are no numbers."""
    accumulate = practice.learner.adapter.accumulate_gradient

    def accumulate_spoilt(*arguments, **options) -> float:
        nonlocal count
        loss = accumulate(*arguments, **options)
        if count > 0:
            count -= 1
            next(p.grad for p in practice.learner.policy.parameters() if p.grad is not None).fill_(torch.nan)
        return loss

    practice.learner.adapter.accumulate_gradient = accumulate_spoilt


def run(folder: Path, run: dict) -> None:
    folder = folder / run["name"]
    settings = {"algo": run.get("algo"), **run.get("training", {})}
    practice = Practice(folder, resume=run.get("resume", False), **settings)
    if "stopped_after" in run:
        practice.iterate(run["stopped_after"])
        practice = Practice(folder, resume=True, **settings)
    if practice.rank == dist.get_world_size() - 1:
        spoil_gradients(practice, run.get("spoilt", 0))
    practice.iterate(run["iterations"])
    outcome = practice.outcome()
    rows = outcome.pop("rows")
    digests = gather(hashlib.sha256(repr(sorted(outcome.items())).encode()).hexdigest())
    if practice.rank == 0:
        (folder / "outcome.json").write_text(json.dumps({"rows": rows, "digests": digests}))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for each in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), each)
    leave_together()


if __name__ == "__main__":
    main()
