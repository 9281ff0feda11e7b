"""Check that no two worker processes play the same: seeds, random streams, actions and screens under one policy.

    python -m pi0.parallel.test_parallel
    python -m pi0.parallel.test_parallel --seed-bug       # all workers get one stream: shows that the check can fail

It starts real workers, which act with the same new policy, and ends with status 1 if any two are alike.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math

import numpy as np

from pi0.base.arguments import ranged
from pi0.base.errors import InputError, run_command
from pi0.parallel.config import DEFAULT_GAME, Config
from pi0.parallel.games import GameSpec
from pi0.parallel.machine_load import require_memory
from pi0.parallel.policy import shapes
from pi0.parallel.slices import Layout, publish
from pi0.parallel.worker import PlayerSpec, action_parts
from pi0.workers.pool import Loss, WorkerPool
from pi0.workers.process import WorkerError

DRAWS = 1000  # random numbers of each worker that are compared
START_S = 120.0


def main(arguments: list[str] | None = None) -> int:
    """Start workers, compare what they do; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.parallel.test_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--game", default=DEFAULT_GAME, help=f"the game (default {DEFAULT_GAME})")
    parser.add_argument(
        "--n_workers", "--n-workers", type=ranged(int, 2), default=8, help="workers (default 8)"
    )
    parser.add_argument("--steps", type=ranged(int, 1), default=100, help="steps of each (default 100)")
    parser.add_argument("--seed", type=ranged(int, 0), default=0, help="the run's seed (default 0)")
    parser.add_argument("--seed-bug", action="store_true", help="give all workers the same stream")
    options = parser.parse_args(arguments)
    require_memory(options.n_workers)
    game = GameSpec(options.game)
    layout = Layout(options.n_workers, 1, options.steps, math.prod(action_parts(game)))
    spec = PlayerSpec(game, layout, Config().max_steps, Config().noop_max, one_stream=options.seed_bug)
    return compare(_play(spec, options.seed))


def _play(spec: PlayerSpec, seed: int) -> list[tuple[int, bytes, bytes, bytes]]:
    """What each worker has: seed, random numbers, actions, screens; all act with the same weights."""
    pool = WorkerPool(
        "pi0.parallel.worker:worker_process",
        spec,
        {},
        spec.layout.workers,
        streams=np.random.SeedSequence(seed),
        limit_s=START_S,
        common=spec.layout.table,
    )
    try:
        draw = np.random.default_rng(seed)
        named = shapes(spec.layout.actions).items()
        parameters = {name: draw.normal(0, 0.01, shape).astype(np.float32) for name, shape in named}
        publish(spec.layout, pool.common, parameters, 0)
        found: dict[int, tuple[int, bytes, bytes, bytes]] = {}
        for worker in range(spec.layout.workers):
            pool.send(worker, "look", (spec.layout.steps, DRAWS, seed, worker))
        while (outcome := pool.next_outcome()) is not None:
            worker, seen = outcome
            if isinstance(seen, Loss | WorkerError):
                raise InputError(f"Worker {worker} failed to start: {seen}")
            found[worker] = seen
        return [found[worker] for worker in sorted(found)]
    finally:
        pool.close()


def compare(found: list[tuple[int, bytes, bytes, bytes]]) -> int:
    """Print each worker and what is alike; returns 1 if any two workers are."""
    for worker, (seed, random, actions, screens) in enumerate(found):
        marks = ", ".join(
            f"{name} {hashlib.sha256(content).hexdigest()[:12]}"
            for name, content in (("random numbers", random), ("actions", actions), ("screens", screens))
        )
        print(f"Worker {worker}: Seed: {seed} ({marks})")
    alike = {
        name: [
            f"{first} and {second}"
            for first, second in itertools.combinations(range(len(found)), 2)
            if found[first][column] == found[second][column]
        ]
        for column, name in enumerate(("seeds", "random numbers", "actions", "screens"))
    }
    for name, pairs in alike.items():
        if pairs:
            print(f"the same {name}: workers {', '.join(pairs)}")
    sequences = alike["random numbers"] + alike["actions"] + alike["screens"]
    if sequences:
        print("✗ WARNING: Some workers have identical random sequences")
    else:
        print("✓ SUCCESS: All workers have different random sequences!")
    if alike["seeds"]:
        print("✗ WARNING: Some workers have identical seeds")
    else:
        print("✓ SUCCESS: All workers have different seeds!")
    return int(bool(sequences or alike["seeds"]))


if __name__ == "__main__":
    run_command(main)
