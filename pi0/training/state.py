"""Everything that decides how training goes on, as files of a checkpoint.

policy/               the averaged policy, which acts and is scored; `PI0Policy.from_pretrained` loads it
training.safetensors  the weights in training, without frozen ones
optimizer.pt          optimizer and schedule
run.json              steps done, metrics, evaluations
rank0.pt ...          of each rank: random states, sampler position, statistics, replayed chunks
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pi0 import PI0Policy
from pi0.base.errors import CheckpointError
from pi0.base.files import write_json
from pi0.model.network import Pi0Network
from pi0.policy.folder import pair, read_header, write_tensors
from pi0.ranks.sharding import load_optimizer, load_weights, whole_on_rank_zero
from pi0.ript.cfg_adapter import WeightedChunks
from pi0.training.checkpoint_store import load_state, save_state
from pi0.training.ema import AveragedPolicy
from pi0.training.random_state import random_states, restore_random_states


class Sampler(Protocol):
    """Whoever decides which states practise next."""

    def state_dict(self) -> dict:
        """Its position and memory."""

    def load_state_dict(self, states: list[dict], dealt_anew: bool) -> None:
        """Go on from this rank's state, or from those of all ranks of before where states are dealt anew."""


@dataclass
class TrainingState:
    """The live objects of a run, and what they have done.

    Attributes:
        generator: of augmentation and flow noise.
        replay: chunks of the last iterations, None for one that taught nothing.
        step: iterations done.
        history: metrics of each iteration.
        facts: what a resumed run needs to know besides, JSON only.
    """

    policy: PI0Policy
    average: AveragedPolicy
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    sampler: Sampler
    replay: list[WeightedChunks | None] = field(default_factory=list)
    step: int = 0
    history: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Success rate after `step` iterations, if it was evaluated then."""
        return {entry["step"]: entry["success_rate"] for entry in self.evaluations}.get(self.step)

    def of_rank(self) -> dict:
        """This rank's own part, copied; the rest changes in updates alone."""
        return {
            "random": random_states(),
            "generator": self.generator.get_state(),
            "sampler": copy.deepcopy(self.sampler.state_dict()),
            "replay": [None if chunks is None else chunks.state_dict() for chunks in self.replay],
        }

    def write(self, folder: Path, rank: int, world_size: int, of_rank: dict) -> None:
        """Write this rank's files, and on rank 0 the shared ones, into `folder`.

        Args:
            of_rank: `of_rank()` at the end of the last finished iteration.
        Raises:
            CheckpointError, OSError: the disk refuses.
        """
        network = self.policy.network
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        trained = {name: t for name, t in network.state_dict().items() if name not in frozen}
        weights, optimizer = whole_on_rank_zero(trained), whole_on_rank_zero(self.optimizer.state_dict())
        save_state(folder / f"rank{rank}.pt", of_rank)
        if rank > 0:
            return
        self.average.policy.save_pretrained(folder / "policy")
        write_tensors(folder / "training.safetensors", weights)
        states = {"optimizer": optimizer, "schedule": self.schedule.state_dict()}
        save_state(folder / "optimizer.pt", states)
        run = {name: getattr(self, name) for name in ("step", "history", "evaluations", "facts")}
        write_json(folder / "run.json", {**run, "world_size": world_size})

    def read(self, folder: Path, rank: int, world_size: int, seed: int) -> str | None:
        """Become what was written to `folder`; returns what had to be dealt anew, for another number of ranks.

        Args:
            seed: of the run; decides the random streams where they cannot go on.
        Raises:
            CheckpointError: a file is damaged or of another policy.
        """
        run = json.loads((folder / "run.json").read_text())
        self.step, self.history = run["step"], run["history"]
        self.evaluations, self.facts = run["evaluations"], run["facts"]
        weights = load_file(folder / "training.safetensors")
        trained = {name for name, p in self.policy.network.named_parameters() if p.requires_grad}
        if missing := sorted(trained - weights.keys()):
            raise CheckpointError(
                f"{folder}: training.safetensors has no {missing[0]} and {len(missing) - 1} others that this run "
                "trains; resume with the same training.trainable"
            )
        _copy_weights(folder / "policy", self.average.policy.network)
        load_weights(self.policy.network, weights)
        states = load_state(folder / "optimizer.pt")
        load_optimizer(self.optimizer, states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        if run["world_size"] == world_size:
            own = load_state(folder / f"rank{rank}.pt")
            self.sampler.load_state_dict([own["sampler"]], dealt_anew=False)
            self.generator.set_state(own["generator"])
            self.replay = [
                None if part is None else WeightedChunks.from_state(part) for part in own["replay"]
            ]
            restore_random_states(own["random"])
            return None
        everybody = [load_state(folder / f"rank{number}.pt") for number in range(run["world_size"])]
        self.sampler.load_state_dict([other["sampler"] for other in everybody], dealt_anew=True)
        self.generator.manual_seed(seed + 1_000_003 * rank + 7_919 * self.step)
        share = [other["replay"] for number, other in enumerate(everybody) if number % world_size == rank]
        # From the newest back: a rank that has joined later has fewer.
        newest_first = itertools.zip_longest(*(replay[::-1] for replay in share))
        self.replay = [_joined(parts) for parts in newest_first][::-1]
        return (
            f"written by {run['world_size']} processes, read by {world_size}: states, statistics and replayed "
            "chunks are dealt anew, random streams start from the seed and the step"
        )


def _copy_weights(checkpoint: Path, network: Pi0Network) -> None:
    """Copy a checkpoint into a network, whose memory and types stay: there may be no room for another of its size."""
    parameters = dict(network.named_parameters())
    header = read_header(checkpoint)
    names = pair(header, {name: parameter.shape for name, parameter in parameters.items()})
    with safe_open(header.path, framework="pt") as file:  # mapped, so that one tensor at a time is read
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(header.keys[names[name]]))


def _joined(parts: tuple[dict | None, ...]) -> WeightedChunks | None:
    filled = [WeightedChunks.from_state(part) for part in parts if part is not None]
    return WeightedChunks.cat(filled) if filled else None
