"""Run under torchrun by test_production_stage.py: do shards gather the gradient of whole copies, in several passes?

And are they gathered for a checkpoint one after another, by rank 0 alone?

Usage: rank_shards.py CHECKPOINT CHUNKS,CHUNKS,... (that each rank has, fewer than passes on some)
"""

import sys
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pi0 import PI0Policy
from pi0.ranks.collectives import average_gradients, broadcast_weights
from pi0.ranks.sharding import shard, whole, whole_on_rank_zero
from pi0.ript.cfg_adapter import PI0_CFG_Adapter
from tests.support.episodes import make_episode
from tests.support.rank_end import leave_together

PASSES = 4


class CountedWholes:
    """How many shards are made whole meanwhile, and how many of those are in memory at once."""

    def __enter__(self):
        self.made = self.alive = self.most = 0
        self._full_tensor = full_tensor = DTensor.full_tensor

        def counted(shard: DTensor) -> torch.Tensor:
            tensor = full_tensor(shard)
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(tensor, self._gone)
            return tensor

        DTensor.full_tensor = counted
        return self

    def _gone(self) -> None:
        self.alive -= 1

    def __exit__(self, *_):
        DTensor.full_tensor = self._full_tensor


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    count = int(sys.argv[2].split(",")[rank])
    gradients, losses = [], []
    for sharded in (False, True):
        policy = PI0Policy.from_pretrained(sys.argv[1])
        if rank > 0:  # as from another file
            next(policy.parameters()).data += 1.0
        broadcast_weights(policy)
        adapter = PI0_CFG_Adapter(shard(policy, policy.network.blocks()) if sharded else policy)
        adapter.passes = PASSES
        batch = adapter.weigh([make_episode(True, [10] * 10, rank)], [1.0])[torch.arange(count)]
        generator = torch.Generator().manual_seed(rank)
        for last in (False, True):  # gradients of two minibatches come together
            if sharded:
                policy.set_requires_gradient_sync(last)
            losses.append(adapter.accumulate_gradient(batch, generator, 2, retry=not sharded))
        if not sharded:
            average_gradients(policy)
        gradients.append({name: whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None})
    copies, shards = gradients
    worst = max(float((copies[name] - shards[name]).abs().max()) for name in copies)
    size = max(float(gradient.abs().max()) for gradient in copies.values())
    assert shards.keys() == copies.keys()
    assert losses[:2] == losses[2:] or count == 0, losses
    parameters = dict(policy.named_parameters())
    with CountedWholes() as wholes:
        gathered = whole_on_rank_zero(parameters)
    assert wholes.made == len(parameters)
    assert wholes.most == (len(parameters) if rank == 0 else 1)
    for name, parameter in parameters.items():
        value = whole(parameter)
        assert rank > 0 or torch.equal(gathered[name], value)
    if rank == 0:
        print(f"worst difference {worst} of gradients up to {size}", flush=True)
    leave_together()


if __name__ == "__main__":
    main()
