"""A rollout worker: a process with its own simulator, told what to do over a socket.

`python -m pi0.libero.worker FD_SOCKET FD_MEMORY`, started by `pi0.libero.rollouts` and by nobody else.
Observations and actions pass through shared memory, everything else through the socket. The worker ends
when the socket closes, so none outlives its trainer.
"""

from __future__ import annotations

import gc
import mmap
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pi0.libero.assets import Assets
from pi0.libero.episodes import ACTION_DIM, STATE_DIM, Rollout
from pi0.libero.libero_import import leave_out_wrappers
from pi0.libero.rendering import Renderer
from pi0.libero.stepping import Snapshot, TaskSim
from pi0.libero.suites import Task

VIDEO_SIZE = 256
VIDEO_CAMERA = "agentview"


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


class SharedArrays:
    """The arrays a worker shares with the trainer, laid out in one anonymous block of memory."""

    def __init__(self, spec: WorkerSpec, memory: Any):
        size = spec.image_size
        shapes = {
            "images": ((spec.slots, len(spec.cameras), size, size, 3), np.uint8),
            "states": ((spec.slots, STATE_DIM), np.float32),
            "actions": ((spec.slots, spec.chunk, ACTION_DIM), np.float32),
        }
        offset = 0
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, np.ndarray(shape, dtype, buffer=memory, offset=offset))
            offset += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray

    @staticmethod
    def nbytes(spec: WorkerSpec) -> int:
        """Size of the block, bytes."""
        pixels = spec.slots * len(spec.cameras) * spec.image_size**2 * 3
        return pixels + 4 * spec.slots * (STATE_DIM + spec.chunk * ACTION_DIM) + 3 * 64


@dataclass
class Progress:
    """What a worker says of a slot after working on it: the observation is in shared memory unless done.

    `render_s` of its `busy_s` seconds went into drawing frames, the others into physics.
    """

    slot: int
    executed: int
    done: bool
    success: bool
    failure: str | None = None
    video: list[np.ndarray] = field(default_factory=list)
    busy_s: float = 0.0
    render_s: float = 0.0


@dataclass
class _Start:
    """A rollout's first observation, and where the simulator goes on from it."""

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
    """Open scenes and running rollouts of one worker process."""

    def __init__(self, spec: WorkerSpec, arrays: SharedArrays):
        self.spec = spec
        self.arrays = arrays
        self._open: OrderedDict[Task, tuple[TaskSim, Renderer]] = OrderedDict()
        self._slots: dict[int, _Slot] = {}
        # The rollouts of a group begin alike: they settle once, and are drawn once.
        self._starts: OrderedDict[tuple, _Start] = OrderedDict()
        self._render_s = 0.0

    def open(self, task: Task) -> tuple[TaskSim, Renderer]:
        """The scene of a task, built on first use."""
        if task not in self._open:
            if len(self._open) >= self.spec.max_open_tasks:
                self._close_oldest()
                # LIBERO's objects refer to each other in circles, and Python, which does not see the hundred
                # megabytes of MuJoCo's behind them, would let dozens of closed scenes pile up.
                gc.collect()
            sim = TaskSim(task, self.spec.assets)
            self._open[task] = (
                sim,
                Renderer(sim.model, self.spec.render, max(self.spec.image_size, VIDEO_SIZE)),
            )
        self._open.move_to_end(task)
        return self._open[task]

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
            self.arrays.states[slot], self.arrays.images[slot] = begun.state, begun.images
            self._slots[slot] = _Slot(rollout, begun.snapshot)
        else:
            sim, renderer = self.open(rollout.task)
            sim.reset(rollout.init, rollout.settle_steps)
            self._observe(slot, sim, renderer)
            self._slots[slot] = _Slot(rollout, sim.snapshot())
            if rollout.record:
                self._film(self._slots[slot], sim, renderer)
            self._starts[key] = _Start(
                self._slots[slot].snapshot, self.arrays.states[slot].copy(), self.arrays.images[slot].copy()
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
        actions = np.array(self.arrays.actions[slot], dtype=np.float64)
        count = min(count, rollout.horizon - running.steps)
        done = False
        for index in range(count):
            last = index == count - 1

            def look(last: bool = last) -> None:
                if last:
                    self._observe(slot, sim, renderer)

            done = sim.step(actions[index], look)
            running.steps += 1
            if rollout.record and (running.steps % rollout.record == 0 or done):
                self._film(running, sim, renderer)
            if done:
                break
        executed = index + 1
        done = done or running.steps >= rollout.horizon
        if done:
            del self._slots[slot]
            return Progress(slot, executed, True, sim.success, video=running.video)
        running.snapshot = sim.snapshot()
        return Progress(slot, executed, False, False)

    def _observe(self, slot: int, sim: TaskSim, renderer: Renderer) -> None:
        self.arrays.states[slot] = sim.proprioception()
        started = time.perf_counter()
        for index, camera in enumerate(self.spec.cameras):
            renderer.render(sim.data, camera, self.arrays.images[slot, index])
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
            except (FloatingPointError, ValueError) as error:
                self._slots.pop(slot, None)
                progress.append(Progress(slot, 0, True, False, failure=f"{type(error).__name__}: {error}"))
            progress[-1].busy_s = time.perf_counter() - started
            progress[-1].render_s = self._render_s
        return progress

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(worker, *arguments)` here: drawing initial states, recording demonstrations."""
        return function(self, *arguments)


def serve(socket_fd: int, memory_fd: int) -> None:
    """Answer requests until the trainer closes the socket."""
    connection = Connection(socket_fd)
    spec: WorkerSpec = connection.recv()
    worker = Worker(spec, SharedArrays(spec, mmap.mmap(memory_fd, SharedArrays.nbytes(spec))))
    try:
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(worker, method)(*arguments)
            except Exception as error:  # noqa: BLE001 whatever it is, the trainer hears of it and decides
                connection.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))
            else:
                connection.send((answer, None, None))
    except (EOFError, ConnectionError):
        pass  # the trainer has ended, or wants no more
    finally:
        worker.close()


if __name__ == "__main__":
    leave_out_wrappers()
    # The module is also imported by its full name while unpickling; run that one, so that classes agree.
    from pi0.libero.worker import serve as serve_imported

    serve_imported(int(sys.argv[1]), int(sys.argv[2]))
