"""Stage 13, which holds on to more and more memory from an iteration on.

Usage: leaking_memory.py ITERATION MB ARGUMENTS-OF-STAGE-13...
"""

import runpy
import sys

from pi0.base.paths import REPO_ROOT
from pi0.ript.cfg_adapter import PI0_CFG_Adapter

iteration, size_mb = int(sys.argv.pop(1)), int(sys.argv.pop(1))
weigh = PI0_CFG_Adapter.weigh
held: list[bytes] = []


def leaking_weigh(*arguments, **options):
    global iteration
    if iteration <= 0:
        held.append(b"\1" * (size_mb * 1_000_000))
    iteration -= 1
    return weigh(*arguments, **options)


PI0_CFG_Adapter.weigh = leaking_weigh
sys.argv[0] = str(REPO_ROOT / "13_train_production_ready.py")
runpy.run_path(sys.argv[0], run_name="__main__")
