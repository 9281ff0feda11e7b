"""When is it decided whether an episode succeeds? Fits a value function, and shows at which looks it knows the outcome.

    python benchmarks/deciding_chunks.py checkpoints/suite_goal --suite libero_goal --task 1

The policy acts from drawn training states. A small network learns from its fixed features and the robot's state how likely an
episode is to succeed. It is cross-fitted: an episode is valued by a network that learned from others. The table has for each
look, an observation from which the policy drew a chunk:

| column | what it is |
|---|---|
| AUC | how often a success is valued above a failure at this look; 0.5: nothing is known yet, 1: all is decided |
| change | mean size of the change of value over the chunk that follows; the end of an episode has the value 0 or 1 |

Practice gives all chunks of an episode the same weight. Where few looks have most of the change, that hides what matters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

from benchmarks.drawn_episodes import drawn_episodes
from pi0 import PI0Policy
from pi0.base.arguments import ranged
from pi0.base.errors import InputError, run_command
from pi0.libero.episodes import Episode
from pi0.libero.settings import TaskConfig, range_of
from pi0.policy.critics import PolicyFeatures

FOLDS = 4
EPOCHS = 15


def main() -> None:
    """Run the episodes, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path, metavar="POLICY", help="policy folder")
    parser.add_argument("--suite", default="libero_spatial", help="of the task")
    parser.add_argument("--task", default="8", help="by index or name")
    parser.add_argument("--episodes", type=ranged(int, low=2 * FOLDS), default=200)
    parser.add_argument("--looks", type=ranged(int, low=1), default=10, help="rows of the table")
    parser.add_argument(
        "--max_episode_length", type=range_of(TaskConfig, "max_episode_length"), help="control steps"
    )
    parser.add_argument("--seed", type=ranged(int, low=0), default=0, help="of states, noise and networks")
    options = parser.parse_args()
    policy = PI0Policy.from_pretrained(options.policy)
    episodes = drawn_episodes(
        policy, options.suite, [options.task], options.episodes, options.seed, options.max_episode_length
    )
    seen = PolicyFeatures(policy.config, policy.network)
    features = [features_of(policy, seen, episode) for episode in episodes]
    outcomes = [episode.success for episode in episodes]
    if len(set(outcomes)) < 2:
        raise InputError(
            f"{sum(outcomes)} of {len(outcomes)} episodes succeeded; take a task that succeeds at times"
        )
    print(table(cross_fitted(features, outcomes, options.seed), outcomes, options.looks))


def features_of(policy: PI0Policy, seen: PolicyFeatures, episode: Episode) -> Tensor:
    """What the value function sees of each look, float32 [T, F]."""
    inputs = policy.prepare(
        {
            "images": {camera: torch.from_numpy(frames) for camera, frames in episode.images.items()},
            "state": torch.from_numpy(episode.states),
            "prompt": [episode.prompt] * len(episode.states),
        }
    )
    return torch.cat([seen(**inputs), inputs["state"].float().flatten(1)], 1)


def cross_fitted(features: Sequence[Tensor], outcomes: Sequence[bool], seed: int) -> list[Tensor]:
    """Value of each look of each episode, 0 to 1, by a network that learned from the other folds' episodes.

    Every look counts the same: were it every episode, first looks would be valued too high where successes are short.

    Args:
        features: of each episode, float32 [T, F].
        outcomes: whether it succeeded.
        seed: of networks and folds.
    """
    whole = torch.cat(list(features))
    deviation = whole.std(0) + 1e-3
    scaled = [(each - whole.mean(0)) / deviation for each in features]
    generator = torch.Generator().manual_seed(seed)
    fold = torch.randperm(len(scaled), generator=generator) % FOLDS
    values = [torch.empty(0)] * len(scaled)
    for number in range(FOLDS):
        others = [index for index in range(len(scaled)) if fold[index] != number]
        inputs = torch.cat([scaled[index] for index in others])
        targets = torch.cat([torch.full((len(scaled[index]),), float(outcomes[index])) for index in others])
        network = fitted(inputs, targets, seed)
        with torch.no_grad():
            for index in range(len(scaled)):
                if fold[index] == number:
                    values[index] = network(scaled[index]).squeeze(1).sigmoid()
    return values


def fitted(inputs: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """A network for the logit of `targets` [N], which are 0 or 1, from `inputs` [N, F]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 1)
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(inputs)).split(64):
                logits = network(inputs[index]).squeeze(1)
                loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def table(values: Sequence[Tensor], outcomes: Sequence[bool], looks: int) -> str:
    """Markdown: what is known at each of the first `looks` looks, and how much the chunk that follows changes it."""
    ends = [torch.tensor([float(outcome)]) for outcome in outcomes]
    changes = [torch.cat([each[1:], end]) - each for each, end in zip(values, ends, strict=True)]
    lines = [
        f"{sum(outcomes)} of {len(outcomes)} episodes succeeded",
        "",
        "| look | episodes | AUC | change |",
        "|---|---|---|---|",
    ]
    for look in range(min(looks, max(map(len, values)))):
        there = [number for number, each in enumerate(values) if len(each) > look]
        at_look = torch.stack([values[number][look] for number in there])
        mean = torch.stack([changes[number][look] for number in there]).abs().mean()
        ends_well = torch.tensor([outcomes[number] for number in there])
        # Late looks are of failures alone, with nothing to tell apart.
        known = f"{auc(at_look, ends_well):.2f}" if len(ends_well.unique()) == 2 else "-"
        lines.append(f"| {look} | {len(there)} | {known} | {mean:.3f} |")
    return "\n".join(lines)


def auc(values: Tensor, outcomes: Tensor) -> float:
    """How often one of the true `outcomes` has a higher value than one of the false ones; equal values count half."""
    above = values[outcomes][:, None] - values[~outcomes][None]
    return float((above.sign() + 1).mean() / 2)


if __name__ == "__main__":
    run_command(main)
