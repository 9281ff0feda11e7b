"""Episodes in files: checked when they are opened, then a pool of them in memory at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pi0 import PI0Policy
from pi0.acrlpd.config import RLTrainConfig
from pi0.acrlpd.episodes import RecordedEpisode, looked_steps, of_demonstration, rewards_of, terminates
from pi0.base.errors import CheckpointError
from pi0.base.progress import progress
from pi0.data import DataError, Demonstration, DemonstrationSet, FeatureNames, open_demonstrations
from pi0.data.recorded_chunks import plain_prompt, require_robot
from pi0.libero.episodes import ROBOT
from pi0.libero.rendering import CAMERAS
from pi0.libero.suites import find_tasks
from pi0.policy.normalization import FLOOR, NormStats, subtract_state
from pi0.ranks.collectives import rank_and_world_size

# A set whose median is so many of the policy's deviations away from the policy's mean is of something else.
FARTHEST = 10.0


class RecordedFiles:
    """The episodes of all `data.datasets`, in an order that the seed decides.

    All are visited once before one comes again. A lap through them is divided into pools of about equal size, at most
    `data.episodes_per_memory_pool` episodes each; every lap has another order. In a distributed run the ranks share a pool
    out among them.

    Attributes:
        solved: how many of the episodes were solved.
        pools: into how many pools a lap is divided.

    Args:
        config: the run.
        policy: what learns from them.

    Raises:
        MissingFileError: a file is not there.
        DataError: a file cannot be read, or does not fit the run: robot, statistics, cameras, size of images, length of
            instructions, rewards, or no rewards. The message names file and mend.
    """

    def __init__(self, config: RLTrainConfig, policy: PI0Policy):
        self._config, data = config, config.data
        self._cameras = [camera for camera in policy.config.cameras if camera in CAMERAS]
        self._image_size = config.task.image_size or policy.config.image_size
        self._sets: list[tuple[str, DemonstrationSet]] = []
        self._places: list[tuple[int, int]] = []  # of each episode: the set, its number there
        self.solved = 0
        names: dict[str, Any] = {"names": FeatureNames.parse(data.features)} if data.features else {}
        for path in data.datasets:
            robot = None if data.skip_norm_stats else ROBOT
            found = open_demonstrations(path, data.gripper, robot, **names)
            self._places += [(len(self._sets), number) for number in range(len(found))]
            self._sets.append((path, found))
            self.solved += self._check(path, found, policy)
        self.pools = math.ceil(len(self) / data.episodes_per_memory_pool)
        self._drawn = 0  # pools until now
        if self.solved in (0, len(self)) and not data.rollouts:
            which, others = ("all", "failures") if self.solved else ("none", "successes")
            print(
                f"warning: {', '.join(data.datasets)}: {which} of the {len(self)} episodes were solved, so critics have "
                f"nothing to contrast; add a set with {others}, or data.rollouts"
            )

    def __len__(self) -> int:
        """Episodes."""
        return len(self._places)

    def next_pool(self) -> list[RecordedEpisode]:
        """The next pool of whole episodes, or this rank's share of it.

        Raises:
            DataError: a file has changed since it was opened.
        """
        self._drawn += 1
        return self._pool(self._drawn - 1)

    def state_dict(self) -> dict[str, Any]:
        """Where in the order it is; the episodes themselves stay in the files."""
        return {"drawn": self._drawn, "episodes": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> list[RecordedEpisode]:
        """Continue from `state_dict()`; returns the pool that was in memory then.

        Raises:
            CheckpointError: the files held another number of episodes.
        """
        if state["episodes"] != len(self):
            raise CheckpointError(
                f"data.datasets hold {len(self)} episodes, but held {state['episodes']} when the checkpoint was written; "
                "resume with the files of that time"
            )
        self._drawn = state["drawn"]
        return self._pool(self._drawn - 1) if self._drawn else []

    def _pool(self, number: int) -> list[RecordedEpisode]:
        lap, part = divmod(number, self.pools)
        order = np.random.default_rng((self._config.training.seed, lap)).permutation(len(self))
        chosen = np.sort(np.array_split(order, self.pools)[part])  # neighbours in a file are read together
        rank, world_size = rank_and_world_size()
        return [self._read(*self._places[each]) for each in chosen[rank::world_size]]

    def _read(self, place: int, number: int) -> RecordedEpisode:
        path, found = self._sets[place]
        source = f"{path}, episode {number}"
        horizon = self._config.qchunking.horizon_length
        demonstration = found.read(number, looked_steps(found.lengths[number], horizon))
        self._check_images(demonstration, source)
        return of_demonstration(demonstration, horizon, source)

    # Whether they fit ----------------------------------------------------------------------------

    def _check(self, path: str, found: DemonstrationSet, policy: PI0Policy) -> int:
        """Check the instructions and numbers of a set, and one image; returns how many episodes were solved."""
        if set(found.cameras) != set(self._cameras):
            raise DataError(
                f"{path} has images of {', '.join(found.cameras)}, but the policy uses {', '.join(self._cameras)}; record "
                "a set with it (pi0.acrlpd.record), or take a policy of these cameras"
            )
        self._check_images(found.read(0, [0]), f"{path}, episode 0")
        solved = untold = 0
        states, actions = [], []
        with progress(total=len(found), label=f"checking {path}", unit="episode", delay=2) as bar:
            for number in range(len(found)):
                source = f"{path}, episode {number}"
                demonstration = found.read(number, image_steps=())
                require_robot(demonstration, source, ROBOT)
                self._check_rewards(rewards_of(demonstration, source), source)
                untold += terminates(demonstration, source) is None
                solved += not demonstration.failed
                states.append(demonstration.states)
                actions.append(demonstration.executed)
                bar.update(1)
        if policy.norm_stats is not None and not self._config.data.skip_norm_stats:
            stats, delta = policy.norm_stats, policy.delta_actions
            require_statistics(path, np.concatenate(states), np.concatenate(actions), stats, delta)
        print(f"{path}: {len(found)} episodes, {solved} solved")
        if untold:
            print(
                f"warning: {path}: {untold} episodes that were not solved do not say what ended them (next.truncated); "
                "they are taken as cut off by a limit of time"
            )
        self._check_prompts(path, sorted(set(found.prompts)), policy)
        return solved

    def _check_prompts(self, path: str, prompts: list[str], policy: PI0Policy) -> None:
        config, tokenizer = policy.config, policy.tokenizer
        state = np.zeros(config.robot_state_dim) if config.discrete_state_input else None
        for prompt in prompts:
            try:
                tokenizer.encode(prompt, state)
            except CheckpointError as error:
                raise DataError(f"{path}: {error}") from error
        known = {
            plain_prompt(task.prompt)
            for task in find_tasks(self._config.task.benchmark_name, self._config.task.chosen)
        }
        others = [prompt for prompt in prompts if plain_prompt(prompt) not in known]
        if others:
            print(
                f"{path}: {len(others)} of its {len(prompts)} instructions are no task of this run ({others[0]!r}); "
                "they are learned, too"
            )

    def _check_images(self, demonstration: Demonstration, source: str) -> None:
        for camera, frames in demonstration.images.items():
            height, width = frames.shape[1:3]
            if (height, width) != (self._image_size, self._image_size):
                raise DataError(
                    f"{source} has images of {width} x {height} pixels ({camera}), but this run's are "
                    f"{self._image_size} x {self._image_size}; set task.image_size, or record a set of that size"
                )

    def _check_rewards(self, rewards: np.ndarray, source: str) -> None:
        settings = self._config.acrlpd
        low, high = float(rewards.min()), float(rewards.max())
        if low < settings.lowest_reward or high > settings.highest_reward:
            raise DataError(
                f"{source} has rewards of {low:g} to {high:g}, but acrlpd.lowest_reward = {settings.lowest_reward:g} and "
                f"acrlpd.highest_reward = {settings.highest_reward:g}; set them to the range of the files"
            )
        if settings.one_reward and (count := np.count_nonzero(rewards)) > 1:
            raise DataError(
                f"{source} has {count} rewards, but acrlpd.one_reward = true allows one; set it to false"
            )


def require_statistics(
    path: str, states: np.ndarray, actions: np.ndarray, stats: NormStats, delta_actions: bool
) -> None:
    """Refuse a set whose numbers the policy's normalisation would move far away.

    Args:
        path: the set.
        states, actions: all of its own, [T, S] and [T, A].
        stats: the policy's.
        delta_actions: the policy learns actions less the state.

    Raises:
        DataError: the median of a feature is `FARTHEST` deviations away from the policy's mean, or more.
    """
    if delta_actions:
        pairs = torch.from_numpy(actions)[:, None], torch.from_numpy(states)
        actions = subtract_state(*pairs)[:, 0].numpy()
    for name, values, own in (("state", states, stats.state), ("action", actions, stats.actions)):
        median = np.median(values, axis=0)
        away = np.abs(median - own.mean) / np.maximum(own.std, FLOOR)
        if away.max() >= FARTHEST:
            feature = int(away.argmax())
            raise DataError(
                f"{path}: {name} feature {feature} has the median {median[feature]:.3g}, but {stats.source} has the mean "
                f"{own.mean[feature]:.3g} and the deviation {own.std[feature]:.3g}: another robot or other units; if it "
                "fits all the same, set data.skip_norm_stats=true"
            )
