"""`ServedPolicy`: a policy that runs elsewhere, behind openpi's protocol, for `pi0.libero.rollouts`.

A server that is not there yet, is slow, or has gone for a while is waited for, and asked again: it answers an
observation, and knows nothing of episodes. One that answers something else than actions ends the evaluation: its
episodes would be scored as failures that the policy never made.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from pi0.base.errors import InputError, MachineError
from pi0.serving.messages import (
    IMAGE_KEYS,
    LARGEST_IMAGE,
    SMALLEST_IMAGE,
    MessageError,
    observation_message,
    read_actions,
    unpack,
)

OPENPI_IMAGE_SIZE = 224  # pixels a side of what openpi's LIBERO example sends
STATE_DIM, ACTION_DIM = 8, 7
PAUSE_S = 0.5  # from one attempt to connect to the next
LARGEST_NOISE = 10_000_000  # numbers for an observation
SLOW_S = 10.0  # after so long without an answer a line says so


class ServerError(MachineError):
    """A policy server is not there, or answers something else than actions."""


@dataclass(frozen=True)
class ServedSpec:
    """What environments must know about a served policy (`pi0.libero.environments.PolicySpec`).

    Attributes:
        image_size: pixels a side of the images that are sent.
    """

    cameras: tuple[str, ...]
    image_size: int
    action_horizon: int
    source: str
    robot_state_dim: int = STATE_DIM
    robot_action_dim: int = ACTION_DIM


class ServedPolicy:
    """Asks a server for actions, for several rollouts at once.

    Attributes:
        metadata: what the server says of itself.
        config: what environments must know.

    Args:
        url: address, such as ws://127.0.0.1:8000.
        connections: at most so many requests are under way at once, each on a connection of its own.
        image_size: pixels a side of the images that are sent; None: what the server's metadata says, else openpi's 224.
        chunk_length: actions of a chunk that are used; None: as many as the server sends.
        patience_s: seconds for which a server that is not there or does not answer is waited for.
        report: called with a line about the server.

    Raises:
        InputError: the address is none, or the server's policy is of another robot or has shorter chunks.
        ServerError: the server is not there, or answers something else than actions.
    """

    shares_first_look = False  # a server answers one observation at a time

    def __init__(
        self,
        url: str,
        *,
        connections: int = 8,
        image_size: int | None = None,
        chunk_length: int | None = None,
        patience_s: float = 300.0,
        report: Callable[[str], None] = print,
    ):
        self._url = url
        self._closed = threading.Event()
        self._work: queue.SimpleQueue[tuple[bytes, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._connections = [_Connection(url, patience_s, report, self._closed) for _ in range(connections)]
        try:
            self.metadata = self._connections[0].open()
            for connection in self._connections[1:]:
                connection.expected = self.metadata
            self._noise_shape = self._shape_of_noise()
            self.config = self._described(image_size)
            for connection in self._connections:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            sent = self._chunk_of_first_answer()
            if chunk_length is not None and chunk_length > sent:
                raise InputError(f"{url}: its chunks have {sent} actions, and {chunk_length} are asked for")
        except BaseException:  # also Ctrl+C: no connection stays open, and the error goes on
            self.close()
            raise
        self.config = replace(self.config, action_horizon=chunk_length or sent)

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """Noise from `key` alone for a server that takes it, float32; else an empty array: the server draws its own."""
        if self._noise_shape is None:
            return np.zeros(0, np.float32)
        return np.random.default_rng(key).standard_normal(self._noise_shape, dtype=np.float32)

    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray:
        """Action chunks float32 [B, H, 7] in [-1, 1]; rows without a prompt are nobody's, and stay 0.

        Raises:
            ServerError: as for the class.
        """
        futures: dict[int, Future[np.ndarray]] = {}
        for row, prompt in enumerate(prompts):
            if prompt:
                frames = {name: images[name][row] for name in self.config.cameras if name in images}
                drawn = noise[row] if noise.size else None
                futures[row] = self._ask(frames, states[row], prompt, drawn)
        chunks = np.zeros((len(prompts), self.config.action_horizon, ACTION_DIM), np.float32)
        for row, future in futures.items():
            chunks[row] = future.result()[: self.config.action_horizon]
        return chunks.clip(-1, 1)

    def prepared(self, images: dict, states: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        """Not known here: what a server makes of an observation stays with it."""
        raise InputError("what a server's network is given is not known here; unset DEBUG_SAVE_PROCESSED")

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        for connection in self._connections:
            connection.close()
        for _ in self._connections:
            self._work.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _size_of(self, name: str) -> int | None:
        value = self.metadata.get(name)
        return value if isinstance(value, int) and value > 0 else None

    def _shape_of_noise(self) -> tuple[int, ...] | None:
        """Shape of the noise that the server takes; None if it takes none.

        Raises:
            ServerError: no such noise can be meant.
        """
        shape = self.metadata.get("noise_shape")
        if shape is None:
            return None
        sizes = shape if isinstance(shape, list | tuple) else [None]
        if not all(isinstance(size, int) and size > 0 for size in sizes) or math.prod(sizes) > LARGEST_NOISE:
            raise ServerError(f"{self._url} asks for noise of the shape {shape!r:.80}")
        return tuple(sizes)

    def _described(self, image_size: int | None) -> ServedSpec:
        """What the metadata say; the length of chunks is not yet known, and 1.

        Raises:
            InputError: another robot's policy, or images of a size that cannot be sent.
        """
        size = image_size or self._size_of("image_size") or OPENPI_IMAGE_SIZE
        if not SMALLEST_IMAGE <= size <= LARGEST_IMAGE:
            raise InputError(
                f"{self._url} wants images of {size} pixels a side; {SMALLEST_IMAGE} to {LARGEST_IMAGE} can be sent "
                "(--server_image_size)"
            )
        widths = self._size_of("state_dim") or STATE_DIM, self._size_of("action_dim") or ACTION_DIM
        if widths != (STATE_DIM, ACTION_DIM):
            raise InputError(
                f"{self._url}: this policy is of another robot, whose state has {widths[0]} features and whose actions "
                f"have {widths[1]}; LIBERO's have {STATE_DIM} and {ACTION_DIM}"
            )
        keys = self.metadata.get("keys")
        known = [key for key in IMAGE_KEYS if not isinstance(keys, list) or key in keys]
        return ServedSpec(tuple(IMAGE_KEYS[key] for key in known), size, 1, self._url)

    def _chunk_of_first_answer(self) -> int:
        """How many actions the answer to an observation of nothing has: does the server answer at all?"""
        size = self.config.image_size
        blank = {camera: np.zeros((size, size, 3), np.uint8) for camera in self.config.cameras}
        drawn = self.noise((0,)) if self._noise_shape else None
        return len(self._ask(blank, np.zeros(STATE_DIM, np.float32), "do nothing", drawn).result())

    def _ask(
        self, images: dict[str, np.ndarray], state: np.ndarray, prompt: str, noise: np.ndarray | None
    ) -> Future[np.ndarray]:
        future: Future[np.ndarray] = Future()
        self._work.put((observation_message(images, state, prompt, self.config.image_size, noise), future))
        return future

    def _serve(self, connection: _Connection) -> None:
        """Runs in the thread of a connection."""
        while (work := self._work.get()) is not None:
            message, future = work
            try:
                future.set_result(connection.ask(message, self.config.action_horizon))
            except Exception as error:  # noqa: BLE001  whoever waits for the answer raises it
                future.set_exception(error)


class _Connection:
    """One connection, made again whenever it is lost."""

    def __init__(self, url: str, patience_s: float, report: Callable[[str], None], closed: threading.Event):
        self._url, self._patience_s, self._report, self._closed = url, patience_s, report, closed
        self._opened = ExitStack()  # what closes the socket
        self._socket: ClientConnection | None = None
        self.expected: dict[str, Any] | None = None  # metadata of the first connection

    def open(self) -> dict[str, Any]:
        """Connect, and return the server's metadata.

        Raises:
            InputError: the address is none.
            ServerError: it cannot be reached for longer than the patience, or does not speak the protocol.
        """
        began, said = time.monotonic(), False
        while True:
            try:
                self._opened.close()
                opening = connect(self._url, compression=None, max_size=None, open_timeout=10, proxy=None)
                socket = self._opened.enter_context(opening)
                metadata = unpack(self._receive(socket, began))
                if not isinstance(metadata, dict):
                    raise MessageError(f"its metadata are {type(metadata).__name__}, not a dictionary")
                break
            except (InvalidURI, ValueError) as error:
                if isinstance(error, MessageError):
                    raise ServerError(f"{self._url} is no policy server: {error}") from error
                raise InputError(
                    f"{self._url!r} is no address of a server, such as ws://127.0.0.1:8000: {error}"
                ) from error
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                self._may_wait(began, error)
                if not said:
                    said = True
                    self._report(
                        f"waiting for a policy server at {self._url} ({error or type(error).__name__})"
                    )
                self._closed.wait(PAUSE_S)
        if self.expected is not None and metadata != self.expected:
            socket.close()
            raise ServerError(
                f"{self._url} came back as another policy: {metadata}, before it was {self.expected}"
            )
        self.expected, self._socket = metadata, socket
        return metadata

    def ask(self, message: bytes, at_least: int) -> np.ndarray:
        """The actions that a request gets, float32 [H, 7]; asked again where the connection is lost.

        Raises:
            ServerError: no answer for longer than the patience, or one that is none.
        """
        began = time.monotonic()
        while True:
            try:
                if self._socket is None:
                    self.open()
                assert self._socket is not None
                self._socket.send(message)
                return read_actions(self._receive(self._socket, began), ACTION_DIM, at_least)
            except MessageError as error:
                raise ServerError(f"{self._url}: {error}") from error
            except (OSError, ConnectionClosed) as error:
                self._socket = None
                self._may_wait(began, error)
                self._closed.wait(PAUSE_S)

    def close(self) -> None:
        """End the connection, and whatever waits for it."""
        if self._socket is not None:
            self._socket.close()

    def _receive(self, socket: ClientConnection, began: float) -> bytes | str:
        said = False
        while True:
            try:
                return socket.recv(timeout=min(SLOW_S, self._patience_s))
            except TimeoutError:
                waited = time.monotonic() - began
                if waited >= self._patience_s:
                    socket.close()
                    raise ServerError(
                        f"{self._url} has not answered for {waited:.0f} s; nothing was scored. Allow it more time "
                        "(--server_patience), or look at the server"
                    ) from None
                if not said:
                    said = True
                    self._report(f"{self._url} is slow: no answer for {waited:.0f} s")

    def _may_wait(self, began: float, error: Exception) -> None:
        if self._closed.is_set():
            raise ServerError(f"{self._url}: closed") from error
        waited = time.monotonic() - began
        if waited >= self._patience_s:
            raise ServerError(
                f"{self._url} cannot be reached for {waited:.0f} s: {error or type(error).__name__}; start the server, or "
                "allow it more time (--server_patience)"
            ) from error
