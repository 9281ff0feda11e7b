"""Run under torchrun by test_distributed.py: the last rank stops where it stands, and the others notice its silence.

Usage: rank_silent.py SECONDS [launcher]
SECONDS: of silence after which a rank is taken for dead; launcher: no rank stops, somebody else stops the launcher.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from pi0.ranks.watch import watched_ranks


def main() -> None:
    dist.init_process_group("gloo")
    with watched_ranks(float(sys.argv[1])):
        launcher = sys.argv[2:] == ["launcher"]
        if launcher or dist.get_rank() == dist.get_world_size() - 1:
            print(f"process {os.getpid()}", flush=True)
        if not launcher and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


if __name__ == "__main__":
    main()
