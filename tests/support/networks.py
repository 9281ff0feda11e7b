"""Networks of a few thousand parameters, inputs for them, and where published outputs are."""

import dataclasses

import torch

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.model.config import GemmaDims, Pi0Config, SiglipDims

REFERENCE = REPO_ROOT.parent / "shared" / "pi0_reference" / "pi0_tiny"


def small_config(**changes) -> Pi0Config:
    """A few thousand parameters of every kind: SigLIP tower, two key-value heads, three layers."""
    config = Pi0Config(
        vision=SiglipDims(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=8, image_size=16),
        gemma=GemmaDims(width=24, depth=3, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8),
        action_expert=GemmaDims(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8),
        vocab_size=32,
        action_dim=8,
        action_horizon=5,
        prompt_length=6,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        tokenizer="tiny",
    )
    return dataclasses.replace(config, **changes)


def random_inputs(config: Pi0Config, batch: int, dtype=torch.float32, seed: int = 0) -> dict:
    """Inputs as `PI0Policy.forward` takes them, with padding in the prompt and a camera missing in row 0."""
    g = torch.Generator().manual_seed(seed)
    size = config.image_size
    masks = torch.ones(batch, config.prompt_length, dtype=torch.bool)
    masks[0, config.prompt_length // 2 :] = False
    image_masks = {name: torch.ones(batch, dtype=torch.bool) for name in config.cameras}
    image_masks[config.cameras[-1]][0] = False
    return {
        "images": {
            name: torch.rand(batch, 3, size, size, generator=g, dtype=dtype) * 2 - 1
            for name in config.cameras
        },
        "image_masks": image_masks,
        "state": torch.randn(batch, config.action_dim, generator=g, dtype=dtype),
        "tokenized_prompt": torch.randint(0, 32, (batch, config.prompt_length), generator=g),
        "tokenized_prompt_mask": masks,
    }


def random_actions(config: Pi0Config, batch: int, dtype=torch.float32, seed: int = 1) -> dict:
    """Actions, noise and times."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, config.action_horizon, config.action_dim)
    return {
        "actions": torch.randn(shape, generator=g, dtype=dtype),
        "noise": torch.randn(shape, generator=g, dtype=dtype),
        "time": torch.rand(batch, generator=g, dtype=dtype),
    }


def inputs_of(policy: PI0Policy, batch: int = 2, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    config, size = policy.config, policy.config.image_size
    masks = torch.ones(batch, config.prompt_length, dtype=torch.bool)
    masks[0, 4:] = False
    return {
        "images": {n: torch.rand(batch, 3, size, size, generator=g).double() * 2 - 1 for n in config.cameras},
        "image_masks": {n: torch.ones(batch, dtype=torch.bool) for n in config.cameras},
        "state": torch.randn(batch, 8, generator=g).double(),
        "tokenized_prompt": torch.randint(0, 32, (batch, config.prompt_length), generator=g),
        "tokenized_prompt_mask": masks,
    }


def chunks_of(policy: PI0Policy, *lead: int, seed: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, policy.config.action_horizon, 8, generator=g).double()
