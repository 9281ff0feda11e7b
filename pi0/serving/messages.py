"""openpi's messages between a policy's server and its clients: MessagePack with arrays, and LIBERO's observations.

A server sends its metadata when a connection opens. Then each request is an observation, and each answer a dictionary
with `actions`; a text in its place is an error (openpi, src/openpi/serving/websocket_policy_server.py). An array is a
dictionary with the keys `__ndarray__`, `data`, `dtype` and `shape`, as bytes (packages/openpi-client,
msgpack_numpy.py). Observations are those of openpi's LIBERO example (examples/libero/main.py): two images turned by
180 degrees, which is upright and mirrored; the state, 8 numbers; the instruction. One key is this project's own:
`noise`, from which the policy makes its actions. A server that takes it says so in its metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from PIL import Image

# The policy's cameras, by the key of their image in a request.
IMAGE_KEYS = {"observation/image": "base_0_rgb", "observation/wrist_image": "left_wrist_0_rgb"}
STATE, PROMPT, NOISE, ACTIONS = "observation/state", "prompt", "noise", "actions"
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 4096  # pixels a side
LONGEST_PROMPT = 4096  # characters
# Plain numbers: no objects, strings or records, whose sizes the bytes alone do not tell.
_NUMBERS = re.compile(r"[<>|=]?[biuf](1|2|4|8)")


class MessageError(ValueError):
    """A message is not what the protocol asks for; the text names the key and what is wrong."""


@dataclass(frozen=True)
class Request:
    """An observation that a client asks actions for.

    Attributes:
        images: camera name to uint8 [height, width, 3], upright and true.
        state: float32 [state features].
        prompt: the instruction.
        noise: what the actions are made from, float32; None: the server draws it.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    noise: np.ndarray | None

    @property
    def shapes(self) -> tuple:
        """Shapes of the images: requests with the same ones can be answered together."""
        return tuple((name, image.shape) for name, image in sorted(self.images.items()))


def pack(value: Any) -> bytes:
    """A value of dictionaries, lists, texts, numbers and arrays as a message."""
    return msgpack.packb(value, default=_pack_array)


def unpack(message: bytes | str) -> Any:
    """The value of a message.

    Raises:
        MessageError: it is text or no MessagePack, or an array in it is not one of numbers.
    """
    if isinstance(message, str):
        raise MessageError(f"the message is text: {message!r:.200}")
    try:
        return msgpack.unpackb(message, object_hook=_unpack_array)
    except MessageError:
        raise
    except Exception as error:
        raise MessageError(f"the message is no MessagePack: {error or type(error).__name__}") from error


def observation_message(
    images: Mapping[str, np.ndarray],
    state: np.ndarray,
    prompt: str,
    size: int,
    noise: np.ndarray | None = None,
) -> bytes:
    """The request for one observation.

    Args:
        images: camera name to uint8 [height, width, 3], upright and true; cameras without a key are left out.
        state: float32 [state features].
        prompt: the instruction.
        size: pixels a side of the images that are sent.
        noise: for servers that take it.
    """
    content: dict[str, Any] = {
        key: resize_with_pad(np.ascontiguousarray(images[camera][:, ::-1]), size)
        for key, camera in IMAGE_KEYS.items()
        if camera in images
    }
    content |= {STATE: np.asarray(state, np.float64), PROMPT: prompt}
    return pack(content if noise is None else {**content, NOISE: noise})


def read_request(
    message: bytes | str, cameras: tuple[str, ...], state_dim: int, noise_shape: tuple[int, ...]
) -> Request:
    """A client's request; keys that are not asked for are passed over, as openpi does.

    Args:
        message: what came.
        cameras: the policy's cameras; those among openpi's two must be there.
        state_dim: features of its robot's state.
        noise_shape: shape of `noise`, if it is given.

    Raises:
        MessageError: a key is missing, or its value is of another kind, shape or range.
    """
    if isinstance(message, str):
        raise MessageError("a request is a binary message; this one is text")
    content = unpack(message)
    if not isinstance(content, dict):
        raise MessageError(f"a request is a dictionary, not {_kind(content)}")
    images = {
        camera: _image(key, _value(content, key)) for key, camera in IMAGE_KEYS.items() if camera in cameras
    }
    state = _numbers(STATE, _value(content, STATE), (state_dim,))
    prompt = _value(content, PROMPT)
    if isinstance(prompt, np.ndarray | np.generic | bytes | list) or not isinstance(prompt, str):
        raise MessageError(f"{PROMPT!r} must be a text, not {_kind(prompt)}")
    if len(prompt) > LONGEST_PROMPT:
        raise MessageError(f"{PROMPT!r} has {len(prompt)} characters; {LONGEST_PROMPT} are the most")
    noise = content.get(NOISE)
    return Request(images, state, prompt, None if noise is None else _numbers(NOISE, noise, noise_shape))


def read_actions(answer: bytes | str, action_dim: int, at_least: int) -> np.ndarray:
    """The actions of a server's answer, float32 [H, action_dim].

    Raises:
        MessageError: the answer is an error, has no actions, or they are not numbers of this shape.
    """
    if isinstance(answer, str):
        raise MessageError(f"the server's error: {answer.strip() or 'an empty text'}")
    content = unpack(answer)
    if not isinstance(content, dict):
        raise MessageError(f"an answer is a dictionary, not {_kind(content)}")
    given = np.asarray(_value(content, ACTIONS))
    if (
        given.dtype.kind not in "fiu"
        or given.ndim != 2
        or given.shape[1] != action_dim
        or len(given) < at_least
    ):
        raise MessageError(
            f"{ACTIONS!r} must be numbers [{at_least} or more, {action_dim}], not {given.dtype} {list(given.shape)}"
        )
    if not np.isfinite(given).all():
        raise MessageError(f"{ACTIONS!r} are not finite")
    return given.astype(np.float32)


def plain(value: Any) -> Any:
    """A message's value for JSON: arrays become lists, and what JSON does not know its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """An image uint8 [height, width, 3] with `size` pixels a side, not distorted, with black borders.

    It gives the pixels of openpi's client (image_tools.resize_with_pad).
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    ratio = max(width / size, height / size)
    new = int(width / ratio), int(height / ratio)
    square = Image.new("RGB", (size, size))
    left, top = (max(0, int((size - length) / 2)) for length in new)
    square.paste(Image.fromarray(image).resize(new, resample=Image.Resampling.BILINEAR), (left, top))
    return np.asarray(square)


def _value(content: dict, key: str) -> Any:
    if key not in content:
        given = ", ".join(sorted(map(str, content))) or "none"
        raise MessageError(f"{key!r} is missing; the keys are {given}")
    return content[key]


def _image(key: str, value: Any) -> np.ndarray:
    """A camera's image, upright and true, from what openpi's own policies take: also floats, also channels first."""
    image = np.asarray(value)
    if image.dtype.kind not in "fu" or image.ndim != 3:
        raise MessageError(
            f"{key!r} must be an image [height, width, 3], not {image.dtype} {list(image.shape)}"
        )
    if image.shape[2] != 3 and image.shape[0] == 3:
        image = np.moveaxis(image, 0, 2)
    sides = image.shape[:2]
    if image.shape[2] != 3 or not all(SMALLEST_IMAGE <= side <= LARGEST_IMAGE for side in sides):
        raise MessageError(
            f"{key!r} must be an image [height, width, 3] with {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels a side, not "
            f"{list(image.shape)}"
        )
    if image.dtype.kind == "f":
        if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
            raise MessageError(f"{key!r}: pixels that are floats lie between 0 and 1")
        image = (255 * image).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise MessageError(f"{key!r} must be uint8, not {image.dtype}")
    return np.ascontiguousarray(image[:, ::-1])


def _numbers(key: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        numbers = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise MessageError(f"{key!r} must be numbers {list(shape)}, not {_kind(value)}") from error
    if numbers.shape != shape:
        raise MessageError(f"{key!r} must be numbers {list(shape)}, not {list(numbers.shape)}")
    if not np.isfinite(numbers).all():
        raise MessageError(f"{key!r} is not finite")
    return numbers


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} {list(value.shape)}"
        if isinstance(value, np.ndarray)
        else type(value).__name__
    )


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape,
        }  # fmt: skip
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _unpack_array(value: dict) -> Any:
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    kind, data = value.get(b"dtype"), value.get(b"data")
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else kind
    if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
        raise MessageError(f"an array's type is {kind!r}; only numbers can be sent")
    dtype = np.dtype(kind)
    if b"__npgeneric__" in value:
        try:
            return dtype.type(data)
        except (TypeError, ValueError, OverflowError) as error:
            raise MessageError(f"{data!r:.80} is no {dtype}") from error
    shape = value.get(b"shape")
    sizes = shape if isinstance(shape, list | tuple) else [None]
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or not isinstance(data, bytes):
        raise MessageError(f"an array's shape is {shape!r:.80}, its data {_kind(data)}")
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise MessageError(f"an array {dtype} {list(sizes)} does not have {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(sizes)
