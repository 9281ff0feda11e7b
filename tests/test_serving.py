"""Policies behind openpi's protocol: messages, the server, the client, and an evaluation through both."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import serve

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.policy.acting import ActingPolicy
from pi0.serving.client import ServedPolicy, ServerError
from pi0.serving.messages import (
    MessageError,
    observation_message,
    pack,
    plain,
    read_actions,
    read_request,
    resize_with_pad,
    unpack,
)
from pi0.serving.server import PolicyServer
from tests.support.episodes import write_chunks
from tests.support.ranks import free_port

CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
PROMPT = "pick up the black bowl on the cookie box and place it on the plate"


@pytest.fixture(scope="module")
def policy():
    return PI0Policy.from_pretrained(CHECKPOINT)


def seen(count: int, seed: int = 0, size: int = 64):
    """Images, states and prompts as a policy acts on them."""
    streams = [np.random.default_rng((seed, row)) for row in range(count)]
    images = {
        name: np.stack([stream.integers(0, 256, (size, size, 3), dtype=np.uint8) for stream in streams])
        for name in CAMERAS
    }
    states = np.stack([stream.normal(size=8).astype(np.float32) for stream in streams])
    return images, states, [PROMPT] * count


def message_of(row: int = 0, noise: np.ndarray | None = None, **changes) -> bytes:
    """A request; `changes` replace its keys, None removes one."""
    images, states, prompts = seen(row + 1)
    frames = {name: each[row] for name, each in images.items()}
    content = unpack(observation_message(frames, states[row], prompts[row], 64, noise))
    for key, value in changes.items():
        name = {"image": "observation/image", "state": "observation/state"}.get(key, key)
        content = {k: v for k, v in content.items() if k != name} | ({} if value is None else {name: value})
    return pack(content)


# Messages ------------------------------------------------------------------------------------------------


def test_a_message_gives_back_what_was_packed():
    value = {
        "numbers": np.arange(6, dtype=np.float32).reshape(2, 3),
        "frame": np.zeros((2, 2, 3), np.uint8),
        "none": np.zeros((0, 7)),
        "one": np.float64(0.5),
        "rest": [1, True, None, "text", b"bytes"],
    }
    back = unpack(pack(value))
    for name in ("numbers", "frame", "none"):
        np.testing.assert_array_equal(back[name], value[name])
        assert back[name].dtype == value[name].dtype
    assert back["one"] == 0.5
    assert back["rest"] == value["rest"]
    assert json.loads(json.dumps(plain(back)))["numbers"] == [[0, 1, 2], [3, 4, 5]]


def array(**changes) -> bytes:
    content = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"a": content | {key.encode(): value for key, value in changes.items()}})


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"", "no MessagePack"),
        (b"\xc1", "no MessagePack"),
        (pack({"a": 1}) + b"\0", "no MessagePack"),
        (pack({"a": np.zeros(100)})[:-1], "no MessagePack"),
        (array(dtype="|O8"), "only numbers"),
        (array(dtype="<U2"), "only numbers"),
        (array(dtype="|V8"), "only numbers"),
        (array(dtype="(9999999,9999999)f8"), "only numbers"),
        (array(dtype="f4,f4"), "only numbers"),
        (array(dtype=7), "only numbers"),
        (array(shape=[3]), "does not have 8 bytes"),
        (array(shape=[-1]), "shape"),
        (array(shape=[2**62, 2**62]), "does not have 8 bytes"),
        (array(shape="ab"), "shape"),
        (array(data="text"), "data"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"dtype": "<i1", b"data": "x"}}), "is no int8"),
    ],
)
@pytest.mark.tried(
    "A hostile message: objects, sizes that do not fit, half a message", "One line that says what is wrong"
)
def test_a_message_that_is_none_is_refused(message, complaint):
    with pytest.raises(MessageError, match=re.escape(complaint)):
        unpack(message)


def test_images_arrive_as_they_were_and_travel_turned_by_180_degrees():
    images, states, prompts = seen(1)
    frames = {name: each[0] for name, each in images.items()}
    message = observation_message(frames, states[0], prompts[0], 64)
    # OpenGL's frame is upside down; openpi turns it by 180 degrees, so upright and mirrored.
    sent = unpack(message)["observation/image"]
    np.testing.assert_array_equal(sent, frames["base_0_rgb"][::-1][::-1, ::-1])
    request = read_request(message, CAMERAS, 8, (10, 8))
    for name in CAMERAS:
        np.testing.assert_array_equal(request.images[name], frames[name])
    np.testing.assert_array_equal(request.state, states[0])
    assert (request.prompt, request.noise) == (prompts[0], None)


def test_floats_and_channels_first_are_taken_as_openpi_takes_them():
    images, *_ = seen(1)
    frame = images["base_0_rgb"][0]
    turned = np.ascontiguousarray(frame[:, ::-1])
    for sent in (np.moveaxis(turned, 2, 0), ((turned + 0.5) / 255.0).clip(0, 1)):
        request = read_request(message_of(image=sent), CAMERAS, 8, (10, 8))
        np.testing.assert_array_equal(request.images["base_0_rgb"], frame)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"image": None},
            "'observation/image' is missing; the keys are observation/state, observation/wrist_image",
        ),
        ({"image": np.zeros((64, 64), np.uint8)}, "must be an image [height, width, 3], not uint8 [64, 64]"),
        ({"image": np.zeros((64, 64, 4), np.uint8)}, "not [64, 64, 4]"),
        ({"image": np.zeros((64, 4, 3), np.uint8)}, "not [64, 4, 3]"),
        ({"image": np.zeros((64, 64, 3), np.uint16)}, "must be uint8, not uint16"),
        ({"image": np.full((64, 64, 3), 2.0)}, "lie between 0 and 1"),
        ({"image": "a picture"}, "must be an image"),
        ({"state": None}, "'observation/state' is missing"),
        ({"state": np.zeros(7)}, "must be numbers [8], not [7]"),
        ({"state": np.full(8, np.nan)}, "'observation/state' is not finite"),
        ({"state": "here"}, "must be numbers [8], not str"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": 3}, "'prompt' must be a text, not int"),
        ({"prompt": "x" * 5000}, "has 5000 characters"),
        ({"noise": np.zeros((3, 8))}, "'noise' must be numbers [10, 8], not [3, 8]"),
    ],
)
def test_a_wrong_request_names_the_key(changes, complaint):
    with pytest.raises(MessageError, match=re.escape(complaint)):
        read_request(message_of(**changes), CAMERAS, 8, (10, 8))
    for other in ("text", pack([1, 2])):
        with pytest.raises(MessageError, match="a request is a"):
            read_request(other, CAMERAS, 8, (10, 8))


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("Traceback: no", "the server's error: Traceback: no"),
        (pack([1]), "an answer is a dictionary, not list"),
        (pack({"action": 1}), "'actions' is missing; the keys are action"),
        (pack({"actions": np.zeros(7)}), "must be numbers [5 or more, 7], not float64 [7]"),
        (pack({"actions": np.zeros((4, 7))}), "not float64 [4, 7]"),
        (pack({"actions": np.zeros((5, 8))}), "not float64 [5, 8]"),
        (pack({"actions": np.full((5, 7), np.inf)}), "'actions' are not finite"),
        (pack({"actions": "left"}), "must be numbers"),
    ],
)
def test_an_answer_without_actions_is_named(answer, complaint):
    with pytest.raises(MessageError, match=re.escape(complaint)):
        read_actions(answer, 7, 5)


def test_an_image_is_resized_without_distortion():
    image = np.full((32, 64, 3), 200, np.uint8)
    small = resize_with_pad(image, 16)
    assert small.shape == (16, 16, 3)
    assert not small[:4].any() and not small[12:].any()
    assert (small[4:12] == 200).all()
    assert resize_with_pad(small, 16) is small


# The server ----------------------------------------------------------------------------------------------


class Served:
    """A `PolicyServer` in a thread of this process."""

    def __init__(self, server: PolicyServer):
        self.server = server
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(60)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.server.run("127.0.0.1", 0, self._is_ready, self._stop)

    def _is_ready(self, port: int) -> None:
        self.port = port
        self._ready.set()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def served(acting: ActingPolicy, policy: PI0Policy, **options) -> Iterator[Served]:
    running = Served(PolicyServer(acting, policy.config, "tiny", **options))
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def client(url: str) -> Iterator[ClientConnection]:
    """A connection after its metadata, as openpi's client makes it."""
    with connect(url, compression=None, max_size=None, proxy=None) as connection:
        assert isinstance(unpack(connection.recv(timeout=30)), dict)
        yield connection


def ask(connection: ClientConnection, message: bytes | str) -> bytes | str:
    connection.send(message)
    return connection.recv(timeout=30)


def test_actions_are_those_of_the_policy_to_the_bit(policy):
    acting = ActingPolicy(policy)
    images, states, prompts = seen(3)
    noise = np.stack([acting.noise((5, row)) for row in range(3)])
    with served(acting, policy, batch_size=4, pad=True) as running, client(running.url) as connection:
        answers = [read_actions(ask(connection, message_of(row, noise[row])), 7, 10) for row in range(3)]
    for row in range(3):  # in a batch of four, as the server makes it
        filled = {name: np.repeat(frames[row : row + 1], 4, 0) for name, frames in images.items()}
        alone = acting.act(
            filled,
            np.repeat(states[row : row + 1], 4, 0),
            prompts[:1] * 4,
            np.repeat(noise[row : row + 1], 4, 0),
        )
        np.testing.assert_array_equal(answers[row], alone[0])


def test_without_noise_every_answer_is_another_and_the_seed_decides_them(policy):
    runs = []
    for seed in (0, 0, 1):
        with (
            served(ActingPolicy(policy), policy, batch_size=1, seed=seed) as running,
            client(running.url) as connection,
        ):
            runs.append([read_actions(ask(connection, message_of()), 7, 10) for _ in range(2)])
    assert not np.array_equal(runs[0][0], runs[0][1])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_requests_of_many_clients_go_through_the_network_together_and_each_gets_its_own(policy):
    acting = ActingPolicy(policy)
    noise = acting.noise((1,))
    with served(acting, policy, batch_size=8) as running:
        with client(running.url) as connection:
            alone = [read_actions(ask(connection, message_of(row, noise)), 7, 10) for row in range(8)]
        answers: dict[int, np.ndarray] = {}
        barrier = threading.Barrier(8)

        def one(row: int) -> None:
            with client(running.url) as connection:
                barrier.wait()
                for _ in range(5):
                    answers[row] = read_actions(ask(connection, message_of(row, noise)), 7, 10)

        threads = [threading.Thread(target=one, args=(row,)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = json.loads(running.get("/latency"))
    for row in range(8):
        np.testing.assert_allclose(answers[row], alone[row], atol=1e-5)
    assert (told["answers"], told["errors"]) == (48, 0)
    assert told["answers_a_pass"] > 1.5
    assert 0 < told["milliseconds"]["p50"] <= told["milliseconds"]["p99"] <= told["milliseconds"]["max"]


class Breaks(ActingPolicy):
    """Cannot act on one prompt."""

    def act(self, images, states, prompts, noise):
        if "poison" in prompts:
            raise ValueError("this prompt breaks it")
        return super().act(images, states, prompts, noise)


@pytest.mark.tried(
    "A client sends garbage, or what the network cannot take",
    "An error for it alone; its next request is answered",
)
def test_a_bad_message_gets_an_error_and_harms_nobody(policy):
    with (
        served(Breaks(policy), policy, batch_size=4) as running,
        client(running.url) as bad,
        client(running.url) as good,
    ):
        for message, complaint in (
            (b"garbage", "MessageError: the message is no MessagePack"),
            ("text", "MessageError: a request is a binary message"),
            (message_of(state=np.zeros(3)), "MessageError: 'observation/state' must be numbers [8]"),
            (message_of(prompt="poison"), "ValueError: this prompt breaks it"),
        ):
            bad.send(message)
            good.send(message_of(1))
            assert read_actions(good.recv(timeout=30), 7, 10).shape == (10, 7)
            answer = bad.recv(timeout=30)
            assert isinstance(answer, str) and complaint in answer
        assert read_actions(ask(bad, message_of()), 7, 10).shape == (10, 7)
        assert json.loads(running.get("/latency"))["errors"] == 4


def test_images_of_several_sizes_are_answered_together_with_their_like(policy):
    with (
        served(ActingPolicy(policy), policy) as running,
        client(running.url) as one,
        client(running.url) as other,
    ):
        images, states, prompts = seen(1, size=224)
        large = observation_message(
            {name: each[0] for name, each in images.items()}, states[0], prompts[0], 224
        )
        for _ in range(3):
            one.send(large)
            other.send(message_of())
            assert read_actions(one.recv(timeout=30), 7, 10).shape == (10, 7)
            assert read_actions(other.recv(timeout=30), 7, 10).shape == (10, 7)


def test_health_limits_and_the_end(policy):
    running = Served(
        PolicyServer(ActingPolicy(policy), policy.config, "tiny", max_clients=2, max_message_bytes=100_000)
    )
    assert running.get("/healthz") == "OK\n"
    with client(running.url) as first, client(running.url) as second:
        with pytest.raises(InvalidStatus, match="503"):
            connect(running.url, proxy=None)
        with pytest.raises(ConnectionClosed, match="1009"):  # too big
            ask(first, b"\0" * 200_000)
        assert read_actions(ask(second, message_of()), 7, 10).shape == (10, 7)
        second.send(message_of())  # under way when the end is asked for
        deadline = time.monotonic() + 10
        while running.server.times.answers < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        running.end()
        with pytest.raises(ConnectionClosed):
            second.recv(timeout=30)
            second.recv(timeout=30)
    with pytest.raises(urllib.error.URLError):
        running.get("/healthz")


def test_a_port_that_is_taken_is_named(policy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = PolicyServer(ActingPolicy(policy), policy.config, "tiny")
        with pytest.raises(
            InputError, match=f"cannot listen on 127.0.0.1:{port}: .*; take another --port or --host"
        ):
            asyncio.run(server.run("127.0.0.1", port, lambda _: None, asyncio.Event()))


# The client ----------------------------------------------------------------------------------------------

Handler = Callable[[ClientConnection], None]


@contextlib.contextmanager
def scripted(handler: Callable, port: int = 0) -> Iterator[str]:
    """A server that does what a test says."""
    with serve(handler, "127.0.0.1", port, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def answering(actions: np.ndarray, metadata: dict | None = None, received: list | None = None) -> Callable:
    def handle(connection) -> None:
        connection.send(pack(metadata or {}))
        for message in connection:
            if received is not None:
                received.append(unpack(message))
            connection.send(pack({"actions": actions}))

    return handle


def test_a_server_that_says_nothing_of_itself_gets_what_openpis_example_sends():
    received: list[dict] = []
    actions = np.linspace(-2, 2, 50 * 7).reshape(50, 7)
    with scripted(answering(actions, received=received)) as url, ServedPolicy(url, connections=2) as policy:
        assert (policy.config.image_size, policy.config.action_horizon, policy.config.cameras) == (
            224,
            50,
            CAMERAS,
        )
        assert policy.noise((1, 2)).shape == (0,)
        images, states, prompts = seen(3, size=256)
        prompts[1] = ""  # nobody's row
        received.clear()
        chunks = policy.act(images, states, prompts, np.zeros((3, 0), np.float32))
    assert chunks.shape == (3, 50, 7)
    np.testing.assert_allclose(chunks[0], actions.clip(-1, 1), atol=1e-6)
    assert not chunks[1].any()
    assert len(received) == 2
    for content in received:
        assert set(content) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
        assert content["observation/image"].shape == (224, 224, 3)
        assert content["prompt"] == PROMPT


def test_a_chunk_may_be_cut_and_not_made_longer():
    with scripted(answering(np.zeros((10, 7)))) as url:
        with ServedPolicy(url, chunk_length=5) as policy:
            assert policy.config.action_horizon == 5
        with pytest.raises(InputError, match="its chunks have 10 actions, and 20 are asked for"):
            ServedPolicy(url, chunk_length=20)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("Traceback: out of memory", "the server's error: Traceback: out of memory"),
        (b"nonsense", "the message is no MessagePack"),
        (
            pack({"actions": np.zeros((10, 14))}),
            "'actions' must be numbers [1 or more, 7], not float64 [10, 14]",
        ),
        (pack({"actions": np.full((10, 7), np.nan)}), "'actions' are not finite"),
    ],
)
@pytest.mark.tried(
    "A policy server answers nonsense, an error or another shape",
    "The evaluation ends and names it; no score",
)
def test_a_server_that_answers_something_else_ends_the_evaluation(answer, complaint):
    def handle(connection) -> None:
        connection.send(pack({}))
        for _ in connection:
            connection.send(answer)

    with scripted(handle) as url, pytest.raises(ServerError, match=re.escape(complaint)):
        ServedPolicy(url)


@pytest.mark.tried("A policy server is restarted in an evaluation", "It is waited for and asked again")
def test_a_server_that_restarts_is_asked_again():
    said: list[str] = []
    with scripted(answering(np.full((10, 7), 0.25))) as url:
        policy = ServedPolicy(url, connections=2, report=said.append)
    port = int(url.rpartition(":")[2])
    images, states, prompts = seen(2, size=224)
    results: list[np.ndarray] = []
    thread = threading.Thread(
        target=lambda: results.append(policy.act(images, states, prompts, np.zeros((2, 0), np.float32)))
    )
    thread.start()
    time.sleep(1.2)  # it finds nobody
    assert not results
    with scripted(answering(np.full((10, 7), 0.5)), port):
        thread.join(30)
        policy.close()
    assert (results[0] == 0.5).all()
    assert said and f"waiting for a policy server at {url}" in said[0]


def test_a_server_that_comes_back_as_another_policy_ends_the_evaluation():
    with scripted(answering(np.zeros((10, 7)), {"policy": "one"})) as url:
        policy = ServedPolicy(url, connections=1, report=lambda _: None)
    images, states, prompts = seen(1, size=224)
    with (
        scripted(answering(np.zeros((10, 7)), {"policy": "other"}), int(url.rpartition(":")[2])),
        pytest.raises(ServerError, match="came back as another policy"),
    ):
        policy.act(images, states, prompts, np.zeros((1, 0), np.float32))
    policy.close()


@pytest.mark.tried(
    "A policy server does not answer, or is not there",
    "Waited for as long as allowed, then one line; no score",
)
def test_a_server_that_does_not_answer_is_waited_for_only_so_long():
    def silent(connection) -> None:
        connection.send(pack({}))
        for _ in connection:
            pass

    with (
        scripted(silent) as url,
        pytest.raises(ServerError, match="has not answered for 1 s; nothing was scored"),
    ):
        ServedPolicy(url, patience_s=1, connections=1)
    with pytest.raises(ServerError, match="cannot be reached for 1 s: .*; start the server"):
        ServedPolicy(url, patience_s=1, report=lambda _: None)
    for address in ("http://127.0.0.1:1", "127.0.0.1", "ws://"):
        with pytest.raises(InputError, match="is no address of a server, such as ws://127.0.0.1:8000"):
            ServedPolicy(address)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"image_size": 100_000}, "wants images of 100000 pixels a side; 8 to 4096 can be sent"),
        ({"noise_shape": [10**6, 10**6]}, "asks for noise of the shape"),
        ({"noise_shape": "much"}, "asks for noise of the shape 'much'"),
    ],
)
def test_metadata_that_cannot_be_meant_are_named(metadata, complaint):
    with (
        scripted(answering(np.zeros((10, 7)), metadata)) as url,
        pytest.raises(InputError, match=re.escape(complaint)),
    ):
        ServedPolicy(url)


def test_a_policy_of_another_robot_is_refused():
    with (
        scripted(answering(np.zeros((10, 14)), {"state_dim": 14, "action_dim": 14})) as url,
        pytest.raises(InputError, match="of another robot, whose state has 14 features"),
    ):
        ServedPolicy(url)


SHORT = ["--tasks", "3", "8", "--episodes", "8", "--assets", "standins", "--max_episode_length", "120"]

# Programs ------------------------------------------------------------------------------------------------


def start_server(*options: str) -> tuple[subprocess.Popen, int]:
    """`python -m pi0.serve` with the tiny policy, when it is ready; and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pi0.serve", "--policy_path", str(CHECKPOINT), "--port", "0", *options],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    return process, int(re.search(r"ws://127.0.0.1:(\d+)", line).group(1))


@pytest.mark.runs
def test_a_served_policy_gets_the_scores_of_the_local_one_episode_by_episode(tmp_path):
    process, port = start_server("--batch_size", "4", "--pad", "--threads", "1")
    try:
        scores = {}
        for name, source in (
            ("served", ["--server", f"ws://127.0.0.1:{port}"]),
            ("local", ["--policy_path", str(CHECKPOINT)]),
        ):
            folder = tmp_path / name
            subprocess.run(
                [sys.executable, "-m", "pi0.evaluate", *source, *SHORT, "--videos", "1", "--output", str(folder)],
                cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, check=True, timeout=300,
            )  # fmt: skip
            scores[name] = json.loads((folder / "results.json").read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    served, local = scores["served"], scores["local"]
    assert served["outcomes"] == local["outcomes"]
    assert {each["success"] for each in served["outcomes"]} == {True, False}
    assert served["server"] == f"ws://127.0.0.1:{port}"
    assert served["metadata"]["policy"] == CHECKPOINT.name
    for key in ("image_size", "replan_steps", "horizon", "cameras"):
        assert served["protocol"][key] == local["protocol"][key]
    films = [sorted(file.name for file in (tmp_path / name).glob("*.mp4")) for name in scores]
    assert films[0] == films[1] and len(films[0]) == 2
    assert process.returncode == 0
    assert re.search(r"ended: \d+ answers, 0 errors, p50 [\d.]+ ms", rest)


@pytest.mark.runs
def test_a_server_ends_by_ctrl_c_and_refuses_a_folder_that_is_none(tmp_path):
    process, port = start_server("--batch_size", "1")
    with client(f"ws://127.0.0.1:{port}") as connection:
        assert read_actions(ask(connection, message_of()), 7, 10).shape == (10, 7)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.startswith("ended: 1 answers, 0 errors")) == (0, True)
    wrong = subprocess.run(
        [sys.executable, "-m", "pi0.serve", "--policy_path", str(tmp_path)], cwd=REPO_ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ") and "has no model.safetensors" in wrong.stderr


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.parametrize("module", ["pi0.evaluate", "pi0.serve"])
def test_help_is_there_before_what_takes_seconds_to_load(module):
    code = (
        f"import sys, {module} as door\ntry: door.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'mujoco', 'websockets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    )
    assert "--policy_path" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried("websockets or msgpack is not installed", "One line with the command that installs them")
def test_packages_of_the_extra_that_are_missing_are_named():
    code = (
        "import importlib.util as util, runpy, sys\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'websockets' else find(name, *rest)\n"
        "sys.argv = ['pi0.evaluate', '--server', 'ws://127.0.0.1:1']\n"
        "runpy.run_module('pi0.evaluate', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: websockets not installed: pip install websockets==")


@pytest.mark.runs
def test_options_of_a_folder_do_not_go_with_a_server():
    for option in (["--critic_path", "here"], ["--guidance_weight", "1"], ["--compile"]):
        done = subprocess.run(
            [sys.executable, "-m", "pi0.evaluate", "--server", "ws://127.0.0.1:1", *option], cwd=REPO_ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert f"{option[0]} is for --policy_path; start the server with it" in done.stderr


# openpi's own code ---------------------------------------------------------------------------------------

OPENPI_PYTHON = REPO_ROOT / ".venv-openpi" / "bin" / "python"  # make openpi


@pytest.mark.soak
def test_openpis_client_gets_the_policys_actions(policy, tmp_path):
    images, states, prompts = seen(1, size=256)
    random = np.random.default_rng(1)
    wide = random.integers(0, 256, (200, 256, 3), dtype=np.uint8)  # it is resized with borders
    noise = ActingPolicy(policy).noise((4,))
    np.savez(
        tmp_path / "observation.npz",
        **{
            "observation/image": wide,
            "observation/wrist_image": images["left_wrist_0_rgb"][0][:, ::-1],
            "observation/state": states[0].astype(np.float64),
            "prompt": np.array(prompts[0]),
            "noise": noise,
        },
    )
    with served(ActingPolicy(policy), policy, batch_size=1) as running:
        script = REPO_ROOT / "tests" / "support" / "ask_by_openpi.py"
        files = tmp_path / "observation.npz", tmp_path / "actions.npz"
        subprocess.run([OPENPI_PYTHON, script, str(running.port), *files], check=True, timeout=100)
    got = np.load(tmp_path / "actions.npz")
    frames = {"base_0_rgb": wide[None, :, ::-1].copy(), "left_wrist_0_rgb": images["left_wrist_0_rgb"]}
    same_size = {"base_0_rgb": frames["base_0_rgb"], "left_wrist_0_rgb": frames["left_wrist_0_rgb"]}
    expected = ActingPolicy(policy).act(same_size, states, prompts, noise[None])[0]
    for actions in got["actions"]:
        np.testing.assert_allclose(actions, expected, atol=1e-6)
    assert "'policy': 'tiny'" in str(got["metadata"])
    assert (got["milliseconds"] > 0).all()
    assert "'observation/state' must be numbers [8], not [3]" in str(got["error"])
    np.testing.assert_array_equal(resize_with_pad(wide, 224), got["resized"])


@pytest.mark.soak
def test_openpis_server_is_scored_by_what_its_policy_does(tmp_path):
    """A server that repeats the recorded chunks of a policy gets that policy's outcomes, episode by episode."""
    from pi0.libero.environments import Environments
    from pi0.libero.evaluation import evaluate
    from pi0.libero.settings import TaskConfig

    policy = PI0Policy.from_pretrained(CHECKPOINT)
    task = TaskConfig(task_names_to_use=[3, 8], assets="standins", max_episode_length=120, replan_steps=5)
    with Environments(task, policy.config) as environments:
        known = evaluate(environments, ActingPolicy(policy), 8, 0)
    write_chunks(tmp_path / "table.npz", known.episodes)
    port = free_port()
    script = REPO_ROOT / "tests" / "support" / "serve_by_openpi.py"
    server = subprocess.Popen(
        [OPENPI_PYTHON, script, tmp_path / "table.npz", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        subprocess.run(
            [sys.executable, "-m", "pi0.evaluate", "--server", f"ws://127.0.0.1:{port}", "--server_patience", "30", *SHORT, "--output", tmp_path],
            cwd=REPO_ROOT, check=True, timeout=300,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    scored = json.loads((tmp_path / "results.json").read_text())
    assert [each["success"] for each in scored["outcomes"]] == known.outcomes
    assert [each["steps"] for each in scored["outcomes"]] == [episode.steps for episode in known.episodes]
    assert set(known.outcomes) == {True, False}
    assert scored["metadata"] == {"who": "openpi"}
    assert (scored["protocol"]["image_size"], scored["protocol"]["replan_steps"]) == (256, 5)
