"""Checkpoints of an agent and its data, what must fit before one is loaded, and the actor alone in openpi's layout.

A checkpoint is a folder of `pi0.training.checkpoint_store`, whose files `pi0.training.state` describes. Its parts are
named here, for the trainer and for those who use the agent without it. Only safetensors, JSON and tensors are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.actor import Actor, Pi0Actor
from pi0.acrlpd.pytree_checker import (
    check_optimizer_consistency,
    check_pytree_leaf_dtypes,
    compare_pytree_structures,
    diagnose_pytree_structure,
    require_sound,
    validate_fsdp_compatibility,
)
from pi0.base.errors import CheckpointError
from pi0.policy.folder import read_header
from pi0.policy.tensor_names import OPENPI
from pi0.ranks.collectives import on_rank_zero, rank_and_world_size
from pi0.training.checkpoint_store import CheckpointStore, load_state
from pi0.training.random_state import OwnStream
from pi0.training.run_folder import differences
from pi0.training.state import States, TrainingState, Weights, trained_state, write_checkpoint

if (
    TYPE_CHECKING
):  # openpi's environment (tools/check_upstream.py) has no simulator, whose rollouts the loader knows
    from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader
    from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent

FORMAT = 1
METADATA = "acrlpd"  # name of the metadata among a checkpoint's facts
AVERAGES = {
    "pi0_ema_params": "pi0_params",
    "critic_ema_params": "critic_params",
    "target_critic_params": "critic_params",
}
_ENDS = 4096  # numbers of a weight that its hash sees from either end
# Metadata that may differ: what a checkpoint is of, not what it fits.
_FREE = ("step", "epoch", "data")
_OTHER_POLICY = "it is a checkpoint of another policy: begin with the policy folder that it began with"
_OTHER_CHUNKS = "it is a checkpoint of critics of other chunks: make the agent for these"
_MENDS = {
    "format": "another version of this program wrote it: load it with that version, or start a new run",
    "critics": "it is a checkpoint of other critics: make the agent with critics of these sizes",
    "features": "its critics see features of another policy: begin with the policy folder that it began with",
    "horizon_length": _OTHER_CHUNKS,
    "real_action_dim": _OTHER_CHUNKS,
    "actor": _OTHER_POLICY,
    "learned_temperature": "give or leave out the optimizer of the temperature (acrlpd.divergence)",
    "use_ema": "make the agent with this use_ema (acrlpd.use_ema)",
    "optimizers": "make the same optimizers (training.optimizer.type)",
}

# What a checkpoint holds


def networks(agent: ACRLPDPi0Agent) -> dict[str, nn.Module]:
    """The modules whose trained weights a checkpoint holds, by part."""
    found: dict[str, nn.Module] = {
        "pi0_params": _network(agent.pi0_model),
        "pi0_ema_params": _network(agent.pi0_ema),
        "critic_params": agent.critic_networks,
        "critic_ema_params": agent.critic_ema,
        "target_critic_params": agent.target_critic,
    }
    if any(weight.requires_grad for weight in agent.features.parameters()):
        found["feature_params"] = agent.features
    return found


def optimizers(agent: ACRLPDPi0Agent) -> dict[str, tuple[torch.optim.Optimizer, dict[str, Tensor]]]:
    """The optimizers that the agent has, by part, each with the weights that it must train by name."""
    of_features = {f"features.{name}": weight for name, weight in agent.features.named_parameters()}
    trains: dict[str, dict[str, Tensor]] = {
        "pi0_opt_state": dict(_network(agent.pi0_model).named_parameters()),
        "critic_opt_state": {**dict(agent.critic_networks.named_parameters()), **of_features},
        "temp_opt_state": {"log_temperature": agent.log_temperature},
    }
    return {
        name: (optimizer, {key: weight for key, weight in weights.items() if weight.requires_grad})
        for name, weights in trains.items()
        if (optimizer := getattr(agent, name)) is not None
    }


def name_parts(
    state: TrainingState,
    agent: ACRLPDPi0Agent,
    loader: ACRLPDDataLoader | None,
    noise: OwnStream,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Name what a checkpoint holds.

    Args:
        state: gets the parts.
        agent: weights, averages, targets, optimizers.
        loader: episodes, candidate chunks, and the order of windows; None: none of these.
        noise: the agent's random stream.
        schedule: of the actor's learning rate.
    """
    mend = "load it into an agent with the same policy and critics"
    state.shared = {name: Weights(module, mend) for name, module in networks(agent).items()}
    beside: dict[str, dict[str, Any]] = {
        "pi0_opt_state": {"schedule": schedule} if schedule is not None else {},
        "temp_opt_state": {"temperature": nn.ParameterList([agent.log_temperature])},
    }
    for name, (optimizer, _) in optimizers(agent).items():
        state.shared[name] = States(optimizer=optimizer, **beside.get(name, {}))
    state.own = {"generator": noise}
    if loader is not None:
        state.own["data"] = loader


def create_checkpoint_metadata(
    agent: ACRLPDPi0Agent, loader: ACRLPDDataLoader | None = None, step: int = 0, epoch: int = 0
) -> dict[str, Any]:
    """What an agent is built of, as JSON holds it; `validate_checkpoint_compatibility` compares it.

    Args:
        agent: the agent.
        loader: None: the checkpoint holds no episodes.
        step, epoch: how far it is.
    """
    actor = agent.pi0_model
    built: dict[str, Any] = {
        "type": type(actor).__name__,
        "chunk": actor.chunk,
        "action_dim": actor.action_dim,
    }
    if isinstance(actor, Pi0Actor):
        built |= actor.policy.saved_config.to_dict()
        del built["tokenizer_path"]  # it decides no action
    content = {  # in the order in which it is compared: what explains a difference comes before it
        "format": FORMAT,
        "learned_temperature": agent.temp_opt_state is not None,
        "use_ema": agent.use_ema,
        "actor": built,
        "horizon_length": agent.horizon_length,
        "real_action_dim": agent.real_action_dim,
        "critics": agent.critic_networks.sizes,
        "features": _fingerprint(agent.features),
        "optimizers": {name: type(optimizer).__name__ for name, (optimizer, _) in optimizers(agent).items()},
        "step": step,
        "epoch": epoch,
        "data": loader is not None,
    }
    return json.loads(json.dumps(content))  # as it will be read back


# What must fit


def validate_checkpoint_compatibility(
    metadata: Mapping[str, Any], agent: ACRLPDPi0Agent, where: str | Path = "checkpoint"
) -> None:
    """Compare the metadata of a checkpoint with an agent; nothing of the checkpoint is loaded.

    Raises:
        CheckpointError: they differ; the message names the key, both values and the mend.
    """
    now = {key: value for key, value in create_checkpoint_metadata(agent).items() if key not in _FREE}
    if found := differences(metadata, now):
        key, was, is_now = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        mend = _MENDS[key.partition(".")[0]]
        raise CheckpointError(f"{where}: {key} was {was!r} and is {is_now!r}{more}; {mend}")


def check_agent(agent: ACRLPDPi0Agent) -> list[str]:
    """Findings of all checks of `pytree_checker` in an agent as it is."""
    modules = networks(agent)
    averages = AVERAGES if agent.use_ema else {"target_critic_params": AVERAGES["target_critic_params"]}
    kept = {
        name: trained_state(module)
        for name, module in modules.items()
        if name in averages or name not in AVERAGES
    }
    decays = {
        "pi0_ema_params": agent.pi0_ema_decay,
        "critic_ema_params": agent.critic_ema_decay,
        "target_critic_params": 1 - agent.target_update_rate,
    }
    findings = diagnose_pytree_structure(kept) + check_pytree_leaf_dtypes(kept, decays)
    for average, trained in averages.items():  # an average may have a wider type
        findings += compare_pytree_structures(kept[trained], kept[average], average, same_types=False)
    for name, (optimizer, parameters) in optimizers(agent).items():
        findings += check_optimizer_consistency(optimizer, parameters, name)
    if any(hasattr(weight, "to_local") for weight in modules["pi0_params"].parameters()):
        findings += validate_fsdp_compatibility(modules["pi0_params"])
    return findings


def require_loadable(path: Path, agent: ACRLPDPi0Agent) -> dict[str, Any]:
    """Compare a checkpoint with the agent that it is to be loaded into; returns its metadata.

    Weights and moments are mapped, so this takes no memory.

    Raises:
        CheckpointError: it is of another agent, or a file of it is not what the agent needs.
    """
    metadata = CheckpointStore(path.parent, keep=1).facts(path).get(METADATA)
    if metadata is None:
        raise CheckpointError(
            f"{path} is no checkpoint of ACRLPD, or of a version before it had metadata; start a new run"
        )
    validate_checkpoint_compatibility(metadata, agent, path)
    findings: list[str] = []
    for name, module in networks(agent).items():
        file = path / f"{name}.safetensors"
        found = load_file(file) if file.is_file() else {}
        findings += compare_pytree_structures(trained_state(module), found, name)
    for name, (optimizer, parameters) in optimizers(agent).items():
        states = load_state(path / f"{name}.pt", mapped=True)
        findings += check_optimizer_consistency(optimizer, parameters, name, states.get("optimizer", {}))
    require_sound(findings, str(path), "use another checkpoint, or the policy and settings of this one")
    return metadata


# Checkpoints without a trainer


def save_acrlpd_checkpoint(
    folder: str | Path,
    agent: ACRLPDPi0Agent,
    loader: ACRLPDDataLoader | None = None,
    step: int = 0,
    epoch: int = 0,
    keep: int = 2,
) -> Path:
    """Save an agent and its data as `step-NNNNNN` in a folder of checkpoints; all ranks call it together.

    A checkpoint of a later step is removed, as `CheckpointStore.seal` says.

    Args:
        folder: of the checkpoints.
        agent: the agent.
        loader: its data; None: they are not saved.
        step: iterations done.
        epoch: passes done, as the caller counts them.
        keep: how many of the newest to keep.

    Returns:
        The checkpoint, for `load_acrlpd_checkpoint`.

    Raises:
        CheckpointError: the disk refuses; earlier checkpoints are unchanged.
    """
    state = TrainingState()
    name_parts(state, agent, loader, OwnStream(agent.generator, 0))
    state.step = step
    state.facts = {METADATA: create_checkpoint_metadata(agent, loader, step, epoch)}
    state.begin()
    store = CheckpointStore(Path(folder), keep)
    if problem := write_checkpoint(store, state):
        raise CheckpointError(problem)
    return store.path(step)


def load_acrlpd_checkpoint(
    path: str | Path, agent: ACRLPDPi0Agent, loader: ACRLPDDataLoader | None = None, seed: int = 0
) -> dict[str, Any]:
    """Load a checkpoint, of a run or of `save_acrlpd_checkpoint`; the next step is then the one that followed it.

    Args:
        path: the checkpoint.
        agent: built as the one that was saved, from the same policy folder.
        loader: gets the episodes, candidate chunks and the order of windows; None: they are left out.
        seed: of new random streams, if the number of ranks has changed.

    Returns:
        The metadata, with `step` and `epoch`.

    Raises:
        CheckpointError: the checkpoint is damaged, of another agent, or holds no episodes for the loader. Nothing has
            been loaded.
    """
    path = Path(path)
    if fault := on_rank_zero(CheckpointStore(path.parent, keep=1).verify, path):
        raise CheckpointError(f"{path}: {fault}; use an older checkpoint")
    metadata = require_loadable(path, agent)
    if loader is not None and not metadata["data"]:
        raise CheckpointError(f"{path} holds no episodes; load it without a data loader")
    state = TrainingState()
    name_parts(state, agent, loader, OwnStream(agent.generator, seed))
    if shared_out := state.read(path, *rank_and_world_size()):
        print(f"{path}: {shared_out}")
    return metadata


# The actor alone


def save_openpi_pi0_checkpoint(policy: PI0Policy, folder: str | Path, step: int) -> Path:
    """Write a policy as the policy folder `pi0_openpi_step_N`, with weights under openpi's names; rank 0 does.

    Low-rank additions, which openpi does not know, are merged into the weights of a copy. A policy that
    `load_pi0_weights_from_openpi` has read and nobody has changed is written byte by byte as it was.

    Args:
        policy: whole on rank 0.
        folder: where the policy folder comes to lie.
        step: N.

    Returns:
        The policy folder.

    Raises:
        CheckpointError: the policy has an optimality condition, for which openpi has no place, or a weight is not finite.
        OSError, OutputError: the disk refuses.
    """
    path = Path(folder) / f"pi0_openpi_step_{step}"
    if policy.config.guidance:
        raise CheckpointError(
            f"{path}: this policy has an optimality condition (guidance), for which openpi has no place; its policy "
            "folder has it"
        )
    if policy.config.gemma.lora_rank or policy.config.action_expert.lora_rank:
        policy = copy.deepcopy(
            policy
        )  # frozen weights of `PI0Policy.copy` are shared, and merging changes them
        policy.merge_lora()
    on_rank_zero(policy.save_pretrained, path)
    return path


def load_pi0_weights_from_openpi(path: str | Path, device: str | torch.device = "cpu") -> PI0Policy:
    """The policy of a folder with weights under openpi's names, in float32.

    Raises:
        FileNotFoundError, CheckpointError: as `PI0Policy.from_pretrained`; or the weights have another layout.
    """
    layout = read_header(path).layout
    if layout is not OPENPI:
        raise CheckpointError(
            f"{path} has the layout {layout.name}, not openpi's: PI0Policy.from_pretrained loads it, and "
            "python -m pi0.checkpoint convert translates it"
        )
    return PI0Policy.from_pretrained(path, device)


def _network(actor: Actor) -> nn.Module:
    """The module whose weights are an actor's."""
    return actor.policy.network if isinstance(actor, Pi0Actor) else actor  # type: ignore[return-value]


def _fingerprint(features: nn.Module) -> str:
    """A hash of those weights that are never trained: names, shapes, types, and both ends of each."""
    trained = {name for name, weight in features.named_parameters() if weight.requires_grad}
    digest = hashlib.sha256()
    for name, tensor in features.state_dict().items():
        if name in trained:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().flatten()
        for end in (flat[:_ENDS], flat[-_ENDS:]):
            digest.update(end.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
