"""How fast is parallel PPO beside other trainers? Measured side by side, in turns, on Airstriker.

    make game peers                                       # the emulator, and the other trainers in .venv-peers
    python benchmarks/parallel.py                         # everything; on 2 cores about two hours, with nothing beside it
    python benchmarks/parallel.py --part training --turns 1 --updates 3
    python benchmarks/parallel.py --part scaling --picture outputs/parallel.png
    python benchmarks/parallel.py --table outputs/parallel.json

| part | ours | theirs |
|---|---|---|
| training | `python -m pi0.parallel.train_parallel`, modes overlap and sync, bfloat16 and float32; its checkpoints and logs included | Stable-Baselines3's PPO on SubprocVecEnv; a loop in CleanRL's style on gymnasium's AsyncVectorEnv |
| rollouts | workers with their own policies, a slice of each after another, no learning | SubprocVecEnv with VecFrameStack, a torch policy on the stacks of all environments |
| scaling | rollouts and training with 1, 2, 4, ... workers, to the number of cores, and training in one process | - |
| parts | milliseconds of a step of 4 frames, each part alone in one process | the same |

All learn the same network (Mnih et al. 2015) by 4 epochs of minibatches of 256 from 2048 transitions, and see the same
frames: 0 to 30 frames without action, 4 frames a step, grey, 84 x 84, stacks of 4. A training is measured over
`--updates` updates after 2 that warm up; the last one of ours does not count, since no worker plays beside it. The others
run with 1 and with 2 torch threads: threads that wait for work spin and take the cores of the game's processes, so 2
may be slower than 1. Ratios are over the number of threads that is best for them; one that is a tenth slower in the first
turn is not measured again. Each measurement has processes of its
own. A ratio is the geometric mean over turns of ours to theirs in the same turn, with Student's 95% interval; other
columns are medians. Memory is resident memory: pages that processes share count for each.

Beyond the cores that are there, `scaling` has a model instead of a measurement. With t_w for a worker's step of 4 frames
and t_u for a transition in the update, N workers are (t_w + t_u) / (t_w / N + t_u) times as fast as one in lock step, and
at most (t_w + t_u) / max(t_w / N, t_u) if they play during the update and the trainer has cores of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from processes import PEERS, PEERS_PYTHON, end_on_sigterm, require_peers, run, start

from benchmarks.figures import save
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import read_json, write_json
from pi0.base.progress import progress
from pi0.base.stats import mean_interval
from pi0.workers.pool import usable_cores

PARTS = ("training", "rollouts", "scaling", "parts")
NEED_PEERS = ("training", "rollouts", "parts")
WARM_UP = 2  # updates
UPDATE_INTERVAL = 2048
SB3, CLEANRL = "stable-baselines3", "cleanrl-style"
SUBPROC = "SubprocVecEnv"
# At least and aim of a ratio, by part, precision of ours and peer; for two cores.
GOALS = {
    ("training", "bfloat16", SB3): (2.0, 2.6),
    ("training", "float32", SB3): (1.5, 1.9),
    ("training", "bfloat16", CLEANRL): (1.7, 2.2),
    ("rollouts", "", SUBPROC): (1.5, 2.0),
}
SECOND_WORKER = (1.9, 1.98)
IDLE_PERCENT = (5.0, 2.0)
WORKER_MB = (300.0, 150.0)
WANTED = {4: 3.6, 8: 7.0, 16: 12.0}  # times one worker
MODEL = (1, 2, 4, 8, 16)
ONE_PROCESS = "one process"
PART_NAMES = ("emulator", "preprocessing", "inference", "transport")
Values = dict[str, Any]
Turns = dict[str, list[Values]]


def main() -> None:
    """Measure, save, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action=Collect, nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=ranged(int, low=1), default=5, help="measurements of each side")
    parser.add_argument(
        "--updates", type=ranged(int, low=1), default=10, help="updates of a training that are measured"
    )
    parser.add_argument(
        "--seconds", type=ranged(float, above=0), default=10.0, help="length of another measurement"
    )
    parser.add_argument(
        "--workers", action=Collect, nargs="+", type=ranged(int, low=1), default=[2, 8],
        help="numbers of workers, and of the others' environments",
    )  # fmt: skip
    parser.add_argument(
        "--threads", action=Collect, nargs="+", type=ranged(int, low=1), default=[1, 2],
        help="torch threads of the others",
    )  # fmt: skip
    parser.add_argument(
        "--modes", action=Collect, nargs="+", choices=("overlap", "sync"), default=["overlap", "sync"]
    )
    parser.add_argument(
        "--precisions",
        action=Collect,
        nargs="+",
        choices=("bfloat16", "float32"),
        default=["bfloat16", "float32"],
    )
    parser.add_argument("--output", default="outputs/parallel.json")
    parser.add_argument("--table", metavar="FILE", help="only print the tables of this file")
    parser.add_argument("--picture", metavar="FILE", help="draw `scaling` there, a PNG")
    parser.add_argument(
        "--process", nargs="+", action=Collect, help=argparse.SUPPRESS
    )  # how this script calls itself
    options = parser.parse_args()
    if options.process:
        name, *arguments = options.process
        print(json.dumps(PROCESSES[name](*map(float, arguments))))
        return
    result = read_json(Path(options.table)) if options.table else measure(options)
    print(tables(result))
    if options.picture:
        if "scaling" not in result["parts"]:
            parser.error("--picture draws the part `scaling`, which was not measured")
        draw(result, Path(options.picture))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, in turns; what is complete is in the file after each turn."""
    if set(options.part) & set(NEED_PEERS):
        require_peers()
    from pi0.training.machine import machine  # takes seconds: not for `--help`

    end_on_sigterm()
    sides = {part: SIDES[part](options) for part in PARTS if part in options.part}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "cores": usable_cores(),
        "load": [os.getloadavg()[0]],
        "updates": options.updates,
        "seconds": options.seconds,
        "parts": {part: {name: [] for name in of_part} for part, of_part in sides.items()},
    }
    total = options.turns * sum(map(len, sides.values()))
    with progress(total=total, label="measuring", unit="run") as bar:
        for turn in range(options.turns):
            for part, of_part in sides.items():
                found = {}
                for name in list(of_part)[:: 1 if turn % 2 == 0 else -1]:
                    found[name] = of_part[name]()
                    rate = found[name].get("steps_per_s")
                    bar.update(1, f"{part}, {name}" + (f": {rate:.0f} steps/s" if rate else ""))
                for name, values in found.items():
                    result["parts"][part][name].append(values)
                write_json(output, result)
                if turn == 0 and part in ("training", "rollouts"):
                    for name in slower_threads(result["parts"][part]):
                        del of_part[name]
                        bar.update(options.turns - 1, f"{name} is left out from now on")
    result["load"].append(os.getloadavg()[0])
    write_json(output, result)
    return result


# What is measured ---------------------------------------------------------------------------------


def training_sides(options: argparse.Namespace) -> dict[str, Callable[[], Values]]:
    """Trainings by name: "ours, mode, precision, workers" and "peer, envs, threads"."""
    sides: dict[str, Callable[[], Values]] = {}
    for workers in options.workers:
        for mode in options.modes:
            for precision in options.precisions:
                name = f"ours, {mode}, {precision}, {workers} workers"
                sides[name] = partial(our_training, workers, options.updates, mode, precision)
        for peer in (SB3, CLEANRL):
            for threads in options.threads:
                command = [
                    PEERS / "training.py", peer, "--envs", workers, "--threads", threads,
                    "--warm-up", WARM_UP, "--updates", options.updates,
                ]  # fmt: skip
                sides[f"{peer}, {workers} envs, {threads} threads"] = partial(run, PEERS_PYTHON, *command)
    return sides


def rollout_sides(options: argparse.Namespace) -> dict[str, Callable[[], Values]]:
    """Rollouts by name."""
    sides: dict[str, Callable[[], Values]] = {}
    for workers in options.workers:
        sides[f"ours, {workers} workers"] = partial(own_process, "rollouts", workers, options.seconds)
        for threads in options.threads:
            command = [
                PEERS / "rollouts.py", "--envs", workers, "--threads", threads, "--seconds", options.seconds,
            ]  # fmt: skip
            sides[f"{SUBPROC}, {workers} envs, {threads} threads"] = partial(run, PEERS_PYTHON, *command)
    return sides


def scaling_sides(options: argparse.Namespace) -> dict[str, Callable[[], Values]]:
    """Rollouts and trainings by "what, workers"."""
    sides: dict[str, Callable[[], Values]] = {}
    sides[ONE_PROCESS] = partial(our_training, 1, options.updates, "sync", "auto", "--workers", 0)
    for workers in (number for number in MODEL if number <= usable_cores()):
        sides[f"rollouts, {workers}"] = partial(own_process, "rollouts", workers, options.seconds)
        for mode in ("sync", "overlap"):
            sides[f"{mode}, {workers}"] = partial(our_training, workers, options.updates, mode, "auto")
    return sides


def part_sides(options: argparse.Namespace) -> dict[str, Callable[[], Values]]:
    """The parts of a step: ours, and those of Stable-Baselines3."""
    envs = max(options.workers)

    def theirs() -> Values:
        command = [PEERS / "rollouts.py", "--parts", "--envs", envs, "--seconds", options.seconds]
        found = run(PEERS_PYTHON, *command)
        for threads in options.threads:
            command = [
                PEERS / "training.py", SB3, "--envs", envs, "--threads", threads, "--warm-up", 1, "--updates", 1,
            ]  # fmt: skip
            found[f"update, float32, {threads} threads"] = run(PEERS_PYTHON, *command)["update_ms"]
        return found

    return {"ours": partial(own_process, "parts", options.seconds), SB3: theirs}


SIDES = {"training": training_sides, "rollouts": rollout_sides, "scaling": scaling_sides, "parts": part_sides}


def our_training(workers: int, updates: int, mode: str, precision: str, *more: object) -> Values:
    """A run of train_parallel: steps a second and more over its updates after those that warm up, without the last."""
    with tempfile.TemporaryDirectory() as folder:
        start(
            sys.executable, "-m", "pi0.parallel.train_parallel", "--n_workers", workers, "--mode", mode,
            "--precision", precision, "--update_interval", UPDATE_INTERVAL, "--max_updates", WARM_UP + updates + 1,
            "--factored", "false", "--max_episodes", 10**9, "--evaluation_episodes", 0, "--logging.use_wandb", "false", "--output_dir", folder, *more,
        )  # fmt: skip
        (file,) = Path(folder).glob("*/metrics.jsonl")
        records = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = records[WARM_UP + updates - 1]["seconds"] - records[WARM_UP - 1]["seconds"]
    measured = records[WARM_UP : WARM_UP + updates]
    transitions = sum(record["transitions"] for record in measured)
    finished = sum(record["finished"] for record in records)
    phases = {name: sum(record["phases"][name] for record in measured) for name in measured[0]["phases"]}
    return {
        "steps_per_s": transitions / seconds,
        "idle_percent": 100 - statistics.mean(record["cpu_percent"] for record in measured),
        "worker_mb": statistics.mean(measured[-1]["memory"]["worker_mb"].values() or [0.0]),
        "trainer_mb": measured[-1]["memory"]["rss_mb"],
        "update_ms": 1e3 * (seconds - phases["wait"]) / transitions,
        "episode_steps": records[-1]["steps"] / finished if finished else None,
        "phases_ms": {name: 1e3 * value / transitions for name, value in phases.items()},
        "respawns": sum(len(record["respawns"]) for record in measured),
    }


def own_process(name: str, *arguments: float) -> Values:
    """A measurement of ours in a process of this script."""
    return run(sys.executable, __file__, "--process", name, *arguments)


# Ours, in a process of its own --------------------------------------------------------------------


def our_collector(workers: int) -> tuple[Any, Any]:
    """Workers that have begun, and the network with whose weights they act."""
    import torch

    from pi0.parallel.collector import Collector
    from pi0.parallel.config import Config
    from pi0.parallel.games import GameSpec
    from pi0.parallel.network import ActorCritic
    from pi0.parallel.slices import Layout
    from pi0.parallel.worker import PlayerSpec, action_parts

    config = Config()
    torch.manual_seed(config.seed)
    game = GameSpec(config.game)
    layout = Layout(workers, 2, UPDATE_INTERVAL // workers, math.prod(action_parts(game)))
    spec = PlayerSpec(game, layout, config.max_steps, config.noop_max)
    collector = Collector(spec, deadline_s=config.deadline_s)
    collector.begin(config.seed, [0] * workers)
    network = ActorCritic((layout.actions,))
    collector.publish(network.flat(), 0)
    return collector, network


def collect(collector: Any, number: int) -> list[Any]:
    """A slice of every worker."""
    for worker in range(collector.layout.workers):
        collector.ask(worker, number % 2, collector.layout.steps, 0, 0.0)
    return [collector.next_filled() for _ in range(collector.layout.workers)]


def our_rollouts(workers: float, seconds: float) -> Values:
    """Steps a second of workers without learning; slices are asked for when all are there."""
    collector, _ = our_collector(int(workers))
    collect(collector, 0)
    slices: list[Any] = []
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        slices += collect(collector, len(slices) // int(workers) + 1)
    memory = [report["memory_mb"] for report in collector.reports]
    collector.close()
    steps, episodes = sum(each.steps for each in slices), sum(len(each.episodes) for each in slices)
    return {
        "steps_per_s": steps / elapsed,
        "worker_mb": statistics.mean(memory),
        "episode_steps": steps / episodes if episodes else None,
    }


def our_parts(seconds: float) -> Values:
    """Milliseconds of the parts of a step, each alone; the seam is measured with one worker."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    from pi0.parallel.batches import make_batch
    from pi0.parallel.config import Config
    from pi0.parallel.games import GameSpec, make_game, small_grey
    from pi0.parallel.network import ActorCritic
    from pi0.parallel.policy import FramePolicy, log_probabilities, views
    from pi0.parallel.ppo import PPOAgent, PPOSettings

    config = Config()
    found: Values = {}
    random = np.random.default_rng(0)
    collector, network = our_collector(1)
    collect(collector, 0)
    slices: list[Any] = []
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds / 4:
        slices += collect(collector, len(slices) + 1)
    inside = sum(each.seconds["game"] + each.seconds["policy"] for each in slices)
    found["transport"] = 1e3 * (elapsed - inside) / sum(each.steps for each in slices)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = PPOSettings(epochs=1, minibatch=config.minibatch)
    batch = None
    for precision in ("bfloat16", "float32"):
        learned = ActorCritic((collector.layout.actions,), getattr(torch, precision)).to(device)
        learned.load_state_dict(network.state_dict())
        agent = PPOAgent(learned, settings, config.lr, torch.Generator().manual_seed(0))
        for threads in sorted({1, usable_cores()}):
            torch.set_num_threads(threads)
            if batch is None:
                before = time.perf_counter()
                batch = make_batch(slices[-1:], collector.layout, collector.arrays, agent, config)
                found["batch"] = 1e3 * (time.perf_counter() - before) / len(batch)
            agent.update(batch)  # one epoch; all take the same time
            before = time.perf_counter()
            agent.update(batch)
            taken = config.epochs * (time.perf_counter() - before)
            found[f"update, {precision}, {threads} threads"] = 1e3 * taken / len(batch)
    collector.close()

    game = make_game(GameSpec(config.game))
    policy = FramePolicy(game.actions)
    policy.load(views(network.flat(), game.actions))
    frame = game.reset(0)
    screens, number = [game.screen().copy()] * 2, 0

    def step() -> None:
        if game.step(int(random.integers(game.actions))).terminated:
            game.reset(0)

    def prepare() -> None:
        small_grey(np.maximum(*screens))

    def think() -> None:
        nonlocal number
        number += 1
        policy.show(frame, number)
        logs = log_probabilities(policy(number)[0], 0.0)
        np.searchsorted(np.cumsum(np.exp(logs)), random.random())

    torch.set_num_threads(1)
    with threadpool_limits(1, "blas"):
        found["preprocessing"] = 1e3 * call_s(prepare, seconds / 4)
        found["emulator"] = 1e3 * call_s(step, seconds / 4) - found["preprocessing"]
        found["inference"] = 1e3 * call_s(think, seconds / 4)
    game.close()
    return found


def call_s(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, the mean over so many seconds."""
    for _ in range(100):
        call()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        calls += 1
    return elapsed / calls


PROCESSES: dict[str, Callable[..., Values]] = {"rollouts": our_rollouts, "parts": our_parts}


# Tables -------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> str:
    """All tables as Markdown, with the machine, the date and the number of turns."""
    printed = {
        "training": lambda turns: training_table(turns, "training"),
        "rollouts": lambda turns: training_table(turns, "rollouts"),
        "scaling": scaling_table,
        "parts": lambda turns: parts_table(turns, result["cores"]),
    }
    blocks = [f"## {part}\n\n{printed[part](turns)}" for part, turns in result["parts"].items()]
    number = max(len(values) for turns in result["parts"].values() for values in turns.values())
    load = " to ".join(f"{each:.1f}" for each in result["load"])
    machine = result["machine"]
    gpu = f", {machine['gpu']} for pi0.parallel" if machine["gpu"] else ""
    blocks.append(
        f"{machine['cpu']}, {result['cores']} cores{gpu}, torch {machine['torch']}, {result['date']}, {number} turns; "
        f"trainings of {result['updates']} updates of {UPDATE_INTERVAL} transitions, others of {result['seconds']:g} s; "
        f"load {load}"
    )
    return "\n\n".join(blocks)


def training_table(turns: Turns, part: str) -> str:
    """Each side's medians; then ratios over each peer at its best number of threads; then the goals."""
    lines = [
        f"| {part} | steps/s | idle CPU, % | a worker, MB | main process, MB | update, ms a transition |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in turns.items():
        cells = [
            column(values, key, digits)
            for key, digits in (("idle_percent", 1), ("worker_mb", 0), ("trainer_mb", 0), ("update_ms", 2))
        ]
        lines.append(f"| {name} | {spread(values)} | {' | '.join(cells)} |")
    best = best_peers(turns)
    ours = [name for name in turns if name.startswith("ours")]
    lines += ["", "| steps/s over | " + " | ".join(best.values()) + " |", "|---|" + "---|" * len(best)]
    for name in ours:
        cells = [format_ratio(ratios(turns[name], turns[peer])) for peer in best.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| goal on 2 cores | measured | at least | aim |", "|---|---|---|---|"]
    for (goal_part, precision, peer), goals in GOALS.items():
        of_ours = [name for name in ours if precision in name]
        against = [name for name in best.values() if name.startswith(peer)]
        if goal_part != part or not of_ours or not against:
            continue
        mine, theirs = fastest(turns, of_ours), fastest(turns, against)
        ratio = format_ratio(ratios(turns[mine], turns[theirs]))
        lines.append(f"| {mine} over {theirs} | {ratio} | {goals[0]:g} | {goals[1]:g} |")
    if part == "training":
        name = fastest(turns, ours)
        for what, key, goals in (
            ("idle CPU, %", "idle_percent", IDLE_PERCENT),
            ("a worker, MB", "worker_mb", WORKER_MB),
        ):
            lines.append(f"| {what}, {name} | {column(turns[name], key, 1)} | {goals[0]:g} | {goals[1]:g} |")
    return "\n".join(lines)


def slower_threads(turns: Turns) -> list[str]:
    """The names of peers that are a tenth slower than the same peer with another number of threads."""
    best = best_peers(turns)
    return [
        name
        for name in turns
        if (fast := best.get(name.rpartition(", ")[0])) not in (None, name)
        and turns[name][0]["steps_per_s"] < 0.9 * turns[fast][0]["steps_per_s"]
    ]


def best_peers(turns: Turns) -> dict[str, str]:
    """For each peer and its number of environments, the name with the number of threads that is best for it."""
    groups: dict[str, list[str]] = {}
    for name in turns:
        if not name.startswith("ours"):
            groups.setdefault(name.rpartition(", ")[0], []).append(name)
    return {group: fastest(turns, names) for group, names in groups.items()}


def fastest(turns: Turns, names: Sequence[str]) -> str:
    """The name with the highest median."""
    return max(names, key=lambda name: statistics.median(values["steps_per_s"] for values in turns[name]))


def ratios(ours: Sequence[Values], theirs: Sequence[Values]) -> list[float]:
    """The values of each turn."""
    return [mine["steps_per_s"] / other["steps_per_s"] for mine, other in zip(ours, theirs, strict=True)]


def format_ratio(values: Sequence[float]) -> str:
    """Geometric mean with Student's 95% interval of the logarithms: "2.10 (1.95 to 2.26)"."""
    mean, low, high = (math.exp(each) for each in mean_interval([math.log(value) for value in values]))
    return f"{mean:.2f} (one turn)" if len(values) == 1 else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def spread(values: Sequence[Values]) -> str:
    """Median of the steps a second (lowest to highest)."""
    rates = [each["steps_per_s"] for each in values]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def median(values: Sequence[Values], key: str) -> float | None:
    """Median of what the turns have of it."""
    there = [each[key] for each in values if each.get(key) is not None]
    return statistics.median(there) if there else None


def column(values: Sequence[Values], key: str, digits: int) -> str:
    """Median as text."""
    return "-" if (middle := median(values, key)) is None else f"{middle:.{digits}f}"


def scaling_facts(turns: Turns) -> dict[str, Any]:
    """Times of a step in ms: `play` of one worker, `learn` in lock step; and which numbers of workers were measured."""
    play = 1e3 / statistics.median(values["steps_per_s"] for values in turns["rollouts, 1"])
    learn = median(turns["sync, 1"], "update_ms")
    measured = sorted(int(name.split(", ")[1]) for name in turns if name.startswith("rollouts"))
    return {"play": play, "learn": learn, "measured": measured}


def lock_step(play: float, learn: float, workers: int) -> float:
    """How many times as fast as one worker, if they wait for the update."""
    return (play + learn) / (play / workers + learn)


def overlapped(play: float, learn: float, workers: int) -> float:
    """How many times as fast as one worker in lock step at most, if they play during the update."""
    return (play + learn) / max(play / workers, learn)


def scaling_table(turns: Turns) -> str:
    """Measured to the number of cores; the model for all numbers of workers; what the wanted ratios need."""
    facts = scaling_facts(turns)
    play, learn = facts["play"], facts["learn"]
    base = statistics.median(values["steps_per_s"] for values in turns["sync, 1"])
    length = median([*turns["sync, 1"], *turns["rollouts, 1"]], "episode_steps")
    trainer, each_worker = (median(turns["overlap, 1"], name) or 0.0 for name in ("trainer_mb", "worker_mb"))

    def an_hour(rate: float) -> str:
        return "-" if length is None else f"{3600 * rate / length:,.0f}"

    head = (
        "| workers | rollouts, steps/s | over 1 | sync, steps/s | over 1 | overlap, steps/s | over 1 in sync "
    )
    lines = [
        "Measured:",
        "",
        head + "| episodes/h, sync | episodes/h, overlap | MB, all |",
        "|" + "---|" * 10,
    ]
    for workers in facts["measured"]:
        rollouts, sync, overlap = (turns[f"{what}, {workers}"] for what in ("rollouts", "sync", "overlap"))
        medians = (statistics.median(values["steps_per_s"] for values in each) for each in (sync, overlap))
        cells = [
            spread(rollouts),
            format_ratio(ratios(rollouts, turns["rollouts, 1"])),
            spread(sync),
            format_ratio(ratios(sync, turns["sync, 1"])),
            spread(overlap),
            format_ratio(ratios(overlap, turns["sync, 1"])),
            *map(an_hour, medians),
            f"{(median(overlap, 'trainer_mb') or 0) + workers * (median(overlap, 'worker_mb') or 0):,.0f}",
        ]
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    rows = {"one process": (ONE_PROCESS, 0)}
    rows |= {f"{workers}, overlap": (f"overlap, {workers}", workers) for workers in facts["measured"]}
    lines += ["", "| workers | steps/s | over one process | episodes/h | MB, all |", "|---|---|---|---|---|"]
    for label, (name, workers) in rows.items():
        rate = statistics.median(values["steps_per_s"] for values in turns[name])
        memory = (median(turns[name], "trainer_mb") or 0) + workers * (median(turns[name], "worker_mb") or 0)
        ratio = format_ratio(ratios(turns[name], turns[ONE_PROCESS]))
        lines.append(f"| {label} | {spread(turns[name])} | {ratio} | {an_hour(rate)} | {memory:,.0f} |")
    times = f"t_w = {play:.2f} ms for a worker's step, t_u = {learn:.2f} ms for a transition in the update with all cores"
    head = "| workers | sync over 1 | overlap over 1 in sync, at most | episodes/h, sync | episodes/h, overlap, at most "
    lines += [
        "",
        f"Model, not measured, on a machine with a core for each worker and for the trainer; {times}, so in lock step "
        + f"with one worker {100 * learn / (play + learn):.0f}% of the time is serial:",
        "",
        head + "| MB, all |",
        "|" + "---|" * 6,
    ]
    for workers in MODEL:
        modelled = lock_step(play, learn, workers), overlapped(play, learn, workers)
        cells = [f"{each:.2f}" for each in modelled] + [an_hour(base * each) for each in modelled]
        lines.append(f"| {workers} | {' | '.join(cells)} | {trainer + workers * each_worker:,.0f} |")
    lines += [
        "",
        "| wanted | serial share, lock step | t_u, lock step, ms | t_u, overlapped, ms |",
        "|---|---|---|---|",
    ]
    for workers, times in WANTED.items():
        share = (workers / times - 1) / (workers - 1)
        # Overlapped, t_w / N is the limit if t_u is below it, and that is N times as fast or more.
        lines.append(
            f"| {times:g} with {workers} | {100 * share:.1f}% | {play * share / (1 - share):.3f} | "
            f"{play / (times - 1):.3f} |"
        )
    if 2 in facts["measured"]:
        second = format_ratio(ratios(turns["rollouts, 2"], turns["rollouts, 1"]))
        lines += [
            "",
            "| goal on 2 cores | measured | at least | aim |",
            "|---|---|---|---|",
            f"| rollouts, 2 workers over 1 | {second} | {SECOND_WORKER[0]:g} | {SECOND_WORKER[1]:g} |",
        ]
    return "\n".join(lines)


def parts_table(turns: Turns, cores: int) -> str:
    """Milliseconds of each part, and the steps a second that all cores can do at most if none ever waits."""
    names = [*PART_NAMES, "batch"]
    names += sorted({name for values in turns.values() for name in values[0] if name.startswith("update")})
    lines = ["| ms a step of 4 frames | ours | " + SB3 + " | theirs over ours |", "|---|---|---|---|"]
    for name in names:
        cells = [column(turns[side], name, 4 if name == "batch" else 3) for side in ("ours", SB3)]
        pairs = [
            (mine[name], other[name])
            for mine, other in zip(turns["ours"], turns[SB3], strict=True)
            if mine.get(name, 0) > 0 and other.get(name, 0) > 0
        ]
        ratio = format_ratio([other / mine for mine, other in pairs]) if pairs else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio} |")
    for name in (name for name in names if name.endswith(", 1 threads")):
        cells = []
        for side in ("ours", SB3):
            whole = [
                sum(values.get(part, 0.0) for part in (*PART_NAMES, "batch", name))
                for values in turns[side]
                if name in values
            ]
            cells.append(
                f"{statistics.median(whole):.2f} ms, {1e3 * cores / statistics.median(whole):,.0f} steps/s"
                if whole
                else "-"
            )
        precision = name.split(", ")[1]
        lines.append(f"| sum, {precision}, and the limit on {cores} cores | {' | '.join(cells)} | |")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """What was measured and the model, drawn apart: solid to the cores, dashed beyond."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    turns = result["parts"]["scaling"]
    facts = scaling_facts(turns)
    play, learn = facts["play"], facts["learn"]
    figure, axis = plt.subplots(figsize=(7, 4.5))
    curves = (("sync", lock_step, "tab:blue"), ("overlap", overlapped, "tab:orange"))
    for mode, model, color in curves:
        heights = []
        for workers in facts["measured"]:
            logs = [math.log(each) for each in ratios(turns[f"{mode}, {workers}"], turns["sync, 1"])]
            heights.append([math.exp(each) for each in mean_interval(logs)])
        middle = [each[0] for each in heights]
        bars = [[0 if math.isnan(low) else mean - low for mean, low, _ in heights],
                [0 if math.isnan(high) else high - mean for mean, _, high in heights]]  # fmt: skip
        axis.errorbar(
            facts["measured"], middle, bars, color=color, marker="o", capsize=3, label=f"{mode}, measured"
        )
        limit = ", at most" if mode == "overlap" else ""
        axis.plot(
            MODEL,
            [model(play, learn, workers) for workers in MODEL],
            "--",
            color=color,
            label=f"{mode}, model{limit}",
        )
    base = turns["rollouts, 1"]
    middle = [
        math.exp(statistics.mean(math.log(each) for each in ratios(turns[f"rollouts, {workers}"], base)))
        for workers in facts["measured"]
    ]
    axis.plot(facts["measured"], middle, color="tab:green", marker="s", label="rollouts alone, measured")
    axis.plot(list(WANTED), list(WANTED.values()), "x", color="black", label="wanted")
    axis.axvline(result["cores"], color="grey", linewidth=0.8)
    axis.annotate(f"{result['cores']} cores", (result["cores"], 0.97), xycoords=("data", "axes fraction"),
                  xytext=(4, 0), textcoords="offset points", va="top", color="grey")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_xticks(MODEL)
    axis.set_xlabel("workers")
    axis.set_ylabel("times one worker")
    axis.set_title(f"{result['machine']['cpu']}, {result['date']}", fontsize=9)
    axis.legend(fontsize=8)
    save(figure, file)


if __name__ == "__main__":
    run_command(main)
