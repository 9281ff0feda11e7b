"""A policy as a part of a checkpoint: the folder that `PI0Policy.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from pi0.policy.folder import pair, read_header
from pi0.policy.pi0_policy import PI0Policy


class SavedPolicy:
    """Stores a policy that is whole on every rank, such as an average, as a policy folder in a checkpoint."""

    def __init__(self, policy: PI0Policy):
        self._policy = policy

    def whole_state(self) -> PI0Policy:
        """The policy, which is whole."""
        return self._policy

    def write(self, folder: Path, name: str, state: PI0Policy) -> None:
        """Write its policy folder `name` into `folder`.

        Raises:
            OSError: the disk refuses.
        """
        state.save_pretrained(folder / name)

    def read(self, folder: Path, name: str) -> None:
        """Copy the weights of a policy folder into the policy.

        The policy's weights keep their memory and types: there may be no room for a second policy of this size.

        Raises:
            CheckpointError: the folder is damaged or belongs to another policy.
        """
        parameters = dict(self._policy.network.named_parameters())
        header = read_header(folder / name)
        names = pair(header, {key: parameter.shape for key, parameter in parameters.items()})
        with safe_open(header.path, framework="pt") as file:  # mapped, so that one tensor at a time is read
            for key, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(header.keys[names[key]]))
