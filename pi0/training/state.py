"""The state of a run between two iterations, as named parts, and as files of a checkpoint.

A shared part is the same on all ranks (weights, optimizer) and has its own file or folder. An own part differs
between ranks (random streams, the rank's place in the data):

    NAME.safetensors      the trained weights of a module (`Weights`)
    NAME.pt               other states (`States`)
    NAME/                 a part that is saved as a folder (such as `pi0.training.saved_policy.SavedPolicy`)
    run.json              iterations done, metrics, evaluations, facts
    rank0.pt ...          each rank's own parts
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from pi0.base.errors import CheckpointError, attempt
from pi0.base.files import write_json
from pi0.base.tensors import write_tensors
from pi0.ranks.collectives import gather, on_rank_zero, rank_and_world_size
from pi0.ranks.sharding import load_optimizer, load_weights, whole_on_rank_zero
from pi0.training.checkpoint_store import CheckpointStore, load_state, save_state


@dataclass(frozen=True)
class Place:
    """A rank of a resumed run: its number, the number of ranks, and the iterations done."""

    rank: int
    world_size: int
    step: int


class OwnPart(Protocol):
    """A part that each rank has for itself."""

    def state_dict(self) -> Any:
        """Its state: a copy that does not change later, and that `torch.load(weights_only=True)` can read."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state_dict()`."""

    def join_state_dicts(self, states: list[Any], place: Place) -> None:
        """Continue from the states of all earlier ranks, by rank, when the number of ranks has changed."""


class SharedPart(Protocol):
    """A part that is the same on all ranks."""

    def whole_state(self) -> Any:
        """Its state, whole on rank 0; all ranks call it together."""

    def write(self, folder: Path, name: str, state: Any) -> None:
        """Write a whole state as the file or folder `name` in `folder`; only rank 0 calls it."""

    def read(self, folder: Path, name: str) -> None:
        """Continue from what `write` wrote; every rank calls it."""


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights of a module and its buffers, by name; shards stay shards."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


class Weights:
    """The trained weights of a module, as NAME.safetensors; the file is whole, also for a sharded module.

    Args:
        module: the module.
        mend: advice to the user if the file lacks weights that the module trains.
    """

    def __init__(self, module: nn.Module, mend: str):
        self._module = module
        self._mend = mend

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The trained weights and the buffers."""
        return whole_on_rank_zero(trained_state(self._module))

    def write(self, folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
        """Write the weights."""
        write_tensors(folder / f"{name}.safetensors", state)

    def read(self, folder: Path, name: str) -> None:
        """Load the weights into the module.

        Raises:
            CheckpointError: the file lacks weights that the module trains.
        """
        weights = load_file(folder / f"{name}.safetensors")
        trained = {key for key, parameter in self._module.named_parameters() if parameter.requires_grad}
        if missing := sorted(trained - weights.keys()):
            raise CheckpointError(
                f"{folder}: {name}.safetensors lacks {missing[0]} and {len(missing) - 1} others that this run "
                f"trains; {self._mend}"
            )
        load_weights(self._module, weights)


class States:
    """States of an optimizer, a schedule and the like, as NAME.pt.

    Args:
        parts: objects with `state_dict` and `load_state_dict`, by name; an optimizer may belong to a sharded module.
    """

    def __init__(self, **parts: Any):
        self._parts = parts

    def whole_state(self) -> dict[str, Any]:
        """The states by name."""
        return whole_on_rank_zero({name: part.state_dict() for name, part in self._parts.items()})

    def write(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """Write the states."""
        save_state(folder / f"{name}.pt", state)

    def read(self, folder: Path, name: str) -> None:
        """Restore the states."""
        states = load_state(folder / f"{name}.pt")
        for key, part in self._parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, states[key])
            else:
                part.load_state_dict(states[key])


@dataclass(frozen=True)
class FinishedIteration:
    """The end of an iteration. A checkpoint of it can be made until an update changes the weights.

    Attributes:
        step: iterations done.
        own: the states of this rank's own parts at that time. They change during rollouts; shared parts change only
            in updates and need no copy.
    """

    step: int
    own: Mapping[str, Any]


class TrainingState:
    """The parts of a run, and what it has done.

    Attributes:
        shared, own: parts by name; they may be added when they are made.
        step: iterations done.
        history: metrics of each iteration.
        evaluations: scores of the policy during training, each with its `step` and its `scored_by`.
        scored_by: name of the score by which checkpoints are compared.
        facts: other values that a resumed run needs, JSON only.
        last: the last finished iteration; None before the first has begun.
        weights_moved: an update has begun since then, so there is nothing whole to save.
    """

    def __init__(self) -> None:
        self.shared: dict[str, SharedPart] = {}
        self.own: dict[str, OwnPart] = {}
        self.step = 0
        self.history: list[dict] = []
        self.evaluations: list[dict] = []
        self.scored_by = "success_rate"
        self.facts: dict[str, Any] = {}
        self.last: FinishedIteration | None = None
        self.weights_moved = False

    @property
    def can_be_saved(self) -> bool:
        """Whether a checkpoint can be made now."""
        return self.last is not None and not self.weights_moved

    @property
    def score(self) -> float | None:
        """The policy's score after `step` iterations, if it was evaluated then."""
        return {entry["step"]: entry[self.scored_by] for entry in self.evaluations}.get(self.step)

    def begin(self) -> None:
        """Note that all parts are present and whole, as after `step` iterations."""
        self.last = FinishedIteration(self.step, {name: part.state_dict() for name, part in self.own.items()})
        self.weights_moved = False

    def begin_update(self) -> None:
        """Note that an update begins to change the weights."""
        self.weights_moved = True

    def finish_iteration(self, metrics: dict) -> None:
        """Note that an iteration is done and all parts are whole."""
        self.history.append(metrics)
        self.step += 1
        self.begin()

    def write(self, folder: Path, rank: int, world_size: int) -> None:
        """Write this rank's files, and on rank 0 the shared ones, into `folder`; all ranks call it together.

        Raises:
            CheckpointError, OSError: the disk refuses.
        """
        assert self.last is not None, "begin() first"
        states = {name: part.whole_state() for name, part in self.shared.items()}
        save_state(folder / f"rank{rank}.pt", dict(self.last.own))
        if rank > 0:
            return
        for name, part in self.shared.items():
            part.write(folder, name, states[name])
        run = {name: getattr(self, name) for name in ("step", "history", "evaluations", "facts")}
        write_json(folder / "run.json", {**run, "world_size": world_size})

    def read(self, folder: Path, rank: int, world_size: int) -> str | None:
        """Restore what was written to `folder`; returns what had to be distributed again for another number of ranks.

        `history` and `evaluations` stay the same lists, with other content.

        Raises:
            CheckpointError: a file is damaged or belongs to another run.
        """
        run = json.loads((folder / "run.json").read_text())
        self.step, self.facts = run["step"], run["facts"]
        self.history[:], self.evaluations[:] = run["history"], run["evaluations"]
        for name, shared in self.shared.items():
            shared.read(folder, name)
        if run["world_size"] == world_size:
            state = load_state(folder / f"rank{rank}.pt")
            for name, own in self.own.items():
                own.load_state_dict(state[name])
            self.begin()
            return None
        states = [load_state(folder / f"rank{number}.pt") for number in range(run["world_size"])]
        for name, own in self.own.items():
            own.join_state_dicts([state[name] for state in states], Place(rank, world_size, self.step))
        self.begin()
        return (
            f"written by {run['world_size']} processes, read by {world_size}: states, statistics and replayed "
            "chunks are distributed again, random streams start from the seed and the step"
        )


def write_checkpoint(store: CheckpointStore, state: TrainingState) -> str | None:
    """Make a checkpoint of the last finished iteration; returns the reason of a failure, or None.

    All ranks call it together.
    """
    step = state.step
    if problem := on_rank_zero(attempt, store.begin, step):
        return problem
    written = attempt(state.write, store.temporary(step), *rank_and_world_size())
    if problem := next((text for text in gather(written) if text is not None), None):
        on_rank_zero(store.abandon, step)
        return problem
    return on_rank_zero(attempt, store.seal, step, state.score, state.facts)
