"""pi0, a vision-language-action policy, and its post-training by reinforcement learning (`pi0.ript`)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0.policy.pi0_policy import PI0Policy, pick_device

__all__ = ["PI0Policy", "pick_device"]


def __getattr__(name: str):
    # Loading torch takes seconds; simulator processes import this package without needing it.
    if name in __all__:
        return getattr(importlib.import_module("pi0.policy.pi0_policy"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
