"""The network of `pi0.parallel.network` for one observation at a time, in NumPy: what a worker acts with.

A process with torch needs 190 MB more, and torch is no faster for a single observation. Each frame is unrolled into
columns once, when it is new, not four times as a stack of four would be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

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


def views(flat: np.ndarray, actions: int) -> dict[str, np.ndarray]:
    """The parameters in a flat float32 array, by name."""
    named, offset = {}, 0
    for name, shape in shapes(actions).items():
        size = int(np.prod(shape))
        named[name] = flat[offset : offset + size].reshape(shape)
        offset += size
    return named


def arranged_shapes(actions: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that `FramePolicy` computes with (see `arrange`)."""
    return {
        "first": (STACK, STACK * 64, 32),
        "second": (512, 64),
        "third": (576, 64),
        "hidden": (64 * 7 * 7, _FEATURES),
        "heads": (_FEATURES, actions + 1),
        "biases": (32 + 64 + 64 + _FEATURES + actions + 1,),
    }


def arranged_table(actions: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """The same with their types, as `pi0.workers.arrays` lays them out."""
    return {name: (shape, np.float32) for name, shape in arranged_shapes(actions).items()}


def arrange(parameters: Mapping[str, np.ndarray], into: Mapping[str, np.ndarray]) -> None:
    """Write the parameters in the orders in which `FramePolicy` uses them.

    Args:
        parameters: by their names in `ActorCritic`.
        into: float32 arrays of `arranged_shapes`.
    """
    first = parameters["conv1.weight"].transpose(1, 2, 3, 0).reshape(STACK, 64, 32) / np.float32(255)
    for newest in range(STACK):
        order = [STACK - 1 - (newest - place) % STACK for place in range(STACK)]
        into["first"][newest] = first[order].reshape(STACK * 64, 32)
    into["second"][:] = parameters["conv2.weight"].transpose(2, 3, 1, 0).reshape(512, 64)
    into["third"][:] = parameters["conv3.weight"].transpose(2, 3, 1, 0).reshape(576, 64)
    # Flattened features are in torch's order (channel, row, column); here a channel comes last.
    hidden = parameters["hidden.weight"].reshape(_FEATURES, 64, 7, 7).transpose(2, 3, 1, 0)
    into["hidden"][:] = hidden.reshape(-1, _FEATURES)
    into["heads"][:] = np.concatenate([parameters["actor.weight"], parameters["critic.weight"]]).T
    names = ("conv1", "conv2", "conv3", "hidden", "actor", "critic")
    into["biases"][:] = np.concatenate([parameters[f"{name}.bias"] for name in names])


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

    def use(self, arranged: Mapping[str, np.ndarray]) -> None:
        """Act with arrays that `arrange` has written; they are not copied."""
        self._weights = arranged
        self._biases = np.split(arranged["biases"], np.cumsum([32, 64, 64, _FEATURES]))

    def load(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Act with a copy of parameters."""
        arranged = {
            name: np.empty(shape, np.float32) for name, shape in arranged_shapes(self._actions).items()
        }
        arrange(parameters, arranged)
        self.use(arranged)

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
        np.dot(self._columns.reshape(400, 256), self._weights["first"][number % STACK], out=first)
        _rectify(first, bias1)
        self._columns2[...] = _windows(self._first, 4, 2, 9)
        second = self._second.reshape(81, 64)
        np.dot(self._columns2.reshape(81, 512), self._weights["second"], out=second)
        _rectify(second, bias2)
        self._columns3[...] = _windows(self._second, 3, 1, 7)
        third = self._columns3.reshape(49, 576) @ self._weights["third"]
        _rectify(third, bias3)
        hidden = third.reshape(-1) @ self._weights["hidden"]
        _rectify(hidden, bias4)
        heads = hidden @ self._weights["heads"] + bias5
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
