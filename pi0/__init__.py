"""pi0, a vision-language-action policy, and its post-training by reinforcement learning (`pi0.ript`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0.policy import PI0Policy

__all__ = ["PI0Policy"]


def __getattr__(name: str):
    # Loading torch takes seconds; simulator processes import this package without needing it.
    if name == "PI0Policy":
        from pi0.policy import PI0Policy

        return PI0Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
