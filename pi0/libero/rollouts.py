"""Rollout workers and the loop that keeps them all busy with one policy.

Each worker keeps several rollouts going; their observations make one batch of constant shape, so a
rollout's actions depend on its own observation and noise only, not on which others happened to be ready.
A finished rollout's slot is refilled at once. A worker that dies or hangs is replaced and its rollouts
are run again from their start, which gives the same result.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pi0.libero import gl
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.worker import Progress, SharedArrays, WorkerSpec

logger = logging.getLogger(__name__)

CHECK_S = 1.0  # longest time from one call of `RolloutPool.check` to the next
ATTEMPTS = 3  # times a rollout or a call is given to a worker before it counts as failed
FRUITLESS_LOSSES = 9  # of each worker in a run that finishes nothing: it is not the rollouts


class Policy(Protocol):
    """What the pool asks of a policy (`pi0.policy.acting.ActingPolicy`)."""

    # Whether looking is so expensive that rollouts which begin alike should look together.
    shares_first_look: bool

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """Noise for one observation, float32 [horizon, action dim], from `key` alone."""

    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray:
        """Action chunks float32 [B, C, 7] for uint8 images [B, h, w, 3] by camera and states [B, 8].

        Noise [S, B, C, A] asks for S chunks for each observation, [S, B, C, 7].
        """

    def prepared(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str]
    ) -> dict[str, np.ndarray]:
        """What the network is given for observations as `act` takes them, by name; `images/...` in [-1, 1]."""


def usable_cores() -> int:
    """Cores for this process's workers: those it may run on, less what other ranks of this machine use."""
    cores = len(os.sched_getaffinity(0))
    try:  # a container's share, in microseconds of CPU time and of wall time
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period))) if quota != "max" else cores
    except (OSError, ValueError):
        pass  # no such limit here
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Loss:
    """A worker that was replaced, why, and what it was doing (which was run again)."""

    worker: int
    cause: str
    work: tuple[str, ...]

    def __str__(self) -> str:
        return f"worker {self.worker} {self.cause} while it ran {', '.join(self.work) or 'nothing'}"


@dataclass
class Phases:
    """Where the time of running rollouts went, seconds of wall time.

    Time in which the trainer waits for its workers is counted as what they do meanwhile, on average over the
    workers; what is left of it, because some had nothing to do, is `wait`.
    """

    inference: float = 0.0
    physics: float = 0.0
    render: float = 0.0
    wait: float = 0.0

    def __add__(self, other: Phases) -> Phases:
        return Phases(
            self.inference + other.inference,
            self.physics + other.physics,
            self.render + other.render,
            self.wait + other.wait,
        )


class WorkerError(RuntimeError):
    """A worker process could not do what it was asked."""


class _Process:
    """A worker process, its socket and its shared memory."""

    def __init__(self, spec: WorkerSpec, number: int):
        self.number = number
        ours, theirs = socket.socketpair()
        memory = os.memfd_create(f"pi0-worker-{number}")
        os.ftruncate(memory, SharedArrays.nbytes(spec))
        self._memory = mmap.mmap(memory, SharedArrays.nbytes(spec))
        self.arrays = SharedArrays(spec, self._memory)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pi0.libero.worker", str(theirs.fileno()), str(memory)],
            pass_fds=[theirs.fileno(), memory],
            stdin=subprocess.DEVNULL,
            # One thread each, Mesa's software renderer included: the processes are the parallelism. A process
            # group each: Ctrl+C is for the trainer, which then closes the socket.
            env={
                "LP_NUM_THREADS": "0",
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": _pythonpath(),
            },
            process_group=0,
        )
        theirs.close()
        os.close(memory)
        self.connection = Connection(ours.detach())
        self.deadline = float("inf")
        self.connection.send(spec)

    def send(self, method: str, arguments: tuple, limit_s: float) -> None:
        self.deadline = time.monotonic() + limit_s
        try:
            self.connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            pass  # its end of the socket reads as closed, which is where a dead worker is noticed

    def receive(self) -> Any:
        """Its answer; raises EOFError or OSError where it ended before or within it."""
        self.deadline = float("inf")
        answer, error, trace = self.connection.recv()
        if error is not None:
            logger.error("worker %d:\n%s", self.number, trace)
            raise WorkerError(f"worker {self.number}: {error}")
        return answer

    def stop(self, timeout: float = 5.0) -> None:
        self.connection.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RolloutPool:
    """Worker processes that run rollouts.

    Args:
        spec: what each worker is made from.
        workers: number of processes; None for `usable_cores`.
        limit_s: seconds after which a worker that has not answered is taken for hung.
        check: called every second or sooner while workers are waited for; what it raises ends `run` or `call`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int | None = None,
        limit_s: float = 180.0,
        check: Callable[[], None] = lambda: None,
    ):
        gl.select_backend()
        self.spec = spec
        self.limit_s = limit_s
        self.check = check
        self.losses: list[Loss] = []
        self.phases = Phases()
        self._first_looks: dict[tuple, _FirstLook] = {}
        self._workers = [_Process(spec, number) for number in range(workers or usable_cores())]

    def run(
        self,
        policy: Policy,
        rollouts: Sequence[Rollout],
        replan_steps: int,
        num_envs: int | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Run rollouts, each as soon as a slot is free.

        Args:
            policy: acts on batches of exactly `spec.slots` observations.
            replan_steps: actions of a chunk carried out before the policy looks again.
            num_envs: rollouts that run at once, at most; None for all slots of all workers.
        Yields:
            (index into `rollouts`, finished episode), in order of completion.
        Raises:
            WorkerError: workers are lost time and again.
        """
        if num_envs is not None and num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least one environment is needed")
        if not 1 <= replan_steps <= self.spec.chunk:
            raise ValueError(
                f"replan_steps is {replan_steps}, the policy's chunks have 1 to {self.spec.chunk} actions"
            )
        self._first_looks = _first_looks(rollouts) if policy.shares_first_look else {}
        waiting = deque((index, _Recording(rollout)) for index, rollout in enumerate(rollouts))
        running: dict[int, dict[int, tuple[int, _Recording]]] = {
            worker.number: {} for worker in self._workers
        }
        attempts = [1] * len(rollouts)
        fruitless = 0  # losses since a rollout was finished
        workers = self._workers if num_envs is None else self._workers[:num_envs]
        # Few rollouts are dealt evenly, so that all workers have some.
        slots_used = min(self.spec.slots, -(-len(rollouts) // len(workers)))
        if num_envs is not None:
            slots_used = min(slots_used, num_envs // len(workers))
        self.phases, waited = Phases(), 0.0
        try:
            for worker in workers:
                self._refill(worker, running[worker.number], waiting, [], slots_used, replan_steps)
            while any(running.values()):
                self.check()
                started = time.perf_counter()
                for worker, answers in self._answers(running):
                    waited += time.perf_counter() - started
                    slots = running[worker.number]
                    if isinstance(answers, str):
                        rollouts_lost = tuple(str(recording.rollout) for _, recording in slots.values())
                        self.losses.append(Loss(worker.number, answers, rollouts_lost))
                        fruitless += 1
                        if fruitless > FRUITLESS_LOSSES * len(workers):
                            raise WorkerError(
                                f"{fruitless} losses without a finished rollout: {self.losses[-1]}"
                            )
                        logger.warning("%s; that runs again", self.losses[-1])
                        for index, recording in slots.values():
                            attempts[index] += 1
                            if attempts[index] <= ATTEMPTS:
                                waiting.appendleft((index, _Recording(recording.rollout)))
                            else:
                                yield (
                                    index,
                                    recording.episode(False, f"gave up after {ATTEMPTS} workers were lost"),
                                )
                        slots.clear()
                        worker = self._replace(worker)
                        self._refill(worker, slots, waiting, [], slots_used, replan_steps)
                        started = time.perf_counter()
                        continue
                    self.phases.render += sum(answer.render_s for answer in answers)
                    self.phases.physics += sum(answer.busy_s - answer.render_s for answer in answers)
                    fruitless = 0 if any(answer.done for answer in answers) else fruitless
                    yield from self._finish(answers, slots)
                    commands = self._act(policy, worker, slots, replan_steps)
                    self._refill(worker, slots, waiting, commands, slots_used, replan_steps)
                    started = time.perf_counter()
        finally:
            self._share_out(waited)
            # Abandoned half way (an interrupt, an error): what the workers still answer is of no use.
            for worker in self._workers:
                if running[worker.number]:
                    self._replace(worker)

    def call(
        self, function: Callable[..., Any], argument_lists: Sequence[tuple]
    ) -> Iterator[tuple[int, Any]]:
        """Run `function(worker, *arguments)` for each arguments, spread over the workers.

        Where a worker is lost, another one takes its place and its call.

        Yields:
            (index into `argument_lists`, result), in order of completion.
        Raises:
            WorkerError: the function raised, or workers were lost in it time and again.
        """
        waiting = deque(range(len(argument_lists)))
        attempts = [0] * len(argument_lists)
        busy: dict[int, int] = {}

        def start_next(worker: _Process) -> None:
            if waiting:
                index = busy[worker.number] = waiting.popleft()
                attempts[index] += 1
                worker.send("call", (function, *argument_lists[index]), 20 * self.limit_s)

        for worker in self._workers:
            start_next(worker)
        try:
            while busy:
                self.check()
                waited_for = [worker for worker in self._workers if worker.number in busy]
                ready = wait([worker.connection for worker in waited_for], CHECK_S)
                for worker in waited_for:
                    cause = None
                    if worker.connection in ready:
                        try:
                            result = worker.receive()
                        except (EOFError, OSError):
                            cause = f"ended ({_exit(worker.process)})"
                        except WorkerError:
                            del busy[worker.number]
                            raise
                    elif time.monotonic() >= worker.deadline:
                        cause = f"hung for {20 * self.limit_s:.0f} s"
                    else:
                        continue
                    index = busy.pop(worker.number)
                    if cause is None:
                        yield index, result
                    else:
                        self.losses.append(Loss(worker.number, cause, (function.__name__,)))
                        worker = self._replace(worker)
                        if attempts[index] == ATTEMPTS:
                            raise WorkerError(f"{self.losses[-1]}, {ATTEMPTS} times")
                        logger.warning("%s; that runs again", self.losses[-1])
                        waiting.appendleft(index)
                    start_next(worker)
        finally:
            for worker in self._workers:
                if worker.number in busy:  # lost, or what it still answers is of no use
                    self._replace(worker)

    def advance(self, commands: Sequence[list[tuple[int, Rollout | int]]]) -> list[list[Progress]]:
        """One round in lock-step, for callers that bring their own loop; actions are in `arrays` before, and
        observations after.

        Args:
            commands: for each worker its (slot, rollout to start or number of actions to carry out).
        Raises:
            WorkerError: a worker raised, ended or hung.
        """
        for worker, work in zip(self._workers, commands, strict=True):
            worker.send("advance", (work,), self.limit_s)
        answers = []
        for worker in self._workers:
            if not worker.connection.poll(max(0.0, worker.deadline - time.monotonic())):
                self._replace(worker)
                raise WorkerError(f"worker {worker.number} hung for {self.limit_s:.0f} s")
            try:
                answers.append(worker.receive())
            except (EOFError, OSError):
                self._replace(worker)
                raise WorkerError(f"worker {worker.number} ended ({_exit(worker.process)})") from None
        return answers

    @property
    def arrays(self) -> list[SharedArrays]:
        """Observations and actions of each worker's slots, shared with it."""
        return [worker.arrays for worker in self._workers]

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    # Internals -----------------------------------------------------------------------------------

    def _share_out(self, waited: float) -> None:
        """Attribute the trainer's waiting to what the workers did meanwhile (see `Phases`)."""
        busy = (self.phases.render + self.phases.physics) / len(self._workers)
        share = min(1.0, waited / busy) / len(self._workers) if busy else 0.0
        self.phases.render *= share
        self.phases.physics *= share
        self.phases.wait = max(0.0, waited - busy)

    def _answers(self, running: dict[int, dict]) -> Iterator[tuple[_Process, list[Progress] | str]]:
        """Whoever has answered, with the answer; for a worker that is lost, what became of it."""
        busy = [worker for worker in self._workers if running[worker.number]]
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        ready = wait([worker.connection for worker in busy], timeout=min(CHECK_S, max(0.0, patience)))
        for worker in busy:
            if worker.connection in ready:
                try:
                    answers = worker.receive()
                except (EOFError, OSError):
                    yield worker, f"ended ({_exit(worker.process)})"
                except WorkerError as error:  # of memory, OpenGL, MuJoCo: its simulations are of no use
                    yield worker, f"failed ({error})"
                except (pickle.UnpicklingError, ValueError, TypeError) as error:
                    yield worker, f"sent what cannot be read ({error})"
                else:
                    sound = _is_sound(answers, running[worker.number])
                    yield worker, answers if sound else f"sent something else than progress ({answers!r:.80})"
            elif time.monotonic() >= worker.deadline:
                yield worker, f"hung for {self.limit_s:.0f} s"

    def _finish(
        self, answers: list[Progress], slots: dict[int, tuple[int, _Recording]]
    ) -> Iterator[tuple[int, Episode]]:
        for progress in answers:
            index, recording = slots[progress.slot]
            if progress.executed:
                recording.executed.append(progress.executed)
            if progress.done:
                del slots[progress.slot]
                yield index, recording.episode(progress.success, progress.failure, progress.video)

    def _act(
        self, policy: Policy, worker: _Process, slots: dict[int, tuple[int, _Recording]], replan_steps: int
    ) -> list[tuple[int, Rollout | int]]:
        """Choose actions for every running slot of a worker, in one batch of constant shape."""
        if not slots:
            return []
        arrays = worker.arrays
        images = {camera: arrays.images[:, index] for index, camera in enumerate(self.spec.cameras)}
        started = time.perf_counter()
        for slot, (_, recording) in slots.items():
            look = self._first_look(recording)
            if look is not None and not look.chunks:
                seen = {camera: frames[slot] for camera, frames in images.items()}
                look.take(policy, seen, arrays.states[slot])
        noise, prompts = np.zeros(0), [""] * self.spec.slots
        for slot, (_, recording) in slots.items():
            drawn = policy.noise((*recording.rollout.noise_key, len(recording.actions)))
            noise = noise if noise.size else np.zeros((self.spec.slots, *drawn.shape), np.float32)
            noise[slot] = drawn
            prompts[slot] = recording.rollout.task.prompt
        if any(self._first_look(recording) is None for _, recording in slots.values()):
            arrays.actions[:] = policy.act(images, arrays.states, prompts, noise)[:, : self.spec.chunk]
        self.phases.inference += time.perf_counter() - started
        for slot, (_, recording) in slots.items():
            look = self._first_look(recording)
            if look is not None:
                arrays.actions[slot] = look.chunk(recording.rollout)[: self.spec.chunk]
            seen = {camera: frames[slot] for camera, frames in images.items()}
            recording.add(seen, arrays.states[slot], arrays.actions[slot])
        return [(slot, replan_steps) for slot in slots]

    def _first_look(self, recording: _Recording) -> _FirstLook | None:
        """What a rollout that has yet to act shares with others."""
        return None if recording.actions else self._first_looks.get(recording.rollout.beginning)

    def _refill(
        self,
        worker: _Process,
        slots: dict,
        waiting: deque,
        commands: list[tuple[int, Rollout | int]],
        slots_used: int,
        replan_steps: int,
    ) -> None:
        """Give the worker its next commands: go on with what runs, start what waits in the free slots."""
        for slot in range(slots_used):
            if slot not in slots and waiting:
                slots[slot] = waiting.popleft()
                recording = slots[slot][1]
                commands.append((slot, recording.rollout))
                look = self._first_look(recording)
                if look is not None and look.chunks:  # nothing to wait for
                    worker.arrays.actions[slot] = look.chunk(recording.rollout)[: self.spec.chunk]
                    recording.add(look.images, look.state, worker.arrays.actions[slot])
                    commands.append((slot, replan_steps))
        if commands:
            worker.send("advance", (commands,), self.limit_s)

    def _replace(self, worker: _Process) -> _Process:
        worker.process.kill()
        worker.stop()
        fresh = _Process(self.spec, worker.number)
        self._workers[worker.number] = fresh
        return fresh


class _FirstLook:
    """What several rollouts see before they part, and what each of them does then.

    Whichever is there first looks for all, with the noise of all: so who that is changes nothing.
    """

    def __init__(self, rollouts: list[Rollout]):
        self._rollouts = rollouts
        self.images: dict[str, np.ndarray] = {}
        self.state = np.zeros(0)
        self.chunks: dict[tuple[int, ...], np.ndarray] = {}

    def take(self, policy: Policy, images: dict[str, np.ndarray], state: np.ndarray) -> None:
        self.images, self.state = {camera: frame.copy() for camera, frame in images.items()}, state.copy()
        keys = [rollout.noise_key for rollout in self._rollouts]
        noise = np.stack([policy.noise((*key, 0)) for key in keys])[:, None]
        one = {camera: frame[None] for camera, frame in self.images.items()}
        chunks = policy.act(one, self.state[None], [self._rollouts[0].task.prompt], noise)[:, 0]
        self.chunks = dict(zip(keys, chunks, strict=True))

    def chunk(self, rollout: Rollout) -> np.ndarray:
        return self.chunks[rollout.noise_key]


def _first_looks(rollouts: Sequence[Rollout]) -> dict[tuple, _FirstLook]:
    """Of all rollouts that begin like another one, by their beginning."""
    alike: dict[tuple, list[Rollout]] = {}
    for rollout in rollouts:
        alike.setdefault(rollout.beginning, []).append(rollout)
    return {beginning: _FirstLook(group) for beginning, group in alike.items() if len(group) > 1}


class _Recording:
    """An episode while it runs."""

    def __init__(self, rollout: Rollout):
        self.rollout = rollout
        self.images: dict[str, list[np.ndarray]] = {}
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.executed: list[int] = []

    def add(self, images: dict[str, np.ndarray], state: np.ndarray, actions: np.ndarray) -> None:
        """Note an observation and the actions chosen for it."""
        for camera, frame in images.items():
            self.images.setdefault(camera, []).append(frame.copy())
        self.states.append(state.copy())
        self.actions.append(actions.copy())

    def episode(self, success: bool, failure: str | None, video: list[np.ndarray] | None = None) -> Episode:
        length = len(self.executed)
        return Episode(
            rollout=self.rollout,
            images={camera: np.array(frames[:length]) for camera, frames in self.images.items()},
            states=np.array(self.states[:length]),
            actions=np.array(self.actions[:length]),
            executed=np.array(self.executed, dtype=np.int64),
            success=success,
            failure=failure,
            video=video or [],
        )


def _is_sound(answers: Any, slots: dict[int, Any]) -> bool:
    """Whether an answer is about running slots and nothing else."""
    return isinstance(answers, list) and all(isinstance(a, Progress) and a.slot in slots for a in answers)


def _pythonpath() -> str:
    """Where this package is, first, so that a worker finds the same one whatever its directory."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def _exit(process: subprocess.Popen) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
