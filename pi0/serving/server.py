"""`PolicyServer`: answers the requests of several clients, in batches, by openpi's protocol (`pi0.serving.messages`).

Requests that come while the network computes wait, and go through it together in the next pass. So one client gets the
shortest answer times, and many get the most answers a second; nobody waits for a batch to fill. A pass that fails is
repeated for each of its requests alone: only the one at fault gets an error.
"""

from __future__ import annotations

import asyncio
import http
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from pi0.base.errors import InputError
from pi0.model.config import Pi0Config
from pi0.serving.messages import ACTIONS, IMAGE_KEYS, MessageError, Request, pack, read_request

HEALTH, LATENCY = "/healthz", "/latency"
REMEMBERED = 10_000  # answers whose times are remembered
SERVED = 3  # first number of noise keys, so that no other noise is like it
LAST_ANSWERS_S = 10.0  # for requests that are there when the server is asked to end


class Acting(Protocol):
    """What acts (`pi0.policy.acting.ActingPolicy`)."""

    def noise(self, key: tuple[int, ...]) -> np.ndarray: ...

    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray: ...


@dataclass
class Waiting:
    """A request that has yet to be answered."""

    request: Request
    answer: asyncio.Future[np.ndarray]
    came: float


@dataclass
class Times:
    """What a server has done; times in seconds.

    Attributes:
        answers: requests that got actions.
        errors: requests that got an error.
        passes: passes through the network.
        latest: of the latest answers, from the arrival of the request to its actions.
    """

    answers: int = 0
    errors: int = 0
    passes: int = 0
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def summary(self) -> dict[str, Any]:
        """Counts, and percentiles of the latest answer times in milliseconds."""
        percentiles: dict[str, float] = {}
        if self.latest:
            values = 1000 * np.percentile(self.latest, [50, 90, 99, 100])
            percentiles = dict(zip(("p50", "p90", "p99", "max"), np.round(values, 3).tolist(), strict=True))
        return {
            "answers": self.answers,
            "errors": self.errors,
            "answers_a_pass": round(self.answers / self.passes, 3) if self.passes else None,
            "milliseconds": percentiles,
        }


class PolicyServer:
    """Serves a policy.

    Args:
        acting: the policy that acts.
        config: the policy's sizes and cameras.
        name: what the metadata call it.
        batch_size: most requests in a pass.
        pad: fill every pass up to `batch_size`. Then an answer does not depend, to the last bit, on how many others
            are asked for at the same time.
        max_clients: connections at once; more are refused.
        max_message_bytes: size of a request; a longer one ends its connection.
        seed: of the noise that clients do not bring.
    """

    def __init__(
        self,
        acting: Acting,
        config: Pi0Config,
        name: str,
        *,
        batch_size: int = 8,
        pad: bool = False,
        max_clients: int = 64,
        max_message_bytes: int = 16 * 2**20,
        seed: int = 0,
    ):
        self._acting, self._config, self._seed = acting, config, seed
        self._batch_size, self._pad = batch_size, pad
        self._max_clients, self._max_message_bytes = max_clients, max_message_bytes
        self._noise_shape = acting.noise((SERVED, seed, 0)).shape
        self.cameras = tuple(name for name in config.cameras if name in IMAGE_KEYS.values())
        self.times = Times()
        self.metadata = {
            "policy": name,
            "keys": [key for key, camera in IMAGE_KEYS.items() if camera in self.cameras],
            "images": "turned by 180 degrees, as in openpi's LIBERO example",
            "image_size": config.image_size,
            "state_dim": config.robot_state_dim,
            "action_dim": config.robot_action_dim,
            "action_horizon": config.action_horizon,
            "noise_shape": list(self._noise_shape),
        }
        self._waiting: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._ready = asyncio.Event()
        self._asked = 0  # requests so far that brought no noise
        self._open = 0  # requests that have come and whose answers are not sent
        self._ending = False
        self._server: Server | None = None

    async def run(self, host: str, port: int, ready: Callable[[int], None], stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then answer what has come, and close all connections.

        Args:
            host, port: where to listen; port 0 is any that is free.
            ready: called with the port when the network is warm and requests are answered.
            stop: asks it to end.

        Raises:
            InputError: it cannot listen there.
        """
        executor = ThreadPoolExecutor(1, thread_name_prefix="network")
        listening = serve(
            self._converse, host, port, process_request=self._http, compression=None,
            max_size=self._max_message_bytes,
        )  # fmt: skip
        try:
            self._server = await listening
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; take another --port or --host"
            ) from error
        async with self._server:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(executor, self._warm_up)
            answering = asyncio.create_task(self._answer_all(executor))
            self._ready.set()
            ready(self._server.sockets[0].getsockname()[1])
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait([answering, stopped], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():  # it never ends by itself
                answering.result()
            self._ending = True
            limit = time.monotonic() + LAST_ANSWERS_S
            while self._open and time.monotonic() < limit:
                await asyncio.sleep(0.01)
            answering.cancel()
        await loop.run_in_executor(None, executor.shutdown)

    # Connections

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Plain HTTP requests, and the refusal of clients that are too many."""
        if request.path == HEALTH:
            if self._ready.is_set():
                return connection.respond(http.HTTPStatus.OK, "OK\n")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "warming up\n")
        if request.path == LATENCY:
            content = {"clients": len(self._clients()), **self.times.summary()}
            response = connection.respond(http.HTTPStatus.OK, json.dumps(content) + "\n")
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        if self._ending:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "ending\n")
        if len(self._clients()) >= self._max_clients:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self._max_clients} clients are connected, the most there may be\n",
            )
        return None

    def _clients(self) -> set[ServerConnection]:
        return set() if self._server is None else self._server.connections

    async def _converse(self, connection: ServerConnection) -> None:
        """One client: metadata, then answers to its requests in their order."""
        await self._ready.wait()
        try:
            await connection.send(pack(self.metadata))
            async for message in connection:
                self._open += 1
                try:
                    await connection.send(await self._answer(message))
                finally:
                    self._open -= 1
        except ConnectionClosed:
            return

    async def _answer(self, message: bytes | str) -> bytes | str:
        """The answer to a message; a text is an error."""
        came = time.perf_counter()
        config = self._config
        try:
            if self._ending:
                raise MessageError("the server is ending")
            request = read_request(message, self.cameras, config.robot_state_dim, self._noise_shape)
            waiting = Waiting(request, asyncio.get_running_loop().create_future(), came)
            self._waiting.append(waiting)
            self._arrived.set()
            actions = await waiting.answer
        except Exception as error:  # noqa: BLE001  whatever a request does, its client hears of it and nobody else
            self.times.errors += 1
            if not isinstance(
                error, MessageError
            ):  # not the client's fault, so whoever runs the server must see it
                print(f"a request failed: {type(error).__name__}: {error}", flush=True)
            return f"{type(error).__name__}: {error}"
        took = time.perf_counter() - came
        self.times.answers += 1
        self.times.latest.append(took)
        return pack({ACTIONS: actions, "server_timing": {"infer_ms": 1000 * took}})

    # The network

    async def _answer_all(self, executor: ThreadPoolExecutor) -> None:
        """Answer what waits, pass after pass."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                batch = self._take()
                answers = await loop.run_in_executor(
                    executor, self._act_or_find_fault, [each.request for each in batch]
                )
                for each, answer in zip(batch, answers, strict=True):
                    if each.answer.cancelled():  # its client has gone
                        continue
                    if isinstance(answer, Exception):
                        each.answer.set_exception(answer)
                    else:
                        each.answer.set_result(answer)

    def _take(self) -> list[Waiting]:
        """The requests of the next pass: the oldest, and others with images of the same shapes."""
        shapes = self._waiting[0].request.shapes
        batch: list[Waiting] = []
        others: deque[Waiting] = deque()
        while self._waiting and len(batch) < self._batch_size:
            each = self._waiting.popleft()
            (batch if each.request.shapes == shapes else others).append(each)
        self._waiting.extendleft(reversed(others))
        return batch

    def _act_or_find_fault(self, requests: Sequence[Request]) -> list[np.ndarray | Exception]:
        """Actions of each request; where the pass fails, each alone, so that only the one at fault has an error."""
        try:
            return list(self._act(requests))
        except Exception as error:  # noqa: BLE001  a prompt that the tokenizer does not know, memory, ...
            if len(requests) == 1:
                return [error]
            return [answer for request in requests for answer in self._act_or_find_fault([request])]

    def _act(self, requests: Sequence[Request]) -> np.ndarray:
        noise = []
        for request in requests:
            if request.noise is None:
                self._asked += 1
                noise.append(self._acting.noise((SERVED, self._seed, self._asked)))
            else:
                noise.append(request.noise)
        blank = self._batch_size - len(requests) if self._pad else 0
        rows = [*range(len(requests)), *[0] * blank]
        actions = self._acting.act(
            {name: np.stack([requests[row].images[name] for row in rows]) for name in requests[0].images},
            np.stack([requests[row].state for row in rows]),
            [requests[row].prompt for row in rows],
            np.stack([noise[row] for row in rows]),
        )
        self.times.passes += 1
        if not np.isfinite(actions[: len(requests)]).all():
            raise FloatingPointError("the policy's actions are not finite")
        return actions[: len(requests)]

    def _warm_up(self) -> None:
        """A pass of one request and a full one, so that the first client does not wait for libraries and compilers."""
        size = self._config.image_size
        blank = Request(
            {name: np.zeros((size, size, 3), np.uint8) for name in self.cameras},
            np.zeros(self._config.robot_state_dim, np.float32),
            "",
            self._acting.noise((SERVED, self._seed, 0)),
        )
        for count in {self._batch_size if self._pad else 1, self._batch_size}:
            self._act([blank] * count)
        self.times = Times()


async def serve_until_asked_to_end(
    server: PolicyServer, host: str, port: int, ready: Callable[[int], None]
) -> None:
    """`PolicyServer.run` until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.run(host, port, ready, stop)
