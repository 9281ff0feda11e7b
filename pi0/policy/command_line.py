"""The options of commands with which a policy acts, and the policy that they choose."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from pi0.base.arguments import ranged

if TYPE_CHECKING:
    from pi0.model.config import Pi0Config
    from pi0.policy.acting import ActingPolicy

# What is chosen about the policy of a folder besides the folder.
OF_A_FOLDER = ("norm_stats_path", "guidance_weight", "critic_path", "compile")


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load_acting` reads; `--policy_path` is the command's own."""
    parser.add_argument(
        "--norm_stats_path", help="normalisation statistics to use instead of the folder's own"
    )
    parser.add_argument(
        "--guidance_weight",
        type=ranged(float, low=0),
        help="act by classifier-free guidance with this weight",
    )
    parser.add_argument(
        "--critic_path", help="folder of a critic (pi0.acrlpd), which chooses among --samples chunks"
    )
    parser.add_argument(
        "--samples", type=ranged(int, low=1), default=8, help="chunks among which the critic chooses"
    )
    parser.add_argument(
        "--device", default="auto", help="device of the policy: cpu, cuda, cuda:1; auto: the GPU if any"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="type of the transformers' weights",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile, which takes minutes"
    )


def load_acting(options: argparse.Namespace, threads: int | None = 1) -> tuple[ActingPolicy, Pi0Config]:
    """The policy of a command line as it acts, and its sizes.

    Args:
        options: with `policy_path` and the options of `add_policy_options`.
        threads: torch threads with which it acts on a CPU; None: all cores for a policy with SigLIP's tower, 1 for a
            small one, whose operations are too short to be shared out.

    Raises:
        InputError: a folder is none, or its policy cannot act as asked.
    """
    import torch  # takes a second: not for `--help`

    from pi0 import PI0Policy, pick_device
    from pi0.model.config import SiglipDims
    from pi0.policy.acting import ActingPolicy
    from pi0.policy.critics import BestOfPolicy, load_critic

    policy = PI0Policy.from_pretrained(
        options.policy_path,
        pick_device(options.device),
        getattr(torch, options.dtype),
        options.norm_stats_path,
        trainable="none",
    )
    policy.compiled = options.compile
    if threads is None:
        threads = (os.cpu_count() or 1) if isinstance(policy.config.vision, SiglipDims) else 1
    if not options.critic_path:
        return ActingPolicy(policy, options.guidance_weight, threads), policy.config
    critic = load_critic(options.critic_path, policy.device)
    return BestOfPolicy(policy, *critic, options.samples, options.guidance_weight, threads), policy.config
