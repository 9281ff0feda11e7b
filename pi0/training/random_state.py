"""The random states of this process: seeding, saving and restoring them."""

from __future__ import annotations

import random

import numpy as np
import torch

from pi0.base.errors import CheckpointError
from pi0.training.state import Place


def set_seed(seed: int) -> None:
    """Seed every global source of randomness in this process, and flush denormal numbers to zero.

    Denormal numbers, such as running means of an optimizer that decay to zero, make updates on a CPU several times
    slower.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)


def random_states() -> dict:
    """State of Python's and NumPy's global generators and of torch's on the CPU and every CUDA device.

    It does not include generators that the program has made.

    Returns:
        Only dictionaries, lists, tensors, numbers and strings, which `torch.load(weights_only=True)` reads.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": {"version": version, "words": list(words), "gauss": [] if gauss is None else [gauss]},
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Restore what `random_states` returned; the next draws are those that followed that call.

    Raises:
        CheckpointError: the number of CUDA devices was different; nothing has been restored.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) != devices:
        raise CheckpointError(
            f"the random states are of {len(states['cuda'])} CUDA devices and this process sees {devices}; "
            "resume with the same number (CUDA_VISIBLE_DEVICES)"
        )
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"]), *(python["gauss"] or [None])))
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if devices:
        torch.cuda.set_rng_state_all(states["cuda"])


class GlobalStreams:
    """The global random streams of this process, as a part of a checkpoint."""

    def state_dict(self) -> dict:
        """What `random_states` returns."""
        return random_states()

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        restore_random_states(state)

    def join_state_dicts(self, states: list[dict], place: Place) -> None:
        """With another number of ranks, keep the streams as they started from the run's seed."""


class OwnStream:
    """This rank's own generator, as a part of a checkpoint.

    Args:
        generator: a generator on the CPU.
        seed: the run's seed.
    """

    def __init__(self, generator: torch.Generator, seed: int):
        self._generator = generator
        self._seed = seed

    def start(self, rank: int, offset: int = 0) -> None:
        """Start the stream of a rank; another `offset` starts another stream."""
        self._generator.manual_seed(self._seed + 1_000_003 * rank + offset)

    def state_dict(self) -> torch.Tensor:
        """The generator's state."""
        return self._generator.get_state()

    def load_state_dict(self, state: torch.Tensor) -> None:
        """Restore the generator's state."""
        self._generator.set_state(state)

    def join_state_dicts(self, states: list[torch.Tensor], place: Place) -> None:
        """With another number of ranks, each starts its own new stream, which depends on the iteration."""
        self.start(place.rank, 7_919 * place.step)
