"""Communication between the ranks of a distributed run.

Everything here also works in a single process, as rank 0 of 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# DistributedDataParallel warns about 1x1 convolutions; the copies it makes of their gradients are small.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """The `value` of every rank, in order of rank, on every rank."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)` on rank 0 only; every rank returns its result, or raises its error."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return function(*arguments)
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function(*arguments)
        except Exception as error:  # noqa: BLE001  raised below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradient."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size


def gather_rows(rows: Tensor) -> list[Tensor]:
    """The `rows` [N, ...] of every rank, in order of rank, on every rank; N may differ between ranks. No gradient."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [rows.detach()]
    counts = gather(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def broadcast_weights(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if rank_and_world_size()[1] > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over ranks; the same parameters must have gradients on all ranks.

    Shards (`pi0.ranks.sharding`) are left as they are: their gradients are means already.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None and not hasattr(p, "full_tensor")]
    for gradient in gradients:
        gradient /= world_size
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def largest(value: int) -> int:
    """The largest `value` of all ranks."""
    return max(gather(value))
