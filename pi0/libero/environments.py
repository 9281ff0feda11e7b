"""`LIBEROEnvRunner`: LIBERO tasks of one rank, the task cursor, rollouts and evaluation."""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np

from pi0.base.errors import InputError
from pi0.base.progress import progress
from pi0.libero import gl
from pi0.libero.assets import resolve_assets
from pi0.libero.debug import DebugOutput
from pi0.libero.episodes import ACTION_DIM, STATE_DIM, Episode, Rollout
from pi0.libero.init_states import (
    InitStatePool,
    evaluation_pools,
    recorded_pools,
    training_pools,
    with_demonstrated,
)
from pi0.libero.rendering import CAMERAS
from pi0.libero.rollouts import Policy, RolloutPool
from pi0.libero.suites import Task, find_tasks
from pi0.libero.worker import Worker, WorkerSpec
from pi0.ranks import collectives
from pi0.training.interrupts import Interrupted, Interrupts

# First number of a rollout's noise key, so that training and evaluation never share noise.
TRAINING, EVALUATION = 0, 1
VALIDATION_SEED = 2**31 - 1  # of the validation states; training.seed is smaller
RECORDED_STATES = "evaluation: LIBERO's recorded states, from index 0"


# What `LIBEROEnvRunner.create_parallel_envs` gives: the pool, the task's index, how many environments at once.
ParallelEnvs = tuple[RolloutPool, int, int]


@dataclass(frozen=True)
class EvaluationResult:
    """Scored episodes.

    Attributes:
        episodes: in order of task and initial state.
        protocol: everything the score depends on besides the policy.
    """

    episodes: list[Episode]
    protocol: dict

    @property
    def outcomes(self) -> list[bool]:
        """Success of each episode; a broken simulation counts as failure."""
        return [episode.success for episode in self.episodes]

    @property
    def success_rate(self) -> float:
        """Share of successful episodes, 0 to 1."""
        return sum(self.outcomes) / len(self.outcomes)

    def to_dict(self) -> dict:
        """Outlines of the episodes and the protocol, for JSON; `LIBEROEnvRunner.restore_result` reads it."""
        outlines = [
            {
                "task": episode.rollout.task.index,
                "state": episode.rollout.init_index,
                "success": episode.success,
                "steps": episode.steps,
                "failure": episode.failure,
            }
            for episode in self.episodes
        ]
        return {"episodes": outlines, "protocol": self.protocol}

    def by_task(self) -> dict[str, list[bool]]:
        """Outcomes by task name."""
        tasks: dict[str, list[bool]] = {}
        for episode in self.episodes:
            tasks.setdefault(episode.rollout.task.name, []).append(episode.success)
        return tasks


class LIBEROEnvRunner:
    """Runs episodes of LIBERO tasks in parallel worker processes.

    Attributes:
        cameras: those of the policy's cameras that LIBERO has; episodes hold their images.
        image_size: pixels a side.
        tasks: all tasks of the run, which are scored.
        assigned_tasks: those that this rank practises; all of them unless the run is collectives.
        task_cursor: turns taken, counted in assigned tasks.
        current_task: the assigned task whose turn it is.
        interrupts: whether the run was asked to stop; nobody asks unless a script installs the handlers.
        created_envs: by task index, the environments that `create_parallel_envs` has opened and that are
            still open; at most `max_open_tasks`.

    Args:
        benchmark_name: suite, e.g. `libero_spatial`.
        task_names_to_use: names or indices; empty for every task of the suite.
        cameras: names of the policy's cameras, in its order; those that LIBERO has not, as the right wrist of
            published checkpoints, are left out, for the policy to mask.
        image_size: pixels a side.
        chunk: actions in one of the policy's chunks.
        replan_steps: actions of a chunk carried out before the policy looks again. openpi's LIBERO script
            takes 5 (examples/libero/main.py), LeRobot's pi0.5 for LIBERO 10 (docs/source/pi05.mdx:
            n_action_steps).
        num_parallel_envs: worker processes; None for one on each core there is.
        rollouts_per_env: rollouts a worker keeps going at once; the policy acts on them in one batch.
        max_episode_length: control steps an episode may take, None for the suite's usual horizon.
        settle_steps: control steps of standing still before an episode.
        fixtures: placement of fixtures in evaluation, a key of `pi0.libero.init_states.FIXTURE_MODES`.
        render: `exact` or `fast` (`pi0.libero.rendering`).
        assets: folder of LIBERO's assets, `standins`, or None to look for them.
        max_open_tasks: scenes a worker keeps in memory.
        demonstrations: folder of LIBERO's HDF5 files, at whose beginnings training states are taken first.
        held_out_states: recorded states of each task that scores alone use, the first ones; training states are the
            others. None: scores use all, and training states are drawn.
    """

    def __init__(
        self,
        benchmark_name: str,
        task_names_to_use: Sequence[str | int],
        *,
        cameras: Sequence[str],
        image_size: int,
        chunk: int,
        replan_steps: int,
        num_parallel_envs: int | None = None,
        rollouts_per_env: int = 4,
        max_episode_length: int | None = None,
        settle_steps: int = 10,
        fixtures: str = "libero_eval",
        render: str = "fast",
        assets: str | None = None,
        max_open_tasks: int = 10,
        demonstrations: str | None = None,
        held_out_states: int | None = None,
    ):
        self.cameras = tuple(name for name in cameras if name in CAMERAS)
        if not self.cameras:
            raise InputError(
                f"the policy looks through {', '.join(cameras) or 'no camera'}; LIBERO has {', '.join(CAMERAS)}"
            )
        if not 1 <= replan_steps <= chunk:
            raise InputError(
                f"replan_steps is {replan_steps}; the policy's chunks have {chunk} actions: 1 to {chunk}"
            )
        self.image_size = image_size
        self.benchmark_name = benchmark_name
        self.tasks: list[Task] = find_tasks(benchmark_name, list(task_names_to_use))
        self.assigned_tasks = self.tasks
        self.task_cursor = 0
        self.current_task: Task | None = None
        self.created_envs: OrderedDict[int, ParallelEnvs] = OrderedDict()
        self.interrupts = Interrupts()
        self.demonstrations = demonstrations
        self.held_out_states = held_out_states
        self.replan_steps = replan_steps
        self.max_episode_length = max_episode_length
        self.settle_steps = settle_steps
        self.fixtures = fixtures
        self.pool = RolloutPool(
            WorkerSpec(
                assets=resolve_assets(assets),
                cameras=self.cameras,
                image_size=image_size,
                render=render,
                slots=rollouts_per_env,
                chunk=chunk,
                max_open_tasks=max_open_tasks,
            ),
            workers=num_parallel_envs,
            check=lambda: self.interrupts.check(),
        )
        if collectives.rank_and_world_size()[0] == 0:
            geometry = self.pool.spec.assets
            print(f"LIBERO assets: {geometry.source} ({geometry.path}); frames by {gl.renderer()}")

    # Tasks ---------------------------------------------------------------------------------------

    def set_current_task_by_cursor(self) -> Task | None:
        """Make the task under the cursor the current one; None when no task is assigned."""
        tasks = self.assigned_tasks
        self.current_task = tasks[self.task_cursor % len(tasks)] if tasks else None
        return self.current_task

    def advance_task_cursor(self) -> None:
        """Move on to the next assigned task."""
        self.task_cursor += 1

    # Environments --------------------------------------------------------------------------------

    def create_parallel_envs(self, task_name: str | int) -> ParallelEnvs:
        """Open a task's scene in every worker, or find it open: (env, env_id, env_num).

        Rollouts open what they need by themselves; opened before, the first of them do not wait. Scenes stay
        open from step to step until `max_open_tasks` others have been used since, or `cleanup`.
        """
        (task,) = find_tasks(self.benchmark_name, [task_name])
        workers = len(self.pool.processes)
        if task.index not in self.created_envs:
            list(self.pool.call(_open_scene, [(task,)] * workers))  # one call each, since all are idle
        self._used(task)
        return self.created_envs[task.index]

    def _used(self, task: Task) -> None:
        """Keep account of which scenes are open, as the workers do: the one unused for longest goes first."""
        envs = self.pool, task.index, len(self.pool.processes) * self.pool.spec.slots
        self.created_envs[task.index] = envs
        self.created_envs.move_to_end(task.index)
        while len(self.created_envs) > self.pool.spec.max_open_tasks:
            self.created_envs.popitem(last=False)

    # Initial states ------------------------------------------------------------------------------

    def training_states(self, count: int, seed: int) -> list[InitStatePool]:
        """A pool of `count` training states for each assigned task, fewer where fewer are recorded.

        Where demonstrations began, then recorded states that are not held out, or, where all are, drawn ones.
        """
        if self.held_out_states is None:
            pools = training_pools(self.pool, self.assigned_tasks, count, seed)
        else:
            pools = recorded_pools(self.pool, self.assigned_tasks, self.fixtures, self.held_out_states, count)
        return with_demonstrated(self.pool, pools, self.demonstrations) if self.demonstrations else pools

    def validation_states(self, count: int) -> list[InitStatePool]:
        """A pool of `count` states for each task, drawn as training states are and never trained on."""
        return training_pools(self.pool, self.tasks, count, VALIDATION_SEED)

    def evaluation_states(self) -> list[InitStatePool]:
        """LIBERO's recorded states of each task; those that are held out, where some are for practice."""
        pools = evaluation_pools(self.pool, self.tasks, self.fixtures)
        if self.held_out_states is not None:
            for pool in pools:
                del pool.states[self.held_out_states :]
        return pools

    # Episodes ------------------------------------------------------------------------------------

    def rollout(
        self,
        states: InitStatePool,
        index: int,
        noise_key: Iterable[int],
        record: int = 0,
        max_steps: int | None = None,
    ) -> Rollout:
        """A rollout from one state of a pool, under this runner's protocol, or cut off after `max_steps`."""
        return Rollout(
            task=states.task,
            init=states.states[index],
            init_index=index,
            noise_key=tuple(noise_key),
            horizon=max_steps or self.max_episode_length or states.task.horizon,
            settle_steps=self.settle_steps,
            record=record,
        )

    def run_policy_in_env(
        self,
        policy: Policy,
        rollouts: Sequence[Rollout],
        created_env: ParallelEnvs | None = None,
        num_envs: int | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Run rollouts in parallel; yields (index into `rollouts`, episode) as they finish.

        They run in `created_env`, where given (`create_parallel_envs`), else in the runner's own pool, `num_envs`
        at once or as many as there are environments. Raises `Interrupted` when the run is asked to stop.
        With the environment variables of `pi0.libero.debug`, what happened is written besides.
        """
        debug = DebugOutput()
        prepared = [debug.prepare(rollout) for rollout in rollouts]
        pool = created_env[0] if created_env else self.pool
        for index, episode in pool.run(policy, prepared, self.replan_steps, num_envs):
            self._used(episode.rollout.task)
            debug.save(episode, policy)
            yield index, episode

    def run(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        record: int = 0,
        label: str = "evaluation",
        initial_states: list[InitStatePool] | None = None,
    ) -> EvaluationResult:
        """Score a policy on the evaluation states of all tasks, or on other `initial_states`.

        Two policies scored with the same `episodes` and `seed` meet the same states and the same noise. In a
        distributed run all ranks take part, each runs its share, and each gets the whole result.

        Args:
            episodes: number of episodes in all, dealt evenly over the tasks; at most 50 a task.
            seed: of the policy's noise.
            record: draw a video frame every this many control steps.
        Raises:
            InputError: more episodes than there are states.
        """
        # By one rank: others that waited for a stop elsewhere would wait for ever.
        pools = initial_states or collectives.on_rank_zero(self.evaluation_states)
        counts = [episodes // len(pools) + (index < episodes % len(pools)) for index in range(len(pools))]
        for states, count in zip(pools, counts, strict=True):
            if count > len(states):
                raise InputError(
                    f"{states.task.name} has {len(states)} evaluation states, {count} were asked for; ask for fewer"
                )
        rollouts = [
            self.rollout(states, index, (EVALUATION, seed, states.task.index, index), record)
            for states, count in zip(pools, counts, strict=True)
            for index in range(count)
        ]
        rank, world_size = collectives.rank_and_world_size()
        share = range(rank, len(rollouts), world_size)
        results: dict[int, Episode] = {}
        with progress(total=len(share), label=label, unit="episode") as bar, suppress(Interrupted):
            for index, episode in self.run_policy_in_env(policy, [rollouts[index] for index in share]):
                results[share[index]] = episode
                bar.update(1, f"{sum(e.success for e in results.values())} solved")
        self.interrupts.check_together(abandoned=len(results) < len(share))
        if world_size > 1:
            outlines = {index: episode.outline() for index, episode in results.items()}
            results = {
                index: episode for part in collectives.gather(outlines) for index, episode in part.items()
            }
        return EvaluationResult(
            [results[index] for index in range(len(rollouts))],
            self.protocol(episodes=episodes, seed=seed, init_states=_describe(pools[0])),
        )

    def restore_result(self, content: dict) -> EvaluationResult:
        """The evaluation of recorded states that `EvaluationResult.to_dict` outlined."""
        pools = {pool.task.index: pool for pool in collectives.on_rank_zero(self.evaluation_states)}
        seed = content["protocol"]["seed"]
        episodes = []
        for outline in content["episodes"]:
            task, state = outline["task"], outline["state"]
            rollout = self.rollout(pools[task], state, (EVALUATION, seed, task, state))
            episodes.append(
                Episode(
                    rollout,
                    images={},
                    states=np.zeros((0, STATE_DIM), np.float32),
                    actions=np.zeros((0, self.pool.spec.chunk, ACTION_DIM), np.float32),
                    executed=np.array([outline["steps"]]),
                    success=outline["success"],
                    failure=outline["failure"],
                )
            )
        return EvaluationResult(episodes, content["protocol"])

    def protocol(self, **extra: object) -> dict:
        """What a score depends on besides the policy."""
        spec = self.pool.spec
        return {
            "suite": self.benchmark_name,
            "tasks": [task.index for task in self.tasks],
            "init_states": RECORDED_STATES,
            "fixtures": self.fixtures,
            "horizon": self.max_episode_length or self.tasks[0].horizon,
            "settle_steps": self.settle_steps,
            "replan_steps": self.replan_steps,
            "image_size": spec.image_size,
            "cameras": list(spec.cameras),
            "render": spec.render,
            "gl": gl.renderer(),
            "assets": spec.assets.describe(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("mujoco", "robosuite", "hf-libero")
            },
            **extra,
        }

    def cleanup(self) -> None:
        """Close the environments and end the worker processes."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def _describe(states: InitStatePool) -> str:
    if states.kind == "evaluation":
        return RECORDED_STATES
    return f"validation: drawn from LIBERO's placement distribution with seed {VALIDATION_SEED}, from index 0"


def _open_scene(worker: Worker, task: Task) -> None:
    """Runs in a worker."""
    worker.open(task)
