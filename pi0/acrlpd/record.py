"""Record rollouts of a policy as a LeRobot data set, failures too.

    python -m pi0.acrlpd.record --policy_path checkpoints/pi0_tiny_libero_spatial --rollouts 400 --output outputs/recorded

Every control step is a row with its images. `pi0.acrlpd.train` learns from the set (data.datasets), and so does whatever
reads LeRobot's layout v3.0. With `--critic_path` the critic chooses among `--samples` chunks. Rollouts whose simulation
broke are named and left out; if more than a tenth broke, nothing is written and the exit status is 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pi0.acrlpd.config import ACRLPDTrainingConfig, DataConfig
from pi0.acrlpd.episodes import demonstration_of
from pi0.acrlpd.practice import choose_rollouts
from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.base.progress import progress
from pi0.data.lerobot_layout import LEROBOT_NAMES
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.evaluation import refuse_broken
from pi0.libero.rollouts import Policy
from pi0.libero.settings import add_task_options, range_of, task_of_command
from pi0.libero.stepping import CONTROL_HZ
from pi0.policy.command_line import add_policy_options, load_acting


def create_argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.acrlpd.record",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--policy_path", required=True, help="policy folder")
    parser.add_argument("--output", required=True, type=Path, help="folder of the data set; a new one")
    parser.add_argument(
        "--rollouts",
        type=ranged(int, low=1),
        default=400,
        help="number in all, spread evenly over the tasks",
    )
    add_policy_options(parser)
    add_task_options(parser)
    parser.add_argument(
        "--init_states",
        type=range_of(DataConfig, "init_states"),
        default=DataConfig.init_states,
        help="training states of each task to start from, drawn as LIBERO draws them",
    )
    parser.add_argument(
        "--seed",
        type=range_of(ACRLPDTrainingConfig, "seed"),
        default=0,
        help="seed of training states, their order and the policy's noise",
    )
    parser.add_argument("--video", action="store_true", help="write images as H.264 video, not as PNG")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Load the policy, record, write."""
    options = create_argument_parser().parse_args(arguments)
    acting, config = load_acting(options)
    task = task_of_command(options, replan_steps=options.replan_steps or min(10, config.action_horizon))
    with Environments(task, config) as environments:
        names = replace(
            LEROBOT_NAMES, cameras={camera: LEROBOT_NAMES.cameras[camera] for camera in environments.cameras}
        )
        with LeRobotWriter(options.output, CONTROL_HZ, names, video=options.video) as writer:
            pools = environments.training_states(options.init_states, options.seed)
            rollouts = choose_rollouts(environments, pools, options.rollouts, options.seed, 0)
            recorded = record(environments, acting, rollouts, writer)
    solved, steps = sum(each.success for each in recorded), sum(each.steps for each in recorded)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(
        f"{options.output}: {len(recorded)} episodes, {solved} solved, {steps} control steps, {size / 1e6:.1f} MB"
    )


def record(
    environments: Environments, policy: Policy, rollouts: Sequence[Rollout], writer: LeRobotWriter
) -> list[Episode]:
    """Run rollouts and write them in their order, with what is seen at every control step; returns their outlines.

    Those whose simulation broke are named and left out.

    Raises:
        BrokenSimulationsError: more than a tenth of them broke.
    """
    rollouts = [replace(rollout, keep_every=True, keep_last=True) for rollout in rollouts]
    written: list[Episode] = []
    broken: list[str] = []
    early: dict[int, Episode] = {}  # those that ended before an earlier one
    with progress(total=len(rollouts), label="recording", unit="rollout") as bar:
        for index, ended in environments.run_policy(policy, rollouts):
            early[index] = ended
            while (episode := early.pop(len(written) + len(broken), None)) is not None:
                if episode.failure is None:
                    writer.add(demonstration_of(episode))
                    written.append(episode.outline())
                else:
                    broken.append(episode.failure)
                    print(f"left out: {episode.rollout}: {episode.failure}")
            bar.update(1, f"{sum(each.success for each in written)} solved")
    refuse_broken("recording", broken, len(rollouts))
    return written


if __name__ == "__main__":
    run_command(main)
