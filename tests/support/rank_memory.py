"""Run under torchrun by test_production_stage.py: memory runs out on the last rank, and all continue together.

Usage: rank_memory.py CHECKPOINT BYTES (that the last rank may use besides what it has)
"""

import resource
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pi0 import PI0Policy
from pi0.ranks.collectives import average_gradients
from pi0.ript.cfg_adapter import PI0_CFG_Adapter
from tests.support.episodes import make_episode
from tests.support.rank_end import leave_together


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    policy = PI0Policy.from_pretrained(sys.argv[1])
    adapter = PI0_CFG_Adapter(policy, noise_samples=4)
    batch = adapter.weigh([make_episode(True, [10] * 20, seed) for seed in range(12)], [1.0] * 12)
    generator = torch.Generator().manual_seed(rank)
    adapter.accumulate_gradient(batch[torch.arange(2)], generator, 1)  # what is allocated once
    if rank == last:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
    loss = adapter.accumulate_gradient(batch, generator, 1)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))  # what is imported from here on may have its memory
    before = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    average_gradients(policy)
    for ours, mean in zip(before, (p.grad for p in policy.parameters() if p.grad is not None), strict=True):
        parts = [torch.empty_like(ours) for _ in range(last + 1)]
        dist.all_gather(parts, ours)
        torch.testing.assert_close(mean, sum(parts) / (last + 1))
    print(f"rank {rank}: {adapter.passes} passes, loss {loss}", flush=True)
    leave_together()


if __name__ == "__main__":
    main()
