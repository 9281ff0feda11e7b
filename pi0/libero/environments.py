"""`Environments`: tasks of a LIBERO suite, their initial states, and the workers that run their episodes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

from pi0.base.errors import CheckpointError, InputError
from pi0.libero import gl
from pi0.libero.assets import resolve_assets
from pi0.libero.debug import DebugOutput
from pi0.libero.episodes import ROBOT, Episode, Rollout
from pi0.libero.init_states import (
    EVALUATION_SEED,
    VALIDATION_SEED,
    InitStatePool,
    evaluation_pools,
    recorded_pools,
    training_pools,
    with_demonstrated,
)
from pi0.libero.rendering import CAMERAS
from pi0.libero.rollouts import Policy, RolloutPool
from pi0.libero.settings import TaskConfig, is_folder
from pi0.libero.suites import Task, find_tasks, package_of
from pi0.libero.worker import WorkerSpec
from pi0.ranks import collectives
from pi0.training.interrupts import Interrupts

# First number of a rollout's noise key, so that training and evaluation never share noise.
TRAINING, EVALUATION = 0, 1
# Descriptions of the initial states in the protocol of a score.
EVALUATION_STATES = "evaluation: LIBERO's recorded states, from index 0"
DRAWN_EVALUATION_STATES = (
    f"evaluation: drawn from LIBERO's placement distribution with seed {EVALUATION_SEED}, from index 0"
)
VALIDATION_STATES = (
    f"validation: drawn from LIBERO's placement distribution with seed {VALIDATION_SEED}, from index 0"
)


class PolicySpec(Protocol):
    """What environments must know about a policy (`pi0.model.config.Pi0Config`)."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the policy's cameras, in its order."""

    @property
    def image_size(self) -> int:
        """Width and height of the policy's images, pixels."""

    @property
    def action_horizon(self) -> int:
        """Actions in one of its chunks."""

    @property
    def robot_state_dim(self) -> int:
        """Features of its robot's state."""

    @property
    def robot_action_dim(self) -> int:
        """Features of its robot's actions."""

    @property
    def source(self) -> str:
        """What errors call it: the file it comes from."""


def refuse_other_robots(policy: PolicySpec) -> None:
    """Raise `CheckpointError` for a policy whose state and actions are not as wide as those of LIBERO's robot."""
    widths = policy.robot_state_dim, policy.robot_action_dim
    if widths != (ROBOT.state_dim, ROBOT.action_dim):
        raise CheckpointError(
            f"{policy.source}: this policy is of another robot, whose state has {widths[0]} features and whose actions "
            f"have {widths[1]}; LIBERO's have {ROBOT.state_dim} and {ROBOT.action_dim}. Take a policy that was trained "
            "on LIBERO"
        )


class Environments:
    """Tasks of a suite, their initial states, and worker processes that run their episodes.

    Attributes:
        benchmark_name: the suite.
        tasks: all tasks of the run, which are evaluated.
        cameras: the policy's cameras that LIBERO has; episodes hold their images.
        image_size: pixels a side.
        pool: the worker processes.
        interrupts: requests to stop.
        replan_steps: actions of a chunk executed before the policy observes again. openpi's LIBERO script
            uses 5 (examples/libero/main.py), LeRobot's pi0.5 for LIBERO 10 (docs/source/pi05.mdx:
            n_action_steps).
        max_episode_length: control steps that an episode may take; None for the suite's usual horizon.
        settle_steps: control steps of standing still before an episode.
        fixtures: placement of fixtures in evaluation, a key of `pi0.libero.init_states.FIXTURE_MODES`.
        demonstrations: folder of LIBERO's HDF5 files; their first states come first among the training states.
        held_out_states: how many recorded states of each task, from the first on, only evaluation uses; training
            uses the others. None: evaluation uses all, and training states are drawn.

    Args:
        task: which tasks and how they are simulated, the section `task` of a configuration.
        policy: the policy's cameras, image size, chunk length and robot. Cameras that LIBERO does not have, such as
            the right wrist of published policies, are left out; the policy masks them.
        interrupts: requests to stop, which end rollouts and evaluations; None: there are none.
    Raises:
        InputError: unknown suite or task, a policy of another robot, no camera that LIBERO has, more `replan_steps`
            than actions in a chunk, or unusable assets.
    """

    def __init__(self, task: TaskConfig, policy: PolicySpec, interrupts: Interrupts | None = None):
        refuse_other_robots(policy)
        self.cameras = tuple(name for name in policy.cameras if name in CAMERAS)
        if not self.cameras:
            raise InputError(
                f"the policy's cameras are {', '.join(policy.cameras) or 'none'}; "
                f"LIBERO has {', '.join(CAMERAS)}"
            )
        chunk = policy.action_horizon
        if not 1 <= task.replan_steps <= chunk:
            raise InputError(
                f"replan_steps is {task.replan_steps}; the policy's chunks have {chunk} actions: 1 to {chunk}"
            )
        self.image_size = task.image_size or policy.image_size
        self.benchmark_name = task.benchmark_name
        self.tasks: list[Task] = find_tasks(task.benchmark_name, task.chosen)
        self.interrupts = Interrupts() if interrupts is None else interrupts
        self.replan_steps = task.replan_steps
        self.max_episode_length = task.max_episode_length
        self.settle_steps = task.settle_steps
        self.fixtures = task.fixtures
        self.demonstrations = task.demonstrations
        self.held_out_states = task.held_out_states
        self.pool = RolloutPool(
            WorkerSpec(
                assets=resolve_assets(task.assets),
                cameras=self.cameras,
                image_size=self.image_size,
                render=task.render,
                slots=task.rollouts_per_env,
                chunk=chunk,
                max_open_tasks=task.max_open_tasks,
            ),
            workers=task.num_parallel_envs,
            check=self.interrupts.check,
        )
        if collectives.rank_and_world_size()[0] == 0:
            geometry = self.pool.spec.assets
            print(f"LIBERO assets: {geometry.source} ({geometry.path}); frames by {gl.renderer()}")

    # Initial states ------------------------------------------------------------------------------

    def training_states(
        self, count: int, seed: int, tasks: Sequence[Task] | None = None
    ) -> list[InitStatePool]:
        """A pool of `count` training states for each of `tasks`, or of all tasks; fewer if fewer are recorded.

        First states of demonstrations come first. The others are recorded states that are not held out or, with
        `held_out_states` None, states drawn with `seed`.
        """
        chosen = self.tasks if tasks is None else list(tasks)
        if self.held_out_states is None:
            pools = training_pools(self.pool, chosen, count, seed)
        else:
            pools = recorded_pools(self.pool, chosen, self.fixtures, self.held_out_states, count)
        return with_demonstrated(self.pool, pools, self.demonstrations) if self.demonstrations else pools

    def validation_states(self, count: int) -> list[InitStatePool]:
        """A pool of `count` states for each task, drawn like training states but never trained on."""
        return training_pools(self.pool, self.tasks, count, VALIDATION_SEED)

    def evaluation_states(self) -> list[InitStatePool]:
        """LIBERO's recorded states of each task, or drawn ones of a folder's; only the held-out ones if training uses the others."""
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
        """A rollout from one state of a pool, with this protocol; `max_steps` replaces its horizon."""
        return Rollout(
            task=states.task,
            init=states.states[index],
            init_index=index,
            noise_key=tuple(noise_key),
            horizon=max_steps or self.max_episode_length or states.task.horizon,
            settle_steps=self.settle_steps,
            record=record,
        )

    def run_policy(
        self,
        policy: Policy,
        rollouts: Sequence[Rollout],
        num_envs: int | None = None,
        pool: RolloutPool | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Run rollouts in parallel.

        With the environment variables of `pi0.libero.debug`, videos and observations are also written.

        Args:
            policy: the policy that acts.
            rollouts: the rollouts to run.
            num_envs: most rollouts that run at once; None for the number of the workers' slots.
            pool: workers to use instead of this object's own.
        Yields:
            (index into `rollouts`, finished episode), in order of completion.
        Raises:
            Interrupted: the run was asked to stop.
            LostWorkersError: workers are lost time and again.
        """
        debug = DebugOutput()
        prepared = [debug.prepare(rollout) for rollout in rollouts]
        for index, episode in (pool or self.pool).run(policy, prepared, self.replan_steps, num_envs):
            debug.save(episode, policy)
            yield index, episode

    def protocol(self, **more: object) -> dict:
        """Everything that a score depends on besides the policy, for JSON; `more` adds entries or replaces them."""
        spec = self.pool.spec
        return {
            "suite": self.benchmark_name,
            "tasks": [task.index for task in self.tasks],
            "init_states": self.evaluation_source,
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
                name: importlib.metadata.version(name)
                for name in dict.fromkeys(
                    ("mujoco", "robosuite", "hf-libero", "torch", "numpy", package_of(self.benchmark_name))
                )
            },
            **({"bddl": self.bddl} if self.bddl else {}),
            **more,
        }

    @property
    def evaluation_source(self) -> str:
        """Where the evaluation's states come from, for the protocol of a score."""
        return EVALUATION_STATES if self.tasks[0].has_recorded_states else DRAWN_EVALUATION_STATES

    @property
    def bddl(self) -> dict[str, str]:
        """Hashes of the BDDL files by task, if the suite is a folder; a package's files stay as they are."""
        if not is_folder(self.benchmark_name):
            return {}
        return {task.name: task.bddl_hash() for task in self.tasks}

    def close(self) -> None:
        """Close the simulators and end the worker processes."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
