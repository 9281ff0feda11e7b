"""The agent on several ranks with a sharded actor (FSDP2): mesh, shards, optimizers, and checks of what came of it.

Only the actor in training is sharded, with its gradients and its optimizer's moments: it is what does not fit one GPU.
Its average stays whole on each rank, because each rank acts by itself, at its own pace. Critics are small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pi0 import PI0Policy
from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent, Batch, Info
from pi0.acrlpd.actor import Pi0Actor
from pi0.acrlpd.checkpointing import optimizers
from pi0.acrlpd.config import RLTrainConfig
from pi0.acrlpd.pytree_checker import (
    check_optimizer_consistency,
    require_sound,
    validate_fsdp_compatibility,
)
from pi0.base.errors import InputError
from pi0.ranks.collectives import rank_and_world_size
from pi0.ranks.sharding import shard
from pi0.training.optimizer import make_optimizer

TEMPERATURE_LR = 1e-2


def create_fsdp_mesh(fsdp_size: int, device: torch.device) -> DeviceMesh:
    """The ranks as a mesh [dp, fsdp]: `fsdp_size` ranks hold one copy of the actor, and dp copies learn together.

    Raises:
        InputError: the number of ranks is no multiple of `fsdp_size`.
    """
    _, world_size = rank_and_world_size()
    if not dist.is_initialized() or world_size % fsdp_size:
        raise InputError(
            f"training.fsdp_size = {fsdp_size}: {world_size} ranks cannot be divided into copies of {fsdp_size}; start "
            f"torchrun --nproc_per_node={fsdp_size} or a multiple of it"
        )
    shape = (world_size // fsdp_size, fsdp_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp", "fsdp"))


def create_fsdp_sharding_strategy(policy: PI0Policy) -> list[nn.Module]:
    """The parts of a policy that are gathered one at a time: the token embedding, then each transformer block.

    The embedding is a part of its own: it is a fifth of the weights of a full-size pi0, and only the prefix needs it.
    """
    return [policy.network.token_embedding, *policy.network.blocks()]


def optimize_fsdp_memory(policy: PI0Policy) -> None:
    """Keep only the inputs of each block for the backward pass, which then runs the block again."""
    policy.network.checkpoint_gradients()


def init_fsdp_train_state(agent: ACRLPDPi0Agent, mesh: DeviceMesh) -> None:
    """Shard the actor in training, in place. It has no optimizer yet: see `create_global_optimizers`.

    Raises:
        CheckpointError: FSDP2 refuses its weights.
        InputError: the actor has an optimizer, which would go on with the whole weights.
    """
    if agent.pi0_opt_state is not None:
        raise InputError("shard the actor first, then make its optimizer")
    policy = actor_policy(agent)
    groups = create_fsdp_sharding_strategy(policy)
    findings = validate_fsdp_compatibility(policy, groups, mesh["fsdp"].size())
    require_sound(findings, "the actor", "it cannot be sharded: set training.fsdp_size = 1")
    shard(policy, groups, mesh)


def create_global_optimizers(agent: ACRLPDPi0Agent, config: RLTrainConfig) -> None:
    """Give the agent its optimizers, of the weights as they are now: after sharding.

    Raises:
        CheckpointError: an optimizer does not have exactly the trained weights.
    """
    settings = config.acrlpd
    critics = [p for module in (agent.critic_networks, agent.features) for p in module.parameters()]
    agent.pi0_opt_state = make_optimizer(agent.pi0_model, settings.actor_lr, config.training.optimizer)
    agent.critic_opt_state = torch.optim.Adam(
        [p for p in critics if p.requires_grad], settings.critic_lr, fused=True
    )
    if settings.divergence:
        agent.temp_opt_state = torch.optim.Adam([agent.log_temperature], TEMPERATURE_LR)
    for name, (optimizer, weights) in optimizers(agent).items():
        require_sound(check_optimizer_consistency(optimizer, weights, name), name, "make it after sharding")


def create_fsdp_train_step_fn(
    agent: ACRLPDPi0Agent, mesh: DeviceMesh
) -> Callable[[Batch], tuple[ACRLPDPi0Agent, Info]]:
    """The step of all ranks together: each gives its part of a batch and gets what the step says of the whole batch.

    Raises:
        InputError: as `validate_fsdp_sharding`.
    """
    validate_fsdp_sharding(agent, mesh)
    return agent.train_step


def validate_fsdp_sharding(agent: ACRLPDPi0Agent, mesh: DeviceMesh) -> dict[str, int]:
    """Check that each trained weight of the actor and each of its optimizer's moments is a shard.

    Returns:
        Bytes: `weights` and `moments` on this rank, `whole_weights` and `whole_moments` of all its shards together.

    Raises:
        InputError: one is whole on this rank, or this rank has more than its share and a row of each weight.
    """
    ranks = mesh["fsdp"].size()
    named = {n: p for n, p in actor_policy(agent).named_parameters() if p.requires_grad}
    states = agent.pi0_opt_state.state if agent.pi0_opt_state is not None else {}
    tensors: dict[str, list[tuple[str, Any]]] = {"weights": list(named.items()), "moments": []}
    for name, weight in named.items():
        kept = states.get(weight, {})
        tensors["moments"] += [
            (f"{name}.{key}", t) for key, t in kept.items() if isinstance(t, Tensor) and t.ndim
        ]
    found: dict[str, int] = {}
    for kind, of_kind in tensors.items():
        whole = [name for name, tensor in of_kind if not isinstance(tensor, DTensor)]
        if whole:
            raise InputError(f"{whole[0]} and {len(whole) - 1} other {kind} are whole on each rank")
        found[kind] = sum(_bytes(t.to_local()) for _, t in of_kind)
        found[f"whole_{kind}"] = sum(_bytes(t) for _, t in of_kind)
        most = sum(-(-t.shape[0] // ranks) * _bytes(t) // max(1, t.shape[0]) for _, t in of_kind)
        if found[kind] > most:
            raise InputError(f"this rank holds {found[kind]} bytes of {kind}; its share is {most} at most")
    return found


def actor_policy(agent: ACRLPDPi0Agent) -> PI0Policy:
    """The policy of the agent's actor.

    Raises:
        InputError: the actor is no pi0.
    """
    if not isinstance(agent.pi0_model, Pi0Actor):
        raise InputError(f"the actor is {type(agent.pi0_model).__name__}; only a pi0 policy is sharded")
    return agent.pi0_model.policy


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
