"""Stage 13, whose minibatches take four seconds each from one of them on.

Usage: slow_updates.py NUMBER ARGUMENTS-OF-STAGE-13...
"""

import runpy
import sys
import time

from pi0.base.paths import REPO_ROOT
from pi0.ript.cfg_adapter import PI0_CFG_Adapter

fast = int(sys.argv.pop(1))
accumulate_gradient = PI0_CFG_Adapter.accumulate_gradient


def accumulate_slowly(*arguments, **options) -> float:
    global fast
    fast -= 1
    if fast < 0:
        time.sleep(4.0)
    return accumulate_gradient(*arguments, **options)


PI0_CFG_Adapter.accumulate_gradient = accumulate_slowly
sys.argv[0] = str(REPO_ROOT / "13_train_production_ready.py")
runpy.run_path(sys.argv[0], run_name="__main__")
