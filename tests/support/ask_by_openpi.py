"""openpi's own policy client, run in .venv-openpi by test_serving.py against this project's server.

Usage: ask_by_openpi.py PORT OBSERVATION ACTIONS

OBSERVATION is an npz file with the keys of openpi's LIBERO example; the actions go to the file ACTIONS (npz). Then it
asks for an error, and resizes the image as the example does.
"""

import sys

import numpy as np
from openpi_client import image_tools
from openpi_client.websocket_client_policy import WebsocketClientPolicy

if __name__ == "__main__":
    port, observation, result = int(sys.argv[1]), dict(np.load(sys.argv[2])), sys.argv[3]
    observation["prompt"] = str(observation["prompt"])
    client = WebsocketClientPolicy("127.0.0.1", port)
    answers = [client.infer(observation) for _ in range(2)]
    try:
        client.infer({**observation, "observation/state": np.zeros(3)})
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    after = client.infer(observation)
    np.savez(
        result,
        metadata=np.array(repr(client.get_server_metadata())),
        actions=np.stack([answer["actions"] for answer in [*answers, after]]),
        milliseconds=np.array([answer["server_timing"]["infer_ms"] for answer in answers]),
        error=np.array(error),
        resized=image_tools.resize_with_pad(observation["observation/image"], 224, 224),
    )
