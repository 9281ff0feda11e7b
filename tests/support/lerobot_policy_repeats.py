"""A LeRobot policy that repeats recorded chunks, for test_lerobot_plugin.py; runs in .venv-lerobot.

LeRobot imports it as it imports every package called `lerobot_policy_*`. The table is an npz file: `states` [N, 8], and
`actions` [N, H, 7] that a policy once chose there. LIBERO's episodes are deterministic, so they repeat what was recorded.
What it saw first is saved beside the table, `seen.npz`.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE


@PreTrainedConfig.register_subclass("repeats")
@dataclass
class RepeatsConfig(PreTrainedConfig):
    table: str = ""

    observation_delta_indices = action_delta_indices = reward_delta_indices = None

    def get_optimizer_preset(self):
        raise NotImplementedError

    def get_scheduler_preset(self):
        raise NotImplementedError

    def validate_features(self) -> None:
        pass


class RepeatsPolicy(PreTrainedPolicy):
    config_class = RepeatsConfig
    name = "repeats"

    def __init__(self, config: RepeatsConfig, **_):
        super().__init__(config)
        recorded = np.load(config.table)
        pairs = zip(recorded["states"], recorded["actions"], strict=True)
        self._actions = {state.tobytes(): actions for state, actions in pairs}
        self._length = recorded["actions"].shape[1]
        self._seen = Path(config.table).parent / "seen.npz"
        self.reset()

    def reset(self) -> None:
        self._queue: deque[np.ndarray] = deque()

    def predict_action_chunk(self, batch, **_):
        still = np.zeros((self._length, 7), np.float32)  # where an episode has ended
        states = batch[OBS_STATE].numpy()
        return torch.from_numpy(np.stack([self._actions.get(state.tobytes(), still) for state in states]))

    def select_action(self, batch, **_):
        if not self._seen.exists():
            images = {name: (255 * frames).round().byte().numpy() for name, frames in batch.items() if name.startswith(OBS_IMAGES)}  # fmt: skip
            np.savez(self._seen, **images, task=np.array(batch["task"]))
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch).unbind(1))
        return self._queue.popleft()

    def forward(self, batch):
        raise NotImplementedError

    def get_optim_params(self):
        raise NotImplementedError


def make_repeats_pre_post_processors(config, dataset_stats=None):
    after = PolicyProcessorPipeline(
        steps=[], to_transition=policy_action_to_transition, to_output=transition_to_policy_action
    )
    return PolicyProcessorPipeline(steps=[]), after
