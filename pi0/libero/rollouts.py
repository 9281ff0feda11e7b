"""Rollouts in worker processes, and the loop that keeps all workers busy with one policy.

Each worker keeps several rollouts going; their observations make one batch of constant shape, so a
rollout's actions depend on its own observation and noise only, not on which others happened to be ready.
A finished rollout's slot is refilled at once. A worker that dies or hangs is replaced and its rollouts
are run again from their start, which gives the same result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pi0.data.demonstrations import Observation
from pi0.libero import gl
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.suites import Task
from pi0.libero.worker import Progress, WorkerSpec
from pi0.workers.pool import ATTEMPTS, Loss, WorkerPool
from pi0.workers.process import LostWorkersError, WorkerError, WorkerInputError

FRUITLESS_LOSSES = 9  # of each worker in a run that finishes nothing: it is not the rollouts
CALL_LIMIT = 20  # a call (drawing states, a demonstration) may take so many times as long as a chunk


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


class RolloutPool(WorkerPool):
    """Worker processes that run rollouts.

    Attributes:
        spec: what each worker is made from.
        phases: where the time of the latest `run` went.

    Args:
        workers: number of processes; None for one on each core there is.
        limit_s: seconds after which a worker that has not answered counts as hung.
        check: called every second or sooner while workers are waited for; what it raises ends `run` or `call`.
    """

    spec: WorkerSpec

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int | None = None,
        limit_s: float = 180.0,
        check: Callable[[], None] = lambda: None,
    ):
        gl.select_backend()
        self.phases = Phases()
        super().__init__(
            "pi0.libero.worker:in_own_process",
            spec,
            spec.arrays(),
            workers,
            streams=np.random.SeedSequence(0),
            limit_s=limit_s,
            check=check,
            environment={
                "LP_NUM_THREADS": "0"
            },  # Mesa's software renderer: the processes are the parallelism
        )

    def open_tasks(self) -> list[frozenset[Task]]:
        """Tasks whose scenes each worker had open when it answered last; a replaced worker has none."""
        return [tasks or frozenset() for tasks in self.reports]

    def call(
        self,
        function: str | Callable[..., Any],
        argument_lists: Sequence[tuple],
        limit_s: float | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `WorkerPool.call`, with a longer limit by default."""
        return super().call(function, argument_lists, limit_s or CALL_LIMIT * self.limit_s)

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
            LostWorkersError: workers are lost time and again.
            WorkerInputError: a worker met an error that a user can repair, such as a full disk.
        """
        if num_envs is not None and num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least one environment is needed")
        if not 1 <= replan_steps <= self.spec.chunk:
            raise ValueError(
                f"replan_steps is {replan_steps}, the policy's chunks have 1 to {self.spec.chunk} actions"
            )
        workers = len(self.arrays) if num_envs is None else min(num_envs, len(self.arrays))
        # A few rollouts are shared out evenly, so that all workers have some.
        slots = min(self.spec.slots, -(-len(rollouts) // workers))
        if num_envs is not None:
            slots = min(slots, num_envs // workers)
        self.phases, waited = Phases(), 0.0
        schedule = _Schedule(self, policy, rollouts, replan_steps, slots)
        fruitless = 0  # losses since a rollout was finished
        try:
            with self.answers() as answers:
                for number in range(workers):
                    schedule.send_next(number)
                started = time.perf_counter()
                for number, outcome in answers:
                    waited += time.perf_counter() - started
                    if isinstance(outcome, WorkerInputError):  # another worker would meet the same
                        raise outcome
                    if isinstance(
                        outcome, WorkerError
                    ):  # of memory, OpenGL, MuJoCo: its simulations are useless
                        outcome = self.lose(number, f"failed ({outcome})")
                    elif not isinstance(outcome, Loss) and not schedule.expects(number, outcome):
                        outcome = self.lose(number, f"sent something else than progress ({outcome!r:.80})")
                    if isinstance(outcome, Loss):
                        fruitless += 1
                        if fruitless > FRUITLESS_LOSSES * workers:
                            raise LostWorkersError(
                                f"{fruitless} losses without a finished rollout: {outcome}; look for what ends it, "
                                "such as too little memory"
                            )
                        yield from schedule.restart(number)
                    else:
                        self.phases.render += sum(progress.render_s for progress in outcome)
                        self.phases.physics += sum(
                            progress.busy_s - progress.render_s for progress in outcome
                        )
                        fruitless = 0 if any(progress.done for progress in outcome) else fruitless
                        yield from schedule.finish(number, outcome)
                    schedule.send_next(number)
                    started = time.perf_counter()
        finally:
            self._share_out(waited)

    def advance(self, commands: Sequence[list[tuple[int, Rollout | int]]]) -> list[list[Progress]]:
        """One round in lock-step, for callers that bring their own loop; actions are in `arrays` before, and
        observations after.

        Args:
            commands: for each worker its (slot, rollout to start or number of actions to carry out).
        Raises:
            WorkerError: a worker raised, ended or hung.
        """
        progress: dict[int, list[Progress]] = {}
        with self.answers() as answers:
            for number, work in zip(range(len(self.arrays)), commands, strict=True):
                self.send(number, "advance", (work,))
            for number, outcome in answers:
                if isinstance(outcome, WorkerError):
                    raise outcome
                if isinstance(outcome, Loss):
                    raise WorkerError(f"worker {number} {outcome.cause}")
                progress[number] = outcome
        return [progress[number] for number in range(len(commands))]

    def _share_out(self, waited: float) -> None:
        """Attribute the trainer's waiting to what the workers did meanwhile (see `Phases`)."""
        busy = (self.phases.render + self.phases.physics) / len(self.arrays)
        share = min(1.0, waited / busy) / len(self.arrays) if busy else 0.0
        self.phases.render *= share
        self.phases.physics *= share
        self.phases.wait = max(0.0, waited - busy)


class _Schedule:
    """The rollouts of one `RolloutPool.run`: which of them wait, and which each worker has in which slot."""

    def __init__(
        self, pool: RolloutPool, policy: Policy, rollouts: Sequence[Rollout], replan_steps: int, slots: int
    ):
        self._pool = pool
        self._policy = policy
        self._replan_steps = replan_steps
        self._slots = slots
        self._first_looks = _first_looks(rollouts) if policy.shares_first_look else {}
        self._waiting = deque(_Recording(index, rollout) for index, rollout in enumerate(rollouts))
        self._running: list[dict[int, _Recording]] = [{} for _ in pool.arrays]

    def expects(self, number: int, answer: Any) -> bool:
        """Whether an answer is about running slots and nothing else."""
        running = self._running[number]
        return isinstance(answer, list) and all(isinstance(a, Progress) and a.slot in running for a in answer)

    def finish(self, number: int, answer: list[Progress]) -> Iterator[tuple[int, Episode]]:
        """Note what a worker has done; episodes that are complete."""
        running = self._running[number]
        for progress in answer:
            recording = running[progress.slot]
            if progress.executed:
                recording.executed.append(progress.executed)
                recording.between.append(progress.between)
            if progress.done:
                del running[progress.slot]
                keep = recording.rollout.keep_last and progress.failure is None
                last = self._seen(number, progress.slot) if keep else None
                yield recording.index, recording.episode(progress, last)

    def restart(self, number: int) -> Iterator[tuple[int, Episode]]:
        """What a lost worker had waits again; episodes that are given up, since it has happened too often."""
        running, self._running[number] = self._running[number], {}
        for slot, recording in running.items():
            if recording.attempt < ATTEMPTS:
                self._waiting.appendleft(
                    _Recording(recording.index, recording.rollout, recording.attempt + 1)
                )
            else:
                failure = f"gave up after {ATTEMPTS} workers were lost"
                given_up = Progress(slot, executed=0, done=True, success=False, failure=failure)
                yield recording.index, recording.episode(given_up)

    def send_next(self, number: int) -> None:
        """Send a worker the actions of what runs there, and what is to start in its free slots."""
        commands = [*self._act(number), *self._start(number)]
        if commands:
            work = tuple(str(recording.rollout) for recording in self._running[number].values())
            self._pool.send(number, "advance", (commands,), work=work)

    def _act(self, number: int) -> list[tuple[int, Rollout | int]]:
        """Choose actions for every running slot of a worker, in one batch of constant shape."""
        running, policy, spec = self._running[number], self._policy, self._pool.spec
        if not running:
            return []
        arrays = self._pool.arrays[number]
        seen = {slot: self._seen(number, slot) for slot in running}
        started = time.perf_counter()
        for slot, recording in running.items():
            look = self._first_look(recording)
            if look is not None and not look.chunks:
                look.take(policy, seen[slot])
        noise, prompts = np.zeros(0), [""] * spec.slots
        for slot, recording in running.items():
            drawn = policy.noise((*recording.rollout.noise_key, len(recording.actions)))
            noise = noise if noise.size else np.zeros((spec.slots, *drawn.shape), np.float32)
            noise[slot] = drawn
            prompts[slot] = recording.rollout.task.prompt
        if any(self._first_look(recording) is None for recording in running.values()):
            images = {camera: arrays["images"][:, index] for index, camera in enumerate(spec.cameras)}
            arrays["actions"][:] = policy.act(images, arrays["states"], prompts, noise)[:, : spec.chunk]
        self._pool.phases.inference += time.perf_counter() - started
        for slot, recording in running.items():
            look = self._first_look(recording)
            if look is not None:
                arrays["actions"][slot] = look.chunk(recording.rollout)[: spec.chunk]
            recording.add(seen[slot], arrays["actions"][slot])
        return [(slot, self._replan_steps) for slot in running]

    def _start(self, number: int) -> Iterator[tuple[int, Rollout | int]]:
        """Fill the free slots of a worker with what waits."""
        running, actions = self._running[number], self._pool.arrays[number]["actions"]
        for slot in range(self._slots):
            if slot not in running and self._waiting:
                recording = running[slot] = self._waiting.popleft()
                yield slot, recording.rollout
                look = self._first_look(recording)
                if look is not None and look.chunks:  # nothing to wait for
                    actions[slot] = look.chunk(recording.rollout)[: self._pool.spec.chunk]
                    recording.add(look.seen, actions[slot])
                    yield slot, self._replan_steps

    def _seen(self, number: int, slot: int) -> Observation:
        arrays, cameras = self._pool.arrays[number], self._pool.spec.cameras
        images = {camera: arrays["images"][slot, index].copy() for index, camera in enumerate(cameras)}
        return Observation(images, arrays["states"][slot].copy())

    def _first_look(self, recording: _Recording) -> _FirstLook | None:
        """What a rollout that has yet to act shares with others."""
        return None if recording.actions else self._first_looks.get(recording.rollout.beginning)


class _FirstLook:
    """What several rollouts see before they part, and what each of them does then.

    Whichever is there first looks for all, with the noise of all: so who that is changes nothing.
    """

    def __init__(self, rollouts: list[Rollout]):
        self._rollouts = rollouts
        self.seen = Observation({}, np.zeros(0))
        self.chunks: dict[tuple[int, ...], np.ndarray] = {}

    def take(self, policy: Policy, seen: Observation) -> None:
        self.seen = seen
        keys = [rollout.noise_key for rollout in self._rollouts]
        noise = np.stack([policy.noise((*key, 0)) for key in keys])[:, None]
        one = {camera: frame[None] for camera, frame in seen.images.items()}
        chunks = policy.act(one, seen.state[None], [self._rollouts[0].task.prompt], noise)[:, 0]
        self.chunks = dict(zip(keys, chunks, strict=True))

    def chunk(self, rollout: Rollout) -> np.ndarray:
        return self.chunks[rollout.noise_key]


def _first_looks(rollouts: Sequence[Rollout]) -> dict[tuple, _FirstLook]:
    """For all rollouts that begin like another one, by their beginning."""
    alike: dict[tuple, list[Rollout]] = {}
    for rollout in rollouts:
        alike.setdefault(rollout.beginning, []).append(rollout)
    return {beginning: _FirstLook(group) for beginning, group in alike.items() if len(group) > 1}


class _Recording:
    """An episode while it runs: `rollouts[index]` of a run, for the `attempt`-th time."""

    def __init__(self, index: int, rollout: Rollout, attempt: int = 1):
        self.index = index
        self.rollout = rollout
        self.attempt = attempt
        self.seen: list[Observation] = []
        self.actions: list[np.ndarray] = []
        self.executed: list[int] = []
        self.between: list[list[Observation]] = []  # what was seen within each chunk, after its first look

    def add(self, seen: Observation, actions: np.ndarray) -> None:
        """Note an observation and the actions chosen for it."""
        self.seen.append(seen)
        self.actions.append(actions.copy())

    def episode(self, end: Progress, last: Observation | None = None) -> Episode:
        """The finished episode: what was noted, how it ended, and what was seen after its last action."""
        length = len(self.executed)
        seen = self.seen[:length]
        cameras = self.seen[0].images if self.seen else ()
        return Episode(
            rollout=self.rollout,
            images={camera: np.array([each.images[camera] for each in seen]) for camera in cameras},
            states=np.array([each.state for each in seen]),
            actions=np.array(self.actions[:length]),
            executed=np.array(self.executed, dtype=np.int64),
            success=end.success,
            failure=end.failure,
            conditions=end.conditions,
            video=end.video,
            last=last,
            every=[each for look, later in zip(seen, self.between, strict=True) for each in (look, *later)]
            if self.rollout.keep_every
            else [],
        )
