"""How many requests does a policy server answer, and how fast? For 1, 4 and 16 clients, in batches and one at a time.

    python benchmarks/serve.py
    python benchmarks/serve.py --policy_path checkpoints/pi0_tiny_libero_spatial --clients 1 4 16 --seconds 10 --turns 5
    python benchmarks/serve.py --clients 4 --seconds 1 --turns 1    # does it run?

Both servers are `python -m pi0.serve` with the same policy, one with `--batch_size 1`. They take turns, so that a change of
the machine meets both. A client asks again as soon as it has its answer, with the images and the state of an observation
that was made before. Times are of whole answers, as a client sees them. Ratios are geometric means over the turns of one
run, with Student's 95% intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from processes import end_on_sigterm
from websockets.sync.client import connect

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import InputError, run_command
from pi0.base.progress import progress
from pi0.base.stats import mean_interval
from pi0.serving.messages import IMAGE_KEYS, observation_message, read_actions, unpack

MODES = ("in batches", "one at a time")
ACTION_DIM = 7
PROMPT = "pick up the black bowl on the cookie box and place it on the plate"


def main() -> None:
    """Measure in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy_path", default="checkpoints/pi0_tiny_libero_spatial", help="policy folder")
    parser.add_argument(
        "--clients",
        action=Collect,
        nargs="+",
        type=ranged(int, low=1),
        default=[1, 4, 16],
        help="numbers of clients",
    )
    parser.add_argument("--seconds", type=ranged(float, above=0), default=10.0, help="of each measurement")
    parser.add_argument("--turns", type=ranged(int, low=1), default=5, help="of both servers")
    parser.add_argument(
        "--batch_size",
        type=ranged(int, low=1),
        default=16,
        help="most requests in a pass of the first server",
    )
    parser.add_argument(
        "--threads", type=ranged(int, low=1), help="threads of each server; default: the server's own choice"
    )
    options = parser.parse_args()
    end_on_sigterm()
    found: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
    with contextlib.ExitStack() as stack:
        sizes = zip(MODES, (options.batch_size, 1), strict=True)
        ports = {mode: stack.enter_context(serving(options, size)) for mode, size in sizes}
        total = options.turns * len(options.clients) * len(MODES)
        with progress(total=total, label="serving", unit="measurement") as bar:
            for turn in range(options.turns):
                for clients in options.clients:
                    for mode in MODES if turn % 2 == 0 else MODES[::-1]:
                        rate, times = measure(ports[mode], clients, options.seconds)
                        found.setdefault((mode, clients), []).append((rate, times))
                        bar.update(1, f"{clients} clients, {mode}: {rate:.0f} answers/s")
    print(
        "| clients | server | answers/s, median | p50 | p90 | p99 ms | ratio |\n|---|---|---|---|---|---|---|"
    )
    for clients in options.clients:
        both = [[rate for rate, _ in found[mode, clients]] for mode in MODES]
        logs = [math.log(ours / other) for ours, other in zip(*both, strict=True)]
        mean, low, high = (math.exp(each) for each in mean_interval(logs))
        ratio = f"{mean:.2f} ({low:.2f} to {high:.2f})"
        for mode in MODES:
            times = 1000 * np.concatenate([each for _, each in found[mode, clients]])
            percentiles = " | ".join(f"{value:.1f}" for value in np.percentile(times, [50, 90, 99]))
            rate = statistics.median(rate for rate, _ in found[mode, clients])
            print(
                f"| {clients} | {mode} | {rate:.0f} | {percentiles} | {ratio if mode == MODES[0] else ''} |"
            )


@contextlib.contextmanager
def serving(options: argparse.Namespace, batch_size: int) -> Iterator[int]:
    """A server's port, once it is warm."""
    command = [
        sys.executable, "-m", "pi0.serve", "--policy_path", options.policy_path, "--port", "0",
        "--batch_size", str(batch_size), *(["--threads", str(options.threads)] if options.threads else []),
    ]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        port = re.search(r"ws://127.0.0.1:(\d+)", line)
        if port is None:
            raise InputError(f"the server did not start: {' '.join(command)}")
        yield int(port.group(1))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def measure(port: int, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Answers a second, and the seconds that each took."""
    times: list[list[float]] = [[] for _ in range(clients)]
    errors: list[BaseException] = []
    began = threading.Barrier(clients + 1)
    stop = threading.Event()

    def one(number: int) -> None:
        try:
            with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None) as connection:
                metadata = unpack(connection.recv(timeout=60))
                message = observation(metadata["image_size"], number)
                for _ in range(2):
                    connection.send(message)
                    connection.recv(timeout=600)
                began.wait()
                while not stop.is_set():
                    asked = time.perf_counter()
                    connection.send(message)
                    read_actions(connection.recv(timeout=600), ACTION_DIM, 1)
                    times[number].append(time.perf_counter() - asked)
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            errors.append(error)
            began.abort()

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        began.wait()
    started = time.perf_counter()
    time.sleep(0 if errors else seconds)
    stop.set()
    taken = time.perf_counter() - started
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    answered = [each for of_client in times for each in of_client]
    return len(answered) / taken, answered


def observation(size: int, seed: int) -> bytes:
    """A request with images of noise."""
    random = np.random.default_rng(seed)
    images = {name: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in IMAGE_KEYS.values()}
    return observation_message(images, random.normal(size=8).astype(np.float32), PROMPT, size)


if __name__ == "__main__":
    run_command(main)
