"""Stage 13, whose first gradients are no numbers.

Usage: spoilt_gradients.py COUNT ARGUMENTS-OF-STAGE-13...
"""

import runpy
import sys

import torch

from pi0.base.paths import REPO_ROOT
from pi0.ript.cfg_adapter import PI0_CFG_Adapter

spoilt = int(sys.argv.pop(1))
accumulate_gradient = PI0_CFG_Adapter.accumulate_gradient


def accumulate_spoilt(adapter, *arguments, **options) -> float:
    global spoilt
    loss = accumulate_gradient(adapter, *arguments, **options)
    if spoilt > 0:
        spoilt -= 1
        next(p.grad for p in adapter.policy.parameters() if p.grad is not None).fill_(torch.nan)
    return loss


PI0_CFG_Adapter.accumulate_gradient = accumulate_spoilt
sys.argv[0] = str(REPO_ROOT / "13_train_production_ready.py")
runpy.run_path(sys.argv[0], run_name="__main__")
