"""What a rollout worker does: it holds scenes and runs the rollouts of its slots, a chunk of actions at a time.

`pi0.libero.rollouts` runs it in processes of its own (`pi0.workers`); observations and actions pass through shared
arrays, everything else through the answers of its methods.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pi0.data.demonstrations import Observation
from pi0.libero.assets import Assets
from pi0.libero.changes import AGENT_CAMERA
from pi0.libero.corruptions import corrupted_view
from pi0.libero.episodes import ACTION_DIM, STATE_DIM, Rollout
from pi0.libero.libero_import import leave_out_wrappers
from pi0.libero.rendering import CAMERAS, Renderer
from pi0.libero.stepping import BROKEN, Snapshot, TaskSim
from pi0.libero.suites import Task
from pi0.workers.arrays import ArrayTable

VIDEO_SIZE = 256
VIDEO_CAMERA = AGENT_CAMERA


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker of a pool is made from.

    Attributes:
        slots: rollouts a worker keeps going at once; their observations make one batch for the policy.
        chunk: the most actions sent at once.
        max_open_tasks: scenes kept in memory; the one unused for longest is closed first.
    """

    assets: Assets
    cameras: tuple[str, ...]
    image_size: int
    render: str
    slots: int
    chunk: int
    max_open_tasks: int

    def arrays(self) -> ArrayTable:
        """What a worker shares with the trainer: observations and actions of its slots."""
        size = self.image_size
        return {
            "images": ((self.slots, len(self.cameras), size, size, 3), np.uint8),
            "states": ((self.slots, STATE_DIM), np.float32),
            "actions": ((self.slots, self.chunk, ACTION_DIM), np.float32),
        }


@dataclass
class Progress:
    """What a worker says of a slot after working on it. The observation is in the shared arrays, unless the rollout
    is done and did not ask for its last one.

    `between` are the observations before each of the executed actions but the first, for `Rollout.keep_every`.
    `conditions` are those of the goal, and whether they hold, once the rollout is done (`TaskSim.conditions`).
    `render_s` of its `busy_s` seconds went into drawing frames, the others into physics.
    """

    slot: int
    executed: int
    done: bool
    success: bool
    failure: str | None = None
    conditions: dict[str, bool] = field(default_factory=dict)
    video: list[np.ndarray] = field(default_factory=list)
    between: list[Observation] = field(default_factory=list)
    busy_s: float = 0.0
    render_s: float = 0.0


@dataclass
class _Start:
    """A rollout's first observation, and where the simulator continues from it."""

    snapshot: Snapshot
    state: np.ndarray
    images: np.ndarray


@dataclass
class _Slot:
    rollout: Rollout
    snapshot: Snapshot
    steps: int = 0
    video: list[np.ndarray] = field(default_factory=list)


class Worker:
    """Open scenes and running rollouts.

    Attributes:
        spec: what it was made from.
        arrays: `spec.arrays()`, shared with the trainer.
        random: a stream that no other worker of its pool draws from. Rollouts do not: their noise comes from their keys.
    """

    def __init__(self, spec: WorkerSpec, arrays: dict[str, np.ndarray], random: np.random.Generator):
        self.spec = spec
        self.arrays = arrays
        self.random = random
        self._open: OrderedDict[Task, tuple[TaskSim, Renderer]] = OrderedDict()
        self._slots: dict[int, _Slot] = {}
        # The rollouts of a group begin alike: they settle once, and are drawn once.
        self._starts: OrderedDict[tuple, _Start] = OrderedDict()
        self._render_s = 0.0

    def open(self, task: Task) -> tuple[TaskSim, Renderer]:
        """The scene of a task, built on first use, with the changes of a variant."""
        scene = task.scene
        if scene not in self._open:
            if len(self._open) >= self.spec.max_open_tasks:
                self._close_oldest()
                # LIBERO's objects refer to each other in circles, and Python, which does not see the hundred
                # megabytes of MuJoCo's behind them, would let dozens of closed scenes pile up.
                gc.collect()
            sim = TaskSim(scene, self.spec.assets)
            self._open[scene] = (
                sim,
                Renderer(sim.model, self.spec.render, max(self.spec.image_size, VIDEO_SIZE)),
            )
        self._open.move_to_end(scene)
        self._open[scene][0].change_to(task.change)
        return self._open[scene]

    def report(self) -> frozenset[Task]:
        """Tasks whose scenes are open; one for all variants in a scene."""
        return frozenset(self._open)

    def close(self) -> None:
        """Close every open scene."""
        while self._open:
            self._close_oldest()

    def _close_oldest(self) -> None:
        _, (_, renderer) = self._open.popitem(last=False)
        renderer.close()

    def start(self, slot: int, rollout: Rollout) -> Progress:
        """Begin a rollout in a slot and show the policy its first observation."""
        key = rollout.beginning
        if key in self._starts and not rollout.record:  # a film needs the simulator there
            begun = self._starts[key]
            self.arrays["states"][slot], self.arrays["images"][slot] = begun.state, begun.images
            self._slots[slot] = _Slot(rollout, begun.snapshot)
        else:
            sim, renderer = self.open(rollout.task)
            sim.reset(rollout.init, rollout.settle_steps)
            self._observe(slot, sim, renderer, rollout, 0)
            self._slots[slot] = _Slot(rollout, sim.snapshot())
            if rollout.record:
                self._film(self._slots[slot], sim, renderer)
            self._starts[key] = _Start(
                self._slots[slot].snapshot,
                self.arrays["states"][slot].copy(),
                self.arrays["images"][slot].copy(),
            )
        self._starts.move_to_end(key)
        while len(self._starts) > self.spec.slots:
            self._starts.popitem(last=False)
        return Progress(slot, executed=0, done=False, success=False)

    def act(self, slot: int, count: int) -> Progress:
        """Carry out up to `count` actions of the slot's chunk; stop at success or horizon."""
        running = self._slots[slot]
        rollout = running.rollout
        sim, renderer = self.open(rollout.task)
        sim.restore(running.snapshot)
        actions = np.array(self.arrays["actions"][slot], dtype=np.float64)
        count = min(count, rollout.horizon - running.steps)
        # Nobody looks at the horizon, unless asked to.
        observed = count if rollout.keep_last or running.steps + count < rollout.horizon else 0
        between: list[Observation] = []

        def look() -> None:
            self._observe(slot, sim, renderer, rollout, began + executed)

        began = running.steps
        for executed in range(1, count + 1):
            if rollout.keep_every and executed > 1:
                between.append(self._seen(slot))
            looked = rollout.keep_every or executed == observed
            succeeded = sim.step(actions[executed - 1], look if looked else None)
            running.steps += 1
            if rollout.record and (running.steps % rollout.record == 0 or succeeded):
                self._film(running, sim, renderer)
            if succeeded:
                break
        if not succeeded and running.steps < rollout.horizon:
            running.snapshot = sim.snapshot()
            return Progress(slot, executed, False, False, between=between)
        if rollout.keep_last and not looked:
            # Only now is it known that this step was the last, and it is measured before its end: step there again.
            sim.restore(running.snapshot)
            for action in actions[: executed - 1]:
                sim.step(action)
            sim.step(actions[executed - 1], look)
        del self._slots[slot]
        return Progress(
            slot,
            executed,
            True,
            sim.success,
            conditions=sim.conditions(),
            video=running.video,
            between=between,
        )

    def _seen(self, slot: int) -> Observation:
        images, cameras = self.arrays["images"][slot], self.spec.cameras
        return Observation(
            {camera: images[index].copy() for index, camera in enumerate(cameras)},
            self.arrays["states"][slot].copy(),
        )

    def _observe(self, slot: int, sim: TaskSim, renderer: Renderer, rollout: Rollout, moment: int) -> None:
        """Put what is seen after `moment` control steps into a slot's arrays."""
        self.arrays["states"][slot] = sim.proprioception()
        started = time.perf_counter()
        change = rollout.task.change
        for index, camera in enumerate(self.spec.cameras):
            image = self.arrays["images"][slot, index]
            if change is not None and change.noise and CAMERAS[camera] == AGENT_CAMERA:
                name = f"{rollout.task.name} {rollout.init.name} {moment}"
                draw = partial(renderer.render, sim.data, camera)
                image[:] = corrupted_view(draw, change.noise, name, self.spec.image_size)
            else:
                renderer.render(sim.data, camera, image)
        self._render_s += time.perf_counter() - started

    def _film(self, running: _Slot, sim: TaskSim, renderer: Renderer) -> None:
        frame = np.empty((VIDEO_SIZE, VIDEO_SIZE, 3), np.uint8)
        started = time.perf_counter()
        renderer.render(sim.data, VIDEO_CAMERA, frame)
        self._render_s += time.perf_counter() - started
        running.video.append(frame)

    def advance(self, commands: list[tuple[int, Rollout | int]]) -> list[Progress]:
        """Work on several slots: a rollout to start, or the number of actions to carry out.

        A simulation that breaks ends its own rollout with a `failure` and leaves the others alone.
        """
        progress = []
        for slot, command in commands:
            started, self._render_s = time.perf_counter(), 0.0
            try:
                if isinstance(command, Rollout):
                    answer = self.start(slot, command)
                elif slot in self._slots:
                    answer = self.act(slot, command)
                else:
                    continue  # what was to be started before it has failed
                progress.append(answer)
            except BROKEN as error:
                self._slots.pop(slot, None)
                progress.append(Progress(slot, 0, True, False, failure=f"{type(error).__name__}: {error}"))
            progress[-1].busy_s = time.perf_counter() - started
            progress[-1].render_s = self._render_s
        return progress


def in_own_process(spec: WorkerSpec, arrays: dict[str, np.ndarray], random: np.random.Generator) -> Worker:
    """A worker for a process that does nothing else."""
    leave_out_wrappers()
    return Worker(spec, arrays, random)
