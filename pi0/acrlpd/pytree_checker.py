"""Checks of trees of state: nested dictionaries, lists and tuples with tensors and plain values at their leaves.

Each check returns findings, a line each, with the path of the leaf (`pi0_opt_state.state.3.exp_avg`); none means that
all is well. A finding that begins with `NOTE` is worth knowing, and no fault. `require_sound` raises for the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pi0.base.errors import CheckpointError
from pi0.base.tensors import count_not_finite

Tree = Any
NOTE = "note: "
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
# By so much of its size a weight may differ from its average without moving it, at most.
STANDSTILL = 0.01
_PLAIN = (bool, int, float, str, type(None), Mapping, list, tuple)


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a tree with its path below `path`; an empty dictionary, list or tuple is a leaf too."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        inside = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        inside = list(enumerate(tree))
    if not inside:
        yield path, tree
    for key, value in inside:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def diagnose_pytree_structure(tree: Mapping[str, Tree]) -> list[str]:
    """Faults of a tree by itself: numbers that are not finite, what no checkpoint can hold, memory of two parts.

    Args:
        tree: parts by name. Two parts must not share memory, as an average would that is the trained weights; within
            a part weights may be tied.
    """
    findings, spans = [], []
    for path, leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            local = _local(leaf)
            if bad := _not_finite(local):
                findings.append(f"{path} holds {bad} values that are not finite")
            if local.numel() and not local.is_meta:
                spans.append((*_span(local), path))
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            findings.append(f"{path} is {leaf}")
        elif not isinstance(leaf, _PLAIN):
            findings.append(f"{path} is a {type(leaf).__name__}; a checkpoint holds tensors and plain values")
    ends: dict[str, tuple[int, str]] = {}  # of each part, the leaf that reaches furthest
    for start, end, path in sorted(spans):
        part = path.partition(".")[0]
        shared = [of for name, (reach, of) in ends.items() if name != part and reach > start]
        findings += [f"{path} and {other} share their memory" for other in shared]
        ends[part] = max(ends.get(part, (0, "")), (end, path))
    return findings


def check_pytree_leaf_dtypes(
    tree: Mapping[str, Tree], decays: Mapping[str, float] | None = None
) -> list[str]:
    """Types that weights cannot have, and averages that are too coarse to move.

    An average `a` that moves by `(1 - decay) * (w - a)` towards a weight `w` stands still where that step is less than
    half the distance between neighbouring numbers: where |w - a| < |a| * eps / (2 * (1 - decay)).

    Args:
        tree: parts by name, whose leaves are weights.
        decays: share that an update keeps, for those parts that are averages.
    """
    findings = []
    for path, leaf in leaves(tree):
        if not isinstance(leaf, Tensor):
            continue
        decay = (decays or {}).get(path.partition(".")[0], 0.0)
        if leaf.dtype not in WEIGHTS:
            if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
                findings.append(f"{path} is {_name(leaf.dtype)}; weights are float32, bfloat16 or float16")
        elif decay < 1 and (near := torch.finfo(leaf.dtype).eps / (2 * (1 - decay))) > STANDSTILL:
            findings.append(
                f"{path} is {_name(leaf.dtype)}: an average that keeps {decay} stands still unless the weight differs "
                f"by {near:.0%} of its size; keep it in float32"
            )
    return findings


def compare_pytree_structures(
    expected: Tree, found: Tree, name: str = "", same_types: bool = True
) -> list[str]:
    """Leaves that are missing, surplus, or of another kind, shape or type.

    Args:
        expected, found: the trees; values are not compared.
        name: path of both.
        same_types: types of numbers must be equal, too.
    """
    wanted, given = dict(leaves(expected, name)), dict(leaves(found, name))
    findings = [f"{path} is missing" for path in wanted if path not in given]
    findings += [f"{path} is surplus" for path in given if path not in wanted]
    for path, one in wanted.items():
        if path not in given:
            continue
        other = given[path]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape:
                findings.append(f"{path} has the shape {list(other.shape)}, expected {list(one.shape)}")
            elif same_types and one.dtype != other.dtype:
                findings.append(f"{path} is {_name(other.dtype)}, expected {_name(one.dtype)}")
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
            findings.append(f"{path} is a {type(other).__name__}, expected a {type(one).__name__}")
    return findings


def check_optimizer_consistency(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    name: str = "optimizer",
    state: Mapping[str, Any] | None = None,
) -> list[str]:
    """Whether an optimizer trains exactly some parameters, and whether a state is theirs.

    Args:
        optimizer: the optimizer.
        parameters: what it must train, by name.
        name: path of its state.
        state: `state_dict()` that is to be loaded into it; None: the state that it has.
    """
    names = {id(parameter): key for key, parameter in parameters.items()}
    findings: list[str] = []
    held: dict[int, Tensor] = {}  # by the number that a state dict gives it
    numbers: dict[int, int] = {}
    for group, content in enumerate(optimizer.param_groups):
        for weight in content["params"]:
            if id(weight) in numbers:
                findings.append(f"{name}.param_groups.{group} holds {_label(weight, names)} a second time")
                continue
            numbers[id(weight)] = len(held)
            held[len(held)] = weight
            if id(weight) not in names:
                findings.append(
                    f"{name}.param_groups.{group} trains {_label(weight, names)}, none of its weights"
                )
    findings += [f"{name} does not train {key}" for key, p in parameters.items() if id(p) not in numbers]
    kept: list[tuple[Any, Any]]
    if state is None:
        kept = [(numbers.get(id(weight)), values) for weight, values in optimizer.state.items()]
        foreign = [w for w in optimizer.state if id(w) not in numbers]
        findings += [
            f"{name}.state holds moments of {_label(w, names)}, which no group holds" for w in foreign
        ]
    else:
        if missing := {"state", "param_groups"} - set(state):
            return [*findings, f"{name}.{min(missing)} is missing"]
        kept = list(state["state"].items())
        findings += _groups_findings(state, optimizer, name)
    findings += _moments_findings(kept, held, names, name)
    return findings


def validate_fsdp_compatibility(
    module: nn.Module, blocks: Sequence[nn.Module] = (), ranks: int = 1
) -> list[str]:
    """What FSDP2 refuses to shard of a module that is whole, or what is whole in one that is sharded.

    FSDP2 takes frozen and trained weights in one group. It refuses trained weights of several types there, at the
    first forward pass. A weight with fewer rows than ranks is only noted: some ranks then hold nothing of it.

    Args:
        module: the module, before or after `pi0.ranks.sharding.shard`.
        blocks: its shard groups, as for `shard`; what none of them has is the last group.
        ranks: over which it is sharded.
    """
    named = dict(module.named_parameters())
    findings = [
        f"{name} is {_name(weight.dtype)}; FSDP2 shards floats"
        for name, weight in named.items()
        if not weight.dtype.is_floating_point
    ]
    if any(_is_shard(weight) for weight in named.values()):
        for name, weight in named.items():
            if not _is_shard(weight):
                how = "trained, but" if weight.requires_grad else "frozen and"
                findings.append(f"{name} is {how} whole on each rank, while other weights are shards")
    else:
        for name, weight in named.items():
            if weight.ndim == 0:
                findings.append(f"{name} is a single number, which FSDP2 refuses; give it one dimension")
            elif not weight.is_contiguous():
                findings.append(f"{name} is not contiguous, which FSDP2 refuses")
        findings += _groups_that_fsdp_refuses(module, blocks)
    for name, weight in named.items():
        if weight.ndim and weight.shape[0] < ranks:
            rows = f"{weight.shape[0]} row" + "s" * (weight.shape[0] != 1)
            findings.append(f"{NOTE}{name} has {rows} for {ranks} ranks, so some hold nothing of it")
    return findings


def require_sound(findings: Sequence[str], what: str, mend: str) -> None:
    """Print notes, and raise `CheckpointError` if there is any other finding.

    Args:
        findings: of the checks.
        what: was checked.
        mend: what to do about a fault.
    """
    faults = [finding for finding in findings if not finding.startswith(NOTE)]
    for finding in findings:
        if finding.startswith(NOTE):
            print(f"{what}: {finding.removeprefix(NOTE)}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{what}: {faults[0]}{more}; {mend}")


def _groups_findings(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, name: str) -> list[str]:
    """Groups of a state dict that are not those of the optimizer."""
    found = [list(group["params"]) for group in state["param_groups"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    findings = []
    if [len(group) for group in found] != sizes:
        findings.append(
            f"{name}.param_groups holds {[len(group) for group in found]} parameters, expected {sizes}"
        )
    counts = Counter(number for group in found for number in group)
    findings += [
        f"{name}.param_groups holds parameter {n} {times} times" for n, times in counts.items() if times > 1
    ]
    unknown = [number for number in state["state"] if number not in counts]
    return findings + [f"{name}.state.{n} is of a parameter that no group holds" for n in unknown]


def _moments_findings(
    kept: Sequence[tuple[Any, Any]], held: Mapping[int, Tensor], names: Mapping[int, str], name: str
) -> list[str]:
    """Moments that are not like their parameter, and counts of steps that differ."""
    findings, steps = [], {}
    for number, values in kept:
        weight = held.get(number)
        if weight is None:
            continue
        for key, value in values.items():
            path = f"{name}.state.{number}.{key}"
            if key == "step":
                steps[path] = float(value)
            if not isinstance(value, Tensor):
                continue
            if bad := _not_finite(_local(value)):
                findings.append(f"{path} holds {bad} values that are not finite")
            if key == "step" or value.ndim == 0:
                continue
            label = _label(weight, names)
            if value.shape != weight.shape:
                findings.append(f"{path} has the shape {list(value.shape)}, {label} has {list(weight.shape)}")
            elif value.dtype != weight.dtype:
                findings.append(f"{path} is {_name(value.dtype)}, {label} is {_name(weight.dtype)}")
    if len(set(steps.values())) > 1:
        ((usual, _),) = Counter(steps.values()).most_common(1)
        findings += [
            f"{path} is {count:.0f}, others are {usual:.0f}"
            for path, count in steps.items()
            if count != usual
        ]
    return findings


def _groups_that_fsdp_refuses(module: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    labels = {id(part): label for label, part in module.named_modules()}
    findings, taken = [], set()
    for block in [*blocks, module]:
        label = labels.get(id(block)) or "the rest"
        if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            findings.append(f"{label} is a {type(block).__name__}, which FSDP2 refuses; shard its members")
        own = [weight for weight in block.parameters() if id(weight) not in taken]
        taken |= {id(weight) for weight in own}
        types = sorted({_name(weight.dtype) for weight in own if weight.requires_grad})
        if len(types) > 1:
            findings.append(
                f"{label} trains weights of {' and '.join(types)} in one shard group, which FSDP2 refuses"
            )
    return findings


def _label(weight: Tensor, names: Mapping[int, str]) -> str:
    return names.get(id(weight)) or f"a tensor of shape {list(weight.shape)}"


def _is_shard(tensor: Tensor) -> bool:
    # A DTensor; to import that class only for this question would take a second and a half.
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    detached = tensor.detach()
    return detached.to_local() if _is_shard(detached) else detached


def _not_finite(tensor: Tensor) -> int:
    return count_not_finite(tensor) if tensor.is_floating_point() and not tensor.is_meta else 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's memory, and the one after its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
