"""Where the memory of a run goes: of the process at named moments, and of the agent's state by its parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pi0 import pick_device
from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader
from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.checkpointing import optimizers
from pi0.acrlpd.pytree_checker import Tree, leaves
from pi0.acrlpd.replay import ReplayBuffer
from pi0.training.memory import MemoryNow, bytes_held, memory_now


class GPUMemoryMonitor:
    """Memory of this rank, in the computer and, if there is one, on its GPU.

    Attributes:
        moments: name and memory of each moment that was asked for, in order.
        parts: bytes of each part of the state, as they were last analysed.

    Args:
        device: where the networks are; auto: the GPU if there is one.
    """

    def __init__(self, device: torch.device | str = "auto"):
        self.device = pick_device(str(device))
        self.moments: list[tuple[str, MemoryNow]] = []
        self.parts: dict[str, int] = {}

    def checkpoint_memory(self, name: str) -> MemoryNow:
        """Remember the memory of this moment under a name."""
        self.moments.append((name, memory_now(self.device)))
        return self.moments[-1][1]

    def analyze_train_state_memory(
        self, agent: ACRLPDPi0Agent, loader: ACRLPDDataLoader | None = None
    ) -> dict[str, int]:
        """Bytes on this rank of each part of the state; of a shard, what lies here. Memory of two parts counts once.

        Returns:
            weights: of the actor and the critics in training, frozen ones too.
            averages: of both, without frozen weights, which they share.
            target: of the target critics.
            features: what critics see observations with.
            gradients: 0 between updates.
            moments: of the optimizers; 0 before the first update.
            buffer: episodes and their windows.
            caches: inputs, features and candidate chunks of their observations.
        """
        trained = [agent.pi0_model, agent.critic_networks]
        moments = [optimizer.state for optimizer, _ in optimizers(agent).values()]
        held: dict[str, list[Tensor]] = {
            "weights": [*_weights(trained), agent.log_temperature],
            "averages": _weights([agent.pi0_ema, agent.critic_ema]),
            "target": _weights([agent.target_critic]),
            "features": _weights([agent.features]),
            "gradients": [
                weight.grad for weight in _weights([*trained, agent.features]) if weight.grad is not None
            ],
            "moments": _tensors([list(state.values()) for state in moments]),
            "buffer": [],
            "caches": [],
        }
        for own in vars(loader).values() if loader is not None else ():
            if isinstance(own, ReplayBuffer) and len(own):
                held["buffer"] += _tensors([own.state_dict(), vars(own.windows), own.states])
            elif isinstance(own, ObservationCaches):
                held["caches"] += _tensors([own.inputs, own.features, own.candidates])
        counted: set[int] = set()
        self.parts = {name: bytes_held(tensors, counted) for name, tensors in held.items()}
        return self.parts

    def get_memory_report(self) -> str:
        """A table of the moments, and a line of the parts."""
        rows = [["", "resident", "change", "peak", "on the GPU", "reserved", "peak"]]
        before = None
        for name, now in self.moments:
            change = "" if before is None else f"{now.resident - before.resident:+.1f} MB"
            numbers = (now.resident, now.peak, now.gpu, now.gpu_reserved, now.gpu_peak)
            resident, *rest = ("-" if value is None else f"{value:.1f} MB" for value in numbers)
            rows.append([name, resident, change, *rest])
            before = now
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *([f"state: {self.parts_line()}"] if self.parts else [])])

    def parts_line(self) -> str:
        """The parts that take memory, with their sum."""
        each = [f"{name} {size / 1e6:.1f} MB" for name, size in self.parts.items() if size]
        return f"{', '.join(each)}; together {sum(self.parts.values()) / 1e6:.1f} MB"


def log_memory_usage(label: str, monitor: GPUMemoryMonitor | None = None) -> MemoryNow:
    """Print the memory of this moment; a monitor remembers it, so the next line says what has changed."""
    monitor = monitor or GPUMemoryMonitor()
    before = monitor.moments[-1] if monitor.moments else None
    now = monitor.checkpoint_memory(label)
    change = "" if before is None else f", {now.resident - before[1].resident:+.1f} MB since {before[0]}"
    gpu = "" if now.gpu is None else f", on the GPU {now.gpu:.1f} MB, at most {now.gpu_peak:.1f} MB"
    print(f"memory, {label}: {now.resident:.1f} MB resident{change}{gpu}")
    return now


def enable_memory_monitoring(
    agent: ACRLPDPi0Agent, loader: ACRLPDDataLoader | None = None, device: torch.device | str = "auto"
) -> GPUMemoryMonitor:
    """A monitor that begins now; it prints what the state takes."""
    monitor = GPUMemoryMonitor(device)
    log_memory_usage("start", monitor)
    monitor.analyze_train_state_memory(agent, loader)
    print(f"state on this rank: {monitor.parts_line()}")
    return monitor


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]
