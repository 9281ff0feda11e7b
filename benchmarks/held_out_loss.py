"""Does practice learn, or memorise its rollouts? Compares the loss of policies on fresh successes of the first of them.

    python benchmarks/held_out_loss.py checkpoints/suite_goal outputs/RUN/policy --suite libero_goal --tasks 1

The first policy, the start of practice, acts from training states that practice never had, drawn with `--seed`. The table has
each policy's flow loss on those episodes, successes and failures apart, as the mean over episodes with a 95% interval. Beside
it is the loss of the last updates of the run that the policy is from. If this one fell and that on fresh successes did not,
practice memorised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.drawn_episodes import drawn_episodes
from pi0 import PI0Policy
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import InputError, run_command
from pi0.base.files import read_json
from pi0.base.stats import mean_interval
from pi0.data.chunks import Chunks
from pi0.libero.episodes import Episode
from pi0.libero.settings import TaskConfig, range_of
from pi0.training.flow_loss import flow_loss


def main() -> None:
    """Run the episodes, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policies", type=Path, nargs="+", metavar="POLICY", help="policy folders")
    parser.add_argument("--suite", default="libero_spatial", help="of the episodes")
    parser.add_argument(
        "--tasks", action=Collect, nargs="*", default=["3", "8"], help="by index or name; alone: the whole suite"
    )  # fmt: skip
    parser.add_argument("--episodes", type=ranged(int, low=1), default=60, help="of each task")
    parser.add_argument("--draws", type=ranged(int, low=1), default=8, help="of noise and time for a chunk")
    parser.add_argument(
        "--max_episode_length", type=range_of(TaskConfig, "max_episode_length"), help="control steps"
    )
    parser.add_argument(
        "--seed", type=ranged(int, low=0), default=1000, help="other than that of the run's training states"
    )
    options = parser.parse_args()
    policies = [PI0Policy.from_pretrained(path) for path in options.policies]
    whole = drawn_episodes(
        policies[0], options.suite, options.tasks, options.episodes, options.seed, options.max_episode_length
    )
    episodes = [[each for each in whole if each.success == wanted] for wanted in (True, False)]
    if not episodes[0]:
        raise InputError(
            f"none of {len(whole)} episodes succeeded; take more, or a policy that solves these tasks"
        )
    print("| policy | loss of its last updates | on fresh successes | on fresh failures |\n|---|---|---|---|")
    for path, policy in zip(options.policies, policies, strict=True):
        cells = [show(losses(policy, part, options.draws)) for part in episodes]
        print(f"| {path} | {last_loss(path)} | {cells[0]} | {cells[1]} |")
    print(f"\n{len(episodes[0])} successes, {len(episodes[1])} failures")


def losses(policy: PI0Policy, episodes: Sequence[Episode], draws: int) -> list[float]:
    """Flow loss of each episode: the mean over its chunks, without augmentation, with the same noise for every policy."""
    with torch.no_grad():
        return [
            flow_loss(
                policy,
                Chunks.of(episode),
                samples=draws,
                generator=torch.Generator().manual_seed(number),
            )
            .mean()
            .item()
            for number, episode in enumerate(episodes)
        ]


def show(values: Sequence[float]) -> str:
    """Mean and 95% interval; without values a dash."""
    if not values:
        return "-"
    mean, low, high = mean_interval(values)
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


def last_loss(policy: Path) -> str:
    """Loss of the last updates of the run in whose folder the policy is; a dash if there are none."""
    results = policy.parent / "results.json"
    history = read_json(results).get("history", []) if results.is_file() else []
    found = [step["loss"] for step in history if step.get("loss") is not None]
    return f"{found[-1]:.4f}" if found else "-"


if __name__ == "__main__":
    run_command(main)
