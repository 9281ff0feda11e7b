"""openpi's own policy server with a scripted policy, run in .venv-openpi by test_serving.py.

Usage: serve_by_openpi.py TABLE PORT

TABLE is an npz file: `states` [N, 8], and `actions` [N, H, 7] that a policy once chose there. The script answers an
observation with the actions of its state. LIBERO's episodes are deterministic, so they repeat what was recorded.
"""

import sys

import numpy as np
from openpi.serving.websocket_policy_server import WebsocketPolicyServer


class Repeats:
    def __init__(self, table: str):
        recorded = np.load(table)
        self._actions = {
            state.tobytes(): actions
            for state, actions in zip(recorded["states"], recorded["actions"], strict=True)
        }
        self._length = recorded["actions"].shape[1]

    def infer(self, observation: dict) -> dict:
        for key in ("observation/image", "observation/wrist_image"):
            assert observation[key].shape == (224, 224, 3), observation[key].shape
            assert observation[key].dtype == np.uint8
        state = observation["observation/state"].astype(np.float32)
        still = np.zeros((self._length, 7))  # before the first episode
        return {"actions": self._actions.get(state.tobytes(), still)}


if __name__ == "__main__":
    WebsocketPolicyServer(
        Repeats(sys.argv[1]), "127.0.0.1", int(sys.argv[2]), {"who": "openpi"}
    ).serve_forever()
