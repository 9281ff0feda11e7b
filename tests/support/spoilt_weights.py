"""Stage 13, one of whose updates spoils the weights, which stay numbers.

Usage: spoilt_weights.py UPDATE FACTOR ARGUMENTS-OF-STAGE-13...
"""

import runpy
import sys

import torch

from pi0.base.paths import REPO_ROOT

update, factor = int(sys.argv.pop(1)), float(sys.argv.pop(1))
step = torch.optim.AdamW.step


def spoiling_step(optimizer, *arguments, **options) -> None:
    global update
    step(optimizer, *arguments, **options)
    update -= 1
    if update == 0:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter *= factor


torch.optim.AdamW.step = spoiling_step
sys.argv[0] = str(REPO_ROOT / "13_train_production_ready.py")
runpy.run_path(sys.argv[0], run_name="__main__")
