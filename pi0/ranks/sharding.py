"""FSDP2: shard a module's weights, gradients and optimizer state over the ranks (Zhao et al. 2023).

It serves a module that does not fit one GPU together with its gradients and optimizer state. Each block is gathered
just before it runs. Checkpoints hold whole tensors, so any number of ranks, with or without shards, can resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

# The warning is about outputs that are views; nothing here changes them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(module: Module, blocks: Iterable[nn.Module], mesh: DeviceMesh | None = None) -> Module:
    """Shard a module's weights, in place; it needs ranks (torchrun).

    Args:
        module: the module.
        blocks: parts of it that run one after another; each is whole only while it runs.
        mesh: the ranks, [shards] or [copies, shards]; None: shards on all ranks.
    """
    if mesh is None:
        mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def whole(tree: T) -> T:
    """The same tensor, or nest of dictionaries and lists, with whole tensors in place of shards.

    With shards, all ranks must call it together.
    """
    return tree_map_only(DTensor, DTensor.full_tensor, tree)


def whole_on_rank_zero(tree: T) -> T:
    """The same nest with whole tensors on rank 0, in the CPU's memory, and empty tensors on other ranks.

    All ranks must call it together. Tensors are gathered one after another, since no device has room for all.
    """

    def gather(shard: DTensor) -> Tensor:
        tensor = shard.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else tensor.new_empty(0)

    return tree_map_only(DTensor, gather, tree)


def weights_are_finite(module: torch.nn.Module) -> bool:
    """Whether the trained weights, and the sum of their squares, are finite.

    With shards, all ranks must call it together.
    """
    trained = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
    return bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(trained))))


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, cut like `example`; the tensor itself if `example` is whole."""
    if not isinstance(example, DTensor):
        return tensor
    # Every rank has the same whole tensor, so nothing must be sent.
    tensor = tensor.to(example.device)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors, for a sharded module or not; frozen weights may be missing."""
    own = module.state_dict()
    frozen = {name: own[name] for name, p in module.named_parameters() if not p.requires_grad}
    given = {name: cut_like(t, own[name]) if name in own else t for name, t in weights.items()}
    module.load_state_dict(frozen | given)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of whole tensors, for sharded parameters or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(number: int, value: Any) -> Any:
        of_the_weight = isinstance(value, Tensor) and value.shape == parameters[number].shape
        return cut_like(value, parameters[number]) if of_the_weight else value  # such as the count of steps

    # Cut them first: the optimizer moves all that it gets to the device.
    moments = {
        number: {name: own(number, value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
