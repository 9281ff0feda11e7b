"""Demonstrations recorded from scripted experts, with a little action noise and clean labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pi0.progress import progress
from pi0.ript.chunks import Chunks
from pi0.ript.env.experts import PickAndPlace
from pi0.ript.env.stepping import InitState
from pi0.ript.env.suites import Task

if TYPE_CHECKING:
    from pi0.ript.env.runner import LIBEROEnvRunner
    from pi0.ript.env.worker import Worker

NOISE_PERSISTENCE = 0.9  # correlation of the action noise from one control step to the next


def record_demonstrations(
    runner: LIBEROEnvRunner, per_task: int, seed: int, noise: float, frame_every: int
) -> tuple[Chunks, dict]:
    """Demonstrations of each assigned task on training states.

    Args:
        runner: its tasks, protocol and workers are used.
        per_task: demonstrations of each task, failed ones included (only successes are kept).
        seed: of training states and action noise.
        noise: standard deviation of the smooth noise added to the expert's translation (1 is 5 cm a step).
        frame_every: control steps from one kept observation to the next.
    Returns:
        The chunks, and a summary {task name: {attempts, successes, mean_steps}}.
    """
    pools = runner.training_states(per_task, seed)
    jobs = []
    for states in pools:
        horizon = runner.max_episode_length or states.task.horizon
        for index, init in enumerate(states.states):
            key = (seed, states.task.index, index)
            jobs.append((states.task, init, key, noise, frame_every, runner.settle_steps, horizon))
    results: dict[int, tuple | None] = {}
    with progress(total=len(jobs), label="demonstrations", unit="episode") as bar:
        for index, result in runner.pool.call(_demonstrate, jobs):
            results[index] = result
            bar.update(1, f"{sum(r is not None for r in results.values())} solved")
    parts, summary = [], {}
    for number, states in enumerate(pools):
        solved = [results[number * per_task + index] for index in range(per_task)]
        kept = [_chunks(states.task, *arrays) for arrays in solved if arrays is not None]
        steps = [len(part) * frame_every for part in kept]
        summary[states.task.name] = {
            "attempts": per_task,
            "successes": len(kept),
            "mean_steps": float(np.mean(steps)) if steps else 0.0,
        }
        parts += kept
    if not parts:
        raise RuntimeError(f"the scripted expert solved none of {len(jobs)} episodes: {summary}")
    return Chunks.cat(parts), summary


def _demonstrate(
    worker: Worker,
    task: Task,
    init: InitState,
    key: tuple[int, ...],
    noise: float,
    frame_every: int,
    settle_steps: int,
    horizon: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Runs in a worker: images [T, cameras, h, w, 3], states [T, 8], actions [T, C, 7], valid [T, C]; None if failed."""
    sim, renderer = worker.open(task)
    spec = worker.spec
    sim.reset(init, settle_steps)
    expert = PickAndPlace(sim)
    random = np.random.default_rng(key)
    drift = np.zeros(3)
    images, states, labels = [], [], []

    def look() -> None:
        frames = np.empty((len(spec.cameras), spec.image_size, spec.image_size, 3), np.uint8)
        for number, camera in enumerate(spec.cameras):
            renderer.render(sim.data, camera, frames[number])
        images.append(frames)
        states.append(sim.proprioception())

    look()
    for step in range(horizon):
        label = expert.action()
        labels.append(label)
        drift = NOISE_PERSISTENCE * drift + np.sqrt(1 - NOISE_PERSISTENCE**2) * random.standard_normal(3)
        action = label.copy()
        action[:3] = np.clip(action[:3] + noise * drift, -1, 1)
        wanted = (step + 1) % frame_every == 0
        if sim.step(action, look if wanted else None):
            break
    if not sim.success:
        return None
    chunk = spec.chunk
    count = min(len(images), -(-len(labels) // frame_every))
    actions = np.zeros((count, chunk, 7), np.float32)
    valid = np.zeros((count, chunk), bool)
    for number in range(count):
        following = labels[number * frame_every : number * frame_every + chunk]
        actions[number, : len(following)] = following
        valid[number, : len(following)] = True
    return np.array(images[:count]), np.array(states[:count]), actions, valid


def _chunks(
    task: Task, images: np.ndarray, states: np.ndarray, actions: np.ndarray, valid: np.ndarray
) -> Chunks:
    from pi0.ript.env.rendering import CAMERAS

    return Chunks(
        {camera: torch.from_numpy(images[:, number]) for number, camera in enumerate(CAMERAS)},
        torch.from_numpy(states),
        [task.prompt] * len(states),
        torch.from_numpy(actions),
        torch.from_numpy(valid),
    )
