"""Which parts of a rollout take how much time, and how does the time grow?

    python benchmarks/rollout_cost.py                     # both tables, about 8 minutes
    python benchmarks/rollout_cost.py --tables profile

The profile runs episodes of the tiny policy in one process and measures the time of each part. It also gives the time
that MuJoCo alone needs for the same control steps, which no engine around it can beat. Growth is rollouts a minute of
whole pools: by workers, open tasks, actions a chunk and image size, each compared with the quickstart's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mujoco
import numpy as np

from pi0 import PI0Policy
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.progress import progress
from pi0.libero import gl
from pi0.libero.assets import resolve_assets
from pi0.libero.environments import Environments
from pi0.libero.rendering import Renderer
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import TaskSim
from pi0.libero.worker import Worker, WorkerSpec
from pi0.model.config import Pi0Config
from pi0.policy.acting import ActingPolicy

CHECKPOINT = ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SUITE, TASK = "libero_spatial", 3
SETTINGS = {"workers": 2, "tasks": 1, "chunk": 10, "image_size": 64}
GROWTH = {
    "workers": [1, 2, 4],
    "tasks": [1, 2, 5, 10],
    "chunk": [1, 2, 5, 10],
    "image_size": [64, 128, 224, 256],
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", action=Collect, nargs="+", choices=["profile", "growth"], default=["profile", "growth"]
    )
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    parser.add_argument(
        "--episodes", type=ranged(int, low=1), default=40, help="episodes of each measurement"
    )
    options = parser.parse_args()
    gl.select_backend()
    if "profile" in options.tables:
        print(profile(options.assets, options.episodes))
    if "growth" in options.tables:
        print(growth(options.assets, options.episodes))


class Clock:
    """Seconds by part; a part inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        self.calls[name] += 1
        yield
        self._switch()
        self._running.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def measure(self, owner: type, method: str, name: str) -> None:
        """Count every call of a method as a part."""
        original: Callable = getattr(owner, method)

        def timed(*arguments, **keywords):
            with self.part(name):
                return original(*arguments, **keywords)

        setattr(owner, method, timed)


def profile(assets: str, count: int) -> str:
    """Markdown table of the parts of a rollout."""
    clock = Clock()
    policy = PI0Policy.from_pretrained(CHECKPOINT)
    acting, horizon = ActingPolicy(policy), policy.config.action_horizon
    spec = WorkerSpec(
        resolve_assets(assets), policy.config.cameras, 64, "fast", slots=4, chunk=horizon, max_open_tasks=1
    )
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.arrays().items()}
    worker = Worker(spec, arrays, np.random.default_rng(0))
    with runner(assets, **SETTINGS | {"workers": 1}) as environments:
        states = environments.evaluation_states()[0]
        rollouts = [environments.rollout(states, index, (1, 0, index)) for index in range(min(count, 50))]
    worker.open(states.task)
    for owner, method, name in (
        (TaskSim, "reset", "reset and settling"),
        (TaskSim, "step", "control steps"),
        (TaskSim, "snapshot", "snapshots"),
        (TaskSim, "restore", "snapshots"),
        (TaskSim, "proprioception", "proprioception"),
        (Renderer, "render", "frames"),
        (ActingPolicy, "act", "policy"),
    ):
        clock.measure(owner, method, name)
    control_steps, mujoco_s, steps_sampled = 0, 0.0, 0
    with clock.part("the rest"), progress(total=len(rollouts), label="profiling", unit="episode") as bar:
        for first in range(0, len(rollouts), spec.slots):
            slots = dict(enumerate(rollouts[first : first + spec.slots]))
            worker.advance(list(slots.items()))
            chunk = 0
            while slots:
                noise = np.stack([acting.noise((0, slot, chunk)) for slot in range(spec.slots)])
                images = {camera: arrays["images"][:, i] for i, camera in enumerate(spec.cameras)}
                prompts = [states.task.prompt] * spec.slots
                arrays["actions"][:] = acting.act(images, arrays["states"], prompts, noise)
                for answer in worker.advance([(slot, horizon) for slot in slots]):
                    control_steps += answer.executed
                    if answer.done:
                        del slots[answer.slot]
                        bar.update(1, "")
                with clock.part("(measuring MuJoCo)"):
                    seconds, steps = mujoco_alone(worker, states.task)
                    mujoco_s, steps_sampled = mujoco_s + seconds, steps_sampled + steps
                chunk += 1
    del clock.seconds["(measuring MuJoCo)"]
    steps_with_settling = clock.calls["control steps"]
    limit = mujoco_s / steps_sampled * steps_with_settling
    total = sum(clock.seconds.values())
    title = (
        f"{len(rollouts)} episodes, {control_steps} control steps, one process, "
        f"{1e3 * total / len(rollouts):.0f} ms an episode; assets: {Path(assets).name}"
    )
    lines = [
        title,
        "",
        "| part | share | ms an episode | calls | us a call |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        calls = clock.calls[name]
        lines.append(
            f"| {name} | {100 * seconds / total:.0f}% | {1e3 * seconds / len(rollouts):.1f} | {calls} "
            f"| {1e6 * seconds / calls:.0f} |"
        )
    lines.append(
        f"| MuJoCo's steps alone, for as many control steps | {100 * limit / total:.0f}% "
        f"| {1e3 * limit / len(rollouts):.1f} | | {1e6 * limit / steps_with_settling:.0f} a control step |"
    )
    return "\n".join(lines)


def mujoco_alone(worker: Worker, task) -> tuple[float, int]:
    """Seconds and control steps of MuJoCo alone from the scene's current state, which is restored."""
    sim, _ = worker._open[task]
    state = np.empty(mujoco.mj_stateSize(sim.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(sim.model, sim.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    started = time.perf_counter()
    mujoco.mj_step(sim.model, sim.data, nstep=25)
    seconds = time.perf_counter() - started
    mujoco.mj_setState(sim.model, sim.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return seconds, 1


def growth(assets: str, count: int) -> str:
    """Markdown table of rollouts a minute, one setting changed at a time."""
    lines = ["| setting | rollouts/min | control steps/s | against the quickstart's |", "|---|---|---|---|"]
    usual = rate(assets, count, **SETTINGS)
    lines.append(f"| {SETTINGS} | {usual[0]:.0f} | {usual[1]:.0f} | 1 |")
    jobs = [(name, value) for name, values in GROWTH.items() for value in values if value != SETTINGS[name]]
    with progress(total=len(jobs), label="growth", unit="setting") as bar:
        for name, value in jobs:
            measured = rate(assets, count, **SETTINGS | {name: value})
            lines.append(
                f"| {name} = {value} | {measured[0]:.0f} | {measured[1]:.0f} | {measured[0] / usual[0]:.2f} |"
            )
            bar.update(1, lines[-1])
    return "\n".join(lines)


def runner(assets: str, workers: int, tasks: int, chunk: int, image_size: int) -> Environments:
    task = TaskConfig(
        benchmark_name=SUITE,
        task_names_to_use=[(TASK + number) % 10 for number in range(tasks)],
        image_size=image_size,
        replan_steps=chunk,
        num_parallel_envs=workers,
        assets=assets,
    )
    return Environments(task, Pi0Config.preset("pi0_tiny"))


def rate(assets: str, count: int, **settings: int) -> tuple[float, float]:
    """Rollouts a minute and control steps a second, with mixed tasks; scenes are built before."""
    acting = ActingPolicy(PI0Policy.from_pretrained(CHECKPOINT))
    with runner(assets, **settings) as environments:
        pools = environments.evaluation_states()
        starts = [(pools[number % len(pools)], number // len(pools)) for number in range(count)]
        rollouts = [environments.rollout(pool, index, (1, 0, index)) for pool, index in starts]
        warm = [replace(rollout, horizon=10) for rollout in rollouts for _ in range(settings["workers"])]
        list(environments.run_policy(acting, warm[: 16 * len(pools)]))
        started = time.perf_counter()
        episodes = [episode for _, episode in environments.run_policy(acting, rollouts)]
        seconds = time.perf_counter() - started
    return 60 * count / seconds, sum(episode.steps for episode in episodes) / seconds


if __name__ == "__main__":
    run_command(main)
