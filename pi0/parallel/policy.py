"""The network of `pi0.parallel.network` for one observation at a time, in NumPy: what a worker acts with.

A process with torch needs 190 MB more, and torch is no faster for a single observation. Each frame is unrolled into
columns once, when it is new, not four times as a stack of four would be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pi0.parallel.games import SIDE

STACK = 4  # frames that the policy sees
_CONVOLUTIONS = ((STACK, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # inputs, outputs, kernel, stride
_FEATURES = 512


def shapes(actions: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by their names in `ActorCritic`, in its order."""
    named: dict[str, tuple[int, ...]] = {}
    for number, (inputs, outputs, kernel, _) in enumerate(_CONVOLUTIONS, 1):
        named |= {f"conv{number}.weight": (outputs, inputs, kernel, kernel), f"conv{number}.bias": (outputs,)}
    for name, inputs, outputs in (
        ("hidden", 64 * 7 * 7, _FEATURES),
        ("actor", _FEATURES, actions),
        ("critic", _FEATURES, 1),
    ):
        named |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return named


def count(actions: int) -> int:
    """Number of parameters."""
    return sum(int(np.prod(shape)) for shape in shapes(actions).values())


def views(flat: np.ndarray, actions: int) -> dict[str, np.ndarray]:
    """The parameters in a flat float32 array, by name."""
    named, offset = {}, 0
    for name, shape in shapes(actions).items():
        size = int(np.prod(shape))
        named[name] = flat[offset : offset + size].reshape(shape)
        offset += size
    return named


class FramePolicy:
    """A policy that is shown one frame after another.

    Frame number n of an episode is kept at place n % 4. The weights of the first layer are kept in four orders, one
    for each place that the newest frame may have, so that nothing is moved.

    Args:
        actions: number of actions.
    """

    def __init__(self, actions: int):
        self._actions = actions
        self._columns = np.zeros((400, STACK, 64), np.float32)
        self._first = np.empty((20, 20, 32), np.float32)
        self._second = np.empty((9, 9, 64), np.float32)
        self._columns2 = np.empty((9, 9, 4, 4, 32), np.float32)
        self._columns3 = np.empty((7, 7, 3, 3, 64), np.float32)

    def load(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Take a copy of the parameters, in the orders in which they are used."""
        first = parameters["conv1.weight"].transpose(1, 2, 3, 0).reshape(STACK, 64, 32) / np.float32(255)
        self._weights1 = [
            np.concatenate([first[STACK - 1 - (newest - place) % STACK] for place in range(STACK)])
            for newest in range(STACK)
        ]
        self._weights2 = parameters["conv2.weight"].transpose(2, 3, 1, 0).reshape(512, 64).copy()
        self._weights3 = parameters["conv3.weight"].transpose(2, 3, 1, 0).reshape(576, 64).copy()
        # Flattened features are in torch's order (channel, row, column); here a channel comes last.
        hidden = parameters["hidden.weight"].reshape(_FEATURES, 64, 7, 7).transpose(2, 3, 1, 0)
        self._weights4 = np.ascontiguousarray(hidden.reshape(-1, _FEATURES))
        heads = np.concatenate([parameters["actor.weight"], parameters["critic.weight"]])
        self._weights5 = np.ascontiguousarray(heads.T)
        self._biases = [parameters[f"{name}.bias"].copy() for name in ("conv1", "conv2", "conv3", "hidden")]
        self._biases.append(np.concatenate([parameters["actor.bias"], parameters["critic.bias"]]))

    def clear(self) -> None:
        """An episode begins: frames before its first count as black."""
        self._columns[:] = 0

    def show(self, frame: np.ndarray, number: int) -> None:
        """Show the frame of a number, uint8 [84, 84]; numbers follow each other from 0."""
        place = self._columns.reshape(20, 20, STACK, 8, 8)[:, :, number % STACK]
        place[...] = _windows(frame, 8, 4, 20)

    def __call__(self, number: int) -> tuple[np.ndarray, float]:
        """Logits, float32 [actions], and value, where `number` is the newest frame's."""
        bias1, bias2, bias3, bias4, bias5 = self._biases
        first = self._first.reshape(400, 32)
        np.dot(self._columns.reshape(400, 256), self._weights1[number % STACK], out=first)
        _rectify(first, bias1)
        self._columns2[...] = _windows(self._first, 4, 2, 9)
        second = self._second.reshape(81, 64)
        np.dot(self._columns2.reshape(81, 512), self._weights2, out=second)
        _rectify(second, bias2)
        self._columns3[...] = _windows(self._second, 3, 1, 7)
        third = self._columns3.reshape(49, 576) @ self._weights3
        _rectify(third, bias3)
        hidden = third.reshape(-1) @ self._weights4
        _rectify(hidden, bias4)
        heads = hidden @ self._weights5 + bias5
        return heads[: self._actions], float(heads[self._actions])


def log_probabilities(logits: np.ndarray, exploration: float) -> np.ndarray:
    """Log-probabilities of the policy mixed with a share of uniform choice, float64 [actions]."""
    shifted = logits.astype(np.float64) - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    return np.log((1 - exploration) * np.exp(logs) + exploration / len(logs)) if exploration else logs


def _rectify(values: np.ndarray, bias: np.ndarray) -> None:
    values += bias
    np.maximum(values, 0, out=values)


def _windows(image: np.ndarray, kernel: int, stride: int, places: int) -> np.ndarray:
    """The windows of a convolution: [places, places, kernel, kernel, ...], without a copy."""
    down, right = image.strides[:2]
    shape = (places, places, kernel, kernel, *image.shape[2:])
    return as_strided(image, shape, (down * stride, right * stride, *image.strides))


assert SIDE == 84, "the places of the convolutions are those of 84 x 84 pixels"
