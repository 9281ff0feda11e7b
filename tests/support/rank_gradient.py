"""Run under torchrun by test_distributed.py: is the synchronised gradient that of one process over all episodes?

Usage: rank_gradient.py CHECKPOINT MODE COUNT,COUNT,... (episodes that each rank has collected)
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pi0 import PI0Policy
from pi0.ranks.collectives import average_gradients, largest
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from tests.support.episodes import CAMERAS, make_episode
from tests.support.rank_end import leave_together


def main() -> None:
    checkpoint, mode, counts = sys.argv[1], sys.argv[2], [int(count) for count in sys.argv[3].split(",")]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    collected = [
        [(make_episode(True, [10, 7, 3][: 1 + number % 3], 10 * owner + number), 0.25 * (number - 1))
         for number in range(count)]
        for owner, count in enumerate(counts)
    ]  # fmt: skip
    batches = []
    for episodes in collected:
        policy = load(checkpoint, mode)
        weighed = PI0_CFG_Adapter(policy, mode=mode, negative_weight=0.5).weigh(
            [episode for episode, _ in episodes], [advantage for _, advantage in episodes]
        )
        nothing = WeightedChunks.empty(CAMERAS, 64, policy.config.action_horizon)
        batches.append(WeightedChunks.cat([nothing, *([weighed] if weighed is not None else [])]))

    # Gradients meet after the backward pass, as in stage 13, and within it, as in stages 10 to 12.
    policies = [load(checkpoint, mode), load(checkpoint, mode)]
    for policy, within in zip(policies, (False, True), strict=True):
        model = DistributedDataParallel(policy)
        adapter = PI0_CFG_Adapter(policy, mode=mode, negative_weight=0.5, model=model)
        parts = largest(adapter.count_minibatches(batches[rank], 4))
        generator = torch.Generator().manual_seed(rank)
        for number, minibatch in enumerate(adapter.minibatches(batches[rank], parts, generator)):
            model.require_backward_grad_sync = within and number + 1 == parts
            if within:
                adapter.minibatch_loss(minibatch, generator).backward()
            else:
                adapter.accumulate_gradient(minibatch, generator, 1)
        if not within:
            average_gradients(policy)
    if rank == 0:
        alone = load(checkpoint, mode)
        sum_over_union(alone, mode, batches, parts)
        worst, size = 0.0, 0.0
        for policy in policies:
            for ours, theirs in zip(policy.parameters(), alone.parameters(), strict=True):
                if theirs.grad is None:
                    assert ours.grad is None or not ours.grad.any()
                    continue
                worst = max(worst, float((ours.grad - theirs.grad).abs().max()))
                size = max(size, float(theirs.grad.abs().max()))
        print(f"worst difference {worst} of gradients up to {size}", flush=True)
    leave_together()


def load(checkpoint: str, mode: str) -> PI0Policy:
    policy = PI0Policy.from_pretrained(checkpoint)
    if mode == "guidance":
        policy.enable_guidance()
    return policy


def sum_over_union(policy: PI0Policy, mode: str, batches: list[WeightedChunks], parts: int) -> None:
    """The gradient by definition: in each pass, all ranks' weighted losses over all ranks' weights.

    A part's own loss is sum(w l) / sum|w| over the part; with the part's weight it is back to sum(w l).
    """
    adapter = PI0_CFG_Adapter(policy, mode=mode, negative_weight=0.5)
    adapter_parts = []
    for rank, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(rank)
        adapter_parts.append((adapter.minibatches(batch, parts, generator), generator))
    for _ in range(parts):
        sums, weights = [], []
        for minibatches, generator in adapter_parts:
            minibatch = next(minibatches)
            if len(minibatch):
                weight = minibatch.weights.abs().sum()
                sums.append(minibatch_sum(adapter, minibatch, generator, float(weight)))
                weights.append(weight)
        (sum(sums) / sum(weights)).backward()


def minibatch_sum(adapter: PI0_CFG_Adapter, minibatch: WeightedChunks, generator, weight: float):
    import pi0.ript.cfg_adapter as module

    collective, module.mean_over_ranks = module.mean_over_ranks, lambda value: value
    try:
        return adapter.minibatch_loss(minibatch, generator) * weight
    finally:
        module.mean_over_ranks = collective


if __name__ == "__main__":
    main()
