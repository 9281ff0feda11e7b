"""FSDP2: a module whose weights, gradients and optimizer state are cut over the ranks (Zhao et al. 2023).

For a module that does not fit one GPU together with its gradients and its optimizer state. Each of its blocks is
put together just before it runs. What is written to checkpoints is whole, so that any number of ranks, with shards
or without, can go on from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

# Of outputs that are views: nothing is done to them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(module: Module, blocks: Iterable[nn.Module]) -> Module:
    """Cut a module's weights over all ranks, in place; needs ranks (torchrun).

    Args:
        blocks: parts of it that run one after another; each is whole only while it runs.
    """
    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def whole(tree: T) -> T:
    """The same tensor, or nest of dictionaries and lists, with every shard made whole.

    To be called by all ranks together where there are shards.
    """
    return tree_map_only(DTensor, DTensor.full_tensor, tree)


def whole_on_rank_zero(tree: T) -> T:
    """The same nest with every shard whole on rank 0, in the CPU's memory; on other ranks it holds nothing of use.

    To be called by all ranks together. Shards are made whole one after another, since no device has room for all.
    """

    def gather(shard: DTensor) -> Tensor:
        tensor = shard.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else tensor.new_empty(0)

    return tree_map_only(DTensor, gather, tree)


def weights_are_finite(module: torch.nn.Module) -> bool:
    """Whether the weights that are trained are numbers, and small enough that the sum of their squares is one.

    To be called by all ranks together where there are shards.
    """
    trained = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
    return bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(trained))))


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `example` is; the tensor itself where that is whole."""
    if not isinstance(example, DTensor):
        return tensor
    # Every rank has the same whole tensor: nothing needs to be sent.
    tensor = tensor.to(example.device)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors, the module being sharded or not; frozen weights may be left out."""
    own = module.state_dict()
    frozen = {name: own[name] for name, p in module.named_parameters() if not p.requires_grad}
    given = {name: cut_like(t, own[name]) if name in own else t for name, t in weights.items()}
    module.load_state_dict(frozen | given)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of whole tensors, its parameters being sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(number: int, value: Any) -> Any:
        of_the_weight = isinstance(value, Tensor) and value.shape == parameters[number].shape
        return cut_like(value, parameters[number]) if of_the_weight else value  # such as the count of steps

    # Cut before they are handed over: the optimizer moves what it is given to the device.
    moments = {
        number: {name: own(number, value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
