"""A policy as a part of a checkpoint: the folder that `PI0Policy.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from pi0.base.errors import CheckpointError
from pi0.model.config import Pi0Config
from pi0.policy.folder import pair, read_config, read_header, read_norm_stats
from pi0.policy.pi0_policy import PI0Policy
from pi0.ranks.sharding import cut_like

# Fields of the configuration that decide no action.
_FREE = ("tokenizer_path", "freeze_vision_encoder", "train_expert_only", "delta_actions")


class SavedPolicy:
    """Stores a policy that is whole on every rank, such as an average, as a policy folder in a checkpoint.

    A run stands on this folder: statistics and frozen weights come from it too, whatever has become of the folder that
    the run started from.

    Args:
        policy: the policy.
        trained: the policy in training, which has the same statistics and frozen weights; it may be sharded.
    """

    def __init__(self, policy: PI0Policy, trained: PI0Policy):
        self._policy = policy
        self._trained = trained

    def whole_state(self) -> PI0Policy:
        """The policy, which is whole."""
        return self._policy

    def write(self, folder: Path, name: str, state: PI0Policy) -> None:
        """Write its policy folder `name` into `folder`.

        Raises:
            OSError, OutputError: the disk refuses.
        """
        state.save_pretrained(folder / name)

    def read(self, folder: Path, name: str) -> None:
        """Copy weights and statistics of a policy folder into the policy, and its frozen weights into the trained one.

        The policies' weights keep their memory and types: there may be no room for another policy of this size.

        Raises:
            CheckpointError: the folder is damaged or belongs to another policy.
        """
        path = folder / name
        config = read_config(path)
        _require_same(config, self._policy.saved_config, path)
        if (stats := read_norm_stats(path, config).stats) is not None:
            self._policy.use_norm_stats(stats)
            self._trained.use_norm_stats(stats)
        parameters = dict(self._policy.network.named_parameters())
        trained = dict(self._trained.network.named_parameters())
        header = read_header(path)
        names = pair(header, {key: parameter.shape for key, parameter in parameters.items()})
        with (
            torch.no_grad(),
            safe_open(header.path, framework="pt") as file,  # mapped, so that one tensor at a time is read
        ):
            for key, parameter in parameters.items():
                tensor = file.get_tensor(header.keys[names[key]])
                parameter.copy_(tensor)
                other = trained.get(key)
                if other is not None and not other.requires_grad:
                    other.copy_(cut_like(tensor.to(other.dtype), other))


def _require_same(saved: Pi0Config, now: Pi0Config, path: Path) -> None:
    """Raise `CheckpointError` if the policy that was loaded is not built like the one of the checkpoint."""
    old, new = saved.to_dict(), now.to_dict()
    changed = [f"{key} was {old[key]!r} and is {new[key]!r}" for key in old if old[key] != new.get(key)]
    if changed := [text for text in changed if text.split()[0] not in _FREE]:
        raise CheckpointError(
            f"{path}: the run's policy is built otherwise than the one of policy_path now ({'; '.join(changed)}); restore "
            "that folder's config.json, or training.trainable"
        )
