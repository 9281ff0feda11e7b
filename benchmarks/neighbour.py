"""What do updates, cloning and acting cost beside another busy process? With libgomp's waiting and with the project's.

    python benchmarks/neighbour.py                  # about 6 minutes on a machine with nothing else to do
    python benchmarks/neighbour.py --work update --turns 5 --settings libraries project sleep 1000 3000 10000 one_thread

Each setting has a process of its own, with the quickstart's policy and random observations: minibatches of updates as
stage 13 makes them, updates of cloning as `pi0.warmstart` makes them, action chunks for a worker's slots. They take
turns: alone, beside a process with as many busy threads as there are cores, and beside a second training with the same
setting. A turn is a few seconds of calls, and counts as the seconds of a call. Factors are over `libraries` alone in the
same turn. Only one process and its neighbour run at a time; the others are stopped.

A turn in which further processes took more than `--others` of a core is made again, at most `--tries` times. The last
column says how many turns were disturbed nevertheless. Ctrl+C ends the measurement after the turns that are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import write_json
from pi0.base.progress import progress

LIBGOMPS = "300000"  # rounds that libgomp's threads spin by default
SETTINGS = {
    "libraries": {"GOMP_SPINCOUNT": LIBGOMPS},
    "project": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{rounds: {"GOMP_SPINCOUNT": rounds} for rounds in ("300", "1000", "3000", "10000", "30000")},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WORK = ("update", "cloning", "acting")
CONDITIONS = ("alone", "busy", "training")
LARGEST_FACTOR = 3.0  # the goal beside a neighbour
LOOP = "for ever"
BUSY = "busy threads"


def main() -> None:
    """Measure, save, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", action=Collect, nargs="+", default=["libraries", "project"], choices=SETTINGS,
        help="how threads wait; a number: rounds that they spin; with one_thread numbers differ in the last digits",
    )  # fmt: skip
    parser.add_argument("--work", action=Collect, nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--turns", type=ranged(int, low=1), default=7, help="turns of each measurement")
    parser.add_argument("--seconds", type=ranged(float, above=0), default=2.0, help="length of a turn")
    parser.add_argument(
        "--others", type=ranged(float, above=0), default=0.2, help="cores that further processes may take"
    )
    parser.add_argument("--tries", type=ranged(int, low=1), default=20, help="tries for an undisturbed turn")
    parser.add_argument("--output", default="outputs/neighbour.json")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    if options.process:
        run_process(options.process)
        return
    if "libraries" not in options.settings:
        parser.error("--settings needs libraries, with which the others are compared")
    before = os.getloadavg()[0]
    result = measure(options)
    from pi0.training.machine import machine  # takes seconds: not for `--help`

    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(options.output), result)
    print(table(result["rows"]))
    load = f"load before {before:.1f}, after {os.getloadavg()[0]:.1f}"
    print(
        f"\n{machine()['cpu']}, {os.cpu_count()} cores, {result['date']}, {len(result['rows'][0]['seconds'])} turns; {load}"
    )


def measure(options: argparse.Namespace) -> dict:
    """Seconds of a call and cores that others took, by work, setting and condition."""
    rows = [
        {"work": work, "setting": setting, "condition": condition, "seconds": [], "others": [], "repeated": 0}
        for work in options.work
        for condition in CONDITIONS
        for setting in options.settings
    ]
    with (
        contextlib.ExitStack() as stack,
        progress(total=options.turns * len(rows), label="measuring", unit="turn") as bar,
    ):
        measured = {name: Process(name, "calls") for name in options.settings}
        trainings = {name: Process(name, LOOP) for name in options.settings}
        busy = Process("project", BUSY)
        for process in (*measured.values(), *trainings.values(), busy):
            stack.enter_context(process)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for turn in range(options.turns):
            for row in rows[:: 1 if turn % 2 == 0 else -1]:
                neighbours = {"alone": None, "busy": busy, "training": trainings[row["setting"]]}
                neighbour = neighbours[row["condition"]]
                for _ in range(options.tries):
                    seconds, others = calls(measured[row["setting"]], row["work"], options.seconds, neighbour)
                    if others <= options.others:
                        break
                    row["repeated"] += 1
                row["seconds"].append(seconds)
                row["others"].append(others)
                bar.update(1, f"{row['work']}, {row['setting']}, {row['condition']}: {seconds:.3f} s")
    complete = min(len(row["seconds"]) for row in rows)
    if complete == 0:
        sys.exit("stopped before the first turn was complete")
    for row in rows:
        row["seconds"], row["others"] = row["seconds"][:complete], row["others"][:complete]
        row["disturbed"] = sum(others > options.others for others in row["others"])
    return {"rows": rows}


def calls(process: Process, work: str, seconds: float, neighbour: Process | None) -> tuple[float, float]:
    """Seconds of a call in one turn, and the cores that processes other than these took meanwhile."""
    both = [process, *([neighbour] if neighbour else [])]
    for one in both:
        one.go_on()
    time.sleep(0.2)  # until the neighbour is at full speed
    own, everybody, started = sum(one.cpu_seconds() for one in both), machine_seconds(), time.perf_counter()
    taken = process.ask(work, seconds)
    elapsed = time.perf_counter() - started
    others = machine_seconds() - everybody - (sum(one.cpu_seconds() for one in both) - own)
    for one in both:
        one.pause()
    return statistics.mean(taken), others / elapsed


class Process:
    """A process of this script, stopped but in its turns."""

    def __init__(self, setting: str, what: str):
        environment = {name: value for name, value in os.environ.items() if name not in WAITING}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--process", what],
            env={**environment, **SETTINGS[setting]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self._answer()
        self.pause()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, work: str, seconds: float) -> list[float]:
        """Let it do this work for so long; returns the seconds of each call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([work, seconds]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def go_on(self) -> None:
        """Let it run."""
        self._process.send_signal(signal.SIGCONT)

    def pause(self) -> None:
        """Stop it."""
        self._process.send_signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Processor time of all its threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a process of the measurement has ended; its error is above")
        return json.loads(line)


def machine_seconds() -> float:
    """Processor time of all processes, and what the host of a virtual machine has taken."""
    user, nice, system, _, _, irq, soft_irq, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")


def run_process(what: str) -> None:
    """Be one of the processes: say that it is ready, then do what is asked, or be a neighbour for ever."""
    end_with_parent = 1  # PR_SET_PDEATHSIG; a stopped process would outlive a killed script
    ctypes.CDLL(None).prctl(end_with_parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the script
    if what == BUSY:
        for _ in range(os.cpu_count() or 1):
            threading.Thread(target=compute_for_ever).start()
        print("[]", flush=True)
        return
    work = make_work()
    for call in work.values():
        call()
        call()
    print("[]", flush=True)
    while what == LOOP:
        work["update"]()
    for line in sys.stdin:
        name, seconds = json.loads(line)
        taken: list[float] = []
        started = time.perf_counter()
        while time.perf_counter() < started + seconds:
            before = time.perf_counter()
            work[name]()
            taken.append(time.perf_counter() - before)
        print(json.dumps(taken), flush=True)


def compute_for_ever() -> None:
    """Compute without ever waiting; hashing leaves Python's lock to the others."""
    block = bytes(1 << 20)
    while True:
        hashlib.sha256(block)


def make_work() -> dict[str, Callable[[], object]]:
    """The work by name, each on a policy of its own."""
    import numpy as np
    import torch

    from pi0 import PI0Policy
    from pi0.data.chunks import Chunks
    from pi0.policy.acting import ActingPolicy
    from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
    from pi0.ript.config import load_config
    from pi0.training.ema import AveragedModule
    from pi0.training.flow_loss import Augmentation, flow_loss
    from pi0.training.optimizer import make_optimizer
    from pi0.warmstart import parse_arguments

    config = load_config(str(ROOT / "configs" / "quickstart.yaml"), [])
    cloning = parse_arguments(["--output", "none"])
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    policy = PI0Policy.from_pretrained(ROOT / config.policy_path, "cpu")
    sizes = policy.config

    def chunks(count: int) -> Chunks:
        frame = (count, sizes.image_size, sizes.image_size, 3)
        return Chunks(
            {camera: torch.randint(0, 256, frame, dtype=torch.uint8) for camera in sizes.cameras},
            torch.randn(count, 8),
            ["pick up the black bowl next to the plate and place it on the plate"] * count,
            torch.rand(count, sizes.action_horizon, 7) * 2 - 1,
            torch.ones(count, sizes.action_horizon, dtype=torch.bool),
        )

    def learner(loss: Callable[[PI0Policy, torch.Generator], torch.Tensor]) -> Callable[[], float]:
        learning = policy.copy().train()
        optimizer = make_optimizer(learning, config.algo.lr, config.training.optimizer)
        average = AveragedModule(learning, learning.copy().eval(), config.algo.ema_decay)
        generator = torch.Generator().manual_seed(0)

        def learn() -> float:
            value = loss(learning, generator)
            value.backward()
            torch.nn.utils.clip_grad_norm_(learning.parameters(), config.algo.grad_norm_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            return value.item()

        return learn

    count = config.algo.minibatch_size
    minibatch = WeightedChunks(chunks(count), torch.ones(count), torch.ones(count, dtype=torch.long))
    demonstrations = chunks(cloning.batch_size)

    def update_loss(learning: PI0Policy, generator: torch.Generator) -> torch.Tensor:
        adapter = PI0_CFG_Adapter(
            learning, noise_samples=config.algo.noise_samples, augmentation=Augmentation()
        )
        return adapter.minibatch_loss(minibatch, generator)

    def cloning_loss(learning: PI0Policy, generator: torch.Generator) -> torch.Tensor:
        return flow_loss(
            learning,
            demonstrations,
            samples=cloning.noise_samples,
            generator=generator,
            augmentation=Augmentation(),
        ).mean()

    acting, seen = ActingPolicy(policy.eval()), chunks(config.task.rollouts_per_env)
    noise = np.stack([acting.noise((0, slot)) for slot in range(len(seen))])
    frames = {camera: images.numpy() for camera, images in seen.images.items()}
    return {
        "update": learner(update_loss),
        "cloning": learner(cloning_loss),
        "acting": lambda: acting.act(frames, seen.states.numpy(), seen.prompts, noise),
    }


def table(rows: list[dict]) -> str:
    """Markdown table: milliseconds of a call by work and setting, and factors over the libraries' alone."""
    seconds = {(row["work"], row["setting"], row["condition"]): row["seconds"] for row in rows}
    lines = [
        "| work | setting | alone, ms | factor | beside a busy process, ms | factor | beside a training, ms | factor | disturbed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for work, setting in dict.fromkeys((row["work"], row["setting"]) for row in rows):
        base, cells = seconds[work, "libraries", "alone"], []
        for condition in CONDITIONS:
            taken = seconds[work, setting, condition]
            factors = [value / alone for value, alone in zip(taken, base, strict=True)]
            same = setting == "libraries" and condition == "alone"
            cells += [spread([1000 * value for value in taken], 0), "1" if same else spread(factors, 2)]
        turns = [row for row in rows if (row["work"], row["setting"]) == (work, setting)]
        disturbed = sum(row["disturbed"] for row in turns)
        number = sum(len(row["seconds"]) for row in turns)
        lines.append(f"| {work} | {setting} | {' | '.join(cells)} | {disturbed} of {number} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    run_command(main)
