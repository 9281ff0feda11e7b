"""Everything random in this process, saved and put back."""

from __future__ import annotations

import random

import numpy as np
import torch

from pi0.policy.folder import CheckpointError


def random_states() -> dict:
    """State of Python's and NumPy's global generators and of torch's on the CPU and every CUDA device.

    Generators that the program made for itself are not among them.

    Returns:
        Only dictionaries, lists, tensors, numbers and strings, so that `torch.load(weights_only=True)` reads it.
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
    """Put back what `random_states` returned; the next draws are those that followed it.

    Raises:
        CheckpointError: it was taken with another number of CUDA devices; nothing has been put back.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) != devices:
        raise CheckpointError(
            f"the random states are of {len(states['cuda'])} CUDA devices and this process sees {devices}; "
            "resume with as many (CUDA_VISIBLE_DEVICES)"
        )
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"]), *(python["gauss"] or [None])))
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if devices:
        torch.cuda.set_rng_state_all(states["cuda"])
