"""Records demonstrations of scripted experts, with a little action noise and clean labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pi0.base.errors import InputError
from pi0.base.progress import progress
from pi0.data import Demonstration
from pi0.data.chunks import Chunks
from pi0.libero.evaluation import refuse_broken
from pi0.libero.experts import Expert
from pi0.libero.stepping import BROKEN, InitState
from pi0.libero.suites import Task

if TYPE_CHECKING:
    from pi0.data.lerobot_writer import LeRobotWriter
    from pi0.libero.environments import Environments
    from pi0.libero.worker import Worker

NOISE_PERSISTENCE = 0.9  # correlation of the action noise from one control step to the next


def record_demonstrations(
    environments: Environments,
    per_task: int,
    seed: int,
    noise: float,
    frame_every: int,
    writer: LeRobotWriter | None = None,
) -> tuple[Chunks, dict]:
    """Record demonstrations of each task from training states.

    Args:
        environments: its tasks, protocol and workers are used.
        per_task: attempts for each task (only successes are kept).
        seed: seed of training states and action noise.
        noise: standard deviation of the smooth noise added to the expert's translation (1 is 5 cm a step).
        frame_every: control steps from one kept observation to the next.
        writer: also gets the demonstrations, with the images of every control step; the chunks are the same.
    Returns:
        The chunks, and a summary {task name: {attempts, successes, mean_steps}}.
    Raises:
        InputError: no attempt succeeded, or there is no expert for a task.
        BrokenSimulationsError: more than a tenth of the attempts broke; fewer count as failed.
    """
    pools = environments.training_states(per_task, seed)
    look_every = 1 if writer else frame_every
    jobs = []
    for states in pools:
        horizon = environments.max_episode_length or states.task.horizon
        for index, init in enumerate(states.states):
            key = (seed, states.task.index, index)
            jobs.append((states.task, init, key, noise, look_every, environments.settle_steps, horizon))
    chunks: list[Chunks | None] = []
    early: dict[int, Demonstration | None] = {}  # episodes that ended before an earlier one
    broken: list[str] = []
    with progress(total=len(jobs), label="demonstrations", unit="episode") as bar:
        for index, result in environments.pool.call(_attempt, jobs):
            if isinstance(result, str):
                broken.append(result)
                result = None
            early[index] = result
            while len(chunks) in early:
                demonstration = early.pop(len(chunks))
                if demonstration is None:
                    chunks.append(None)
                    continue
                if writer:
                    writer.add(demonstration)
                chunks.append(
                    Chunks.of_demonstration(demonstration.thinned(frame_every), environments.pool.spec.chunk)
                )
            solved = sum(part is not None for part in (*chunks, *early.values()))
            bar.update(1, f"{solved} solved")
    refuse_broken("demonstrations", broken, len(jobs))
    parts, summary = [], {}
    for number, states in enumerate(pools):
        solved_parts = [
            part for part in chunks[number * per_task : (number + 1) * per_task] if part is not None
        ]
        steps = [len(part) * frame_every for part in solved_parts]
        summary[states.task.name] = {
            "attempts": per_task,
            "successes": len(solved_parts),
            "mean_steps": float(np.mean(steps)) if steps else 0.0,
        }
        parts += solved_parts
    if not parts:
        raise InputError(
            f"the scripted experts solved none of {len(jobs)} episodes of {', '.join(summary)}; less --action-noise may "
            "help, or demonstrations from files (--dataset)"
        )
    return Chunks.cat(parts), summary


def _attempt(worker: Worker, task: Task, *how: Any) -> Demonstration | str | None:
    """Runs in a worker: `_demonstrate`, or what broke if the simulation did."""
    try:
        return _demonstrate(worker, task, *how)
    except InputError:  # no expert knows the task
        raise
    except BROKEN as error:
        return f"{type(error).__name__}: {error}"


def _demonstrate(
    worker: Worker,
    task: Task,
    init: InitState,
    key: tuple[int, ...],
    noise: float,
    look_every: int,
    settle_steps: int,
    horizon: int,
) -> Demonstration | None:
    """The expert's observations (images every `look_every` steps), its labels, and executed actions; None if it failed."""
    sim, renderer = worker.open(task)
    spec = worker.spec
    sim.reset(init, settle_steps)
    expert = Expert(sim)
    random = np.random.default_rng(key)
    drift = np.zeros(3)
    images: list[np.ndarray] = []
    states: list[np.ndarray] = []
    labels, executed = [], []

    def look() -> None:
        if len(states) % look_every == 0:
            frames = np.empty((len(spec.cameras), spec.image_size, spec.image_size, 3), np.uint8)
            for number, camera in enumerate(spec.cameras):
                renderer.render(sim.data, camera, frames[number])
            images.append(frames)
        states.append(sim.proprioception())

    look()
    for _ in range(horizon):
        label = expert.action()
        labels.append(label)
        drift = NOISE_PERSISTENCE * drift + np.sqrt(1 - NOISE_PERSISTENCE**2) * random.standard_normal(3)
        action = label.copy()
        action[:3] = np.clip(action[:3] + noise * drift, -1, 1)
        executed.append(action)
        if sim.step(action, look):
            break
    if not sim.success:
        return None
    length = len(labels)
    image_steps = np.arange(0, length, look_every)
    last = np.arange(length) == length - 1
    return Demonstration(
        prompt=task.prompt,
        states=np.array(states[:length]),
        actions=np.array(labels, np.float32),
        image_steps=image_steps,
        images={
            camera: np.array([frames[number] for frames in images[: len(image_steps)]])
            for number, camera in enumerate(spec.cameras)
        },
        executed=np.array(executed, np.float32),
        rewards=last.astype(np.float32),
        dones=last,
    )
