"""Stage 13, whose last rank may from its first update on use only so many bytes more than it has: run under torchrun.

Usage: rank_short_of_memory.py BYTES ARGUMENTS-OF-STAGE-13...
"""

import os
import resource
import runpy
import sys
from pathlib import Path

from pi0.base.paths import REPO_ROOT
from pi0.ript.cfg_adapter import PI0_CFG_Adapter

allowed = int(sys.argv.pop(1))
accumulate_gradient = PI0_CFG_Adapter.accumulate_gradient


def accumulate_within_limit(*arguments, **options) -> float:
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + allowed, -1))
    PI0_CFG_Adapter.accumulate_gradient = accumulate_gradient
    return accumulate_gradient(*arguments, **options)


PI0_CFG_Adapter.accumulate_gradient = accumulate_within_limit
sys.argv[0] = str(REPO_ROOT / "13_train_production_ready.py")
runpy.run_path(sys.argv[0], run_name="__main__")
