"""Serve a policy to robots and simulators, by openpi's protocol.

    python -m pi0.serve --policy_path checkpoints/pi0_tiny_libero_spatial --port 8000

openpi's clients run against it as against openpi's own server: `WebsocketClientPolicy(port=8000).infer(observation)`
with the observations of openpi's LIBERO example. So does `python -m pi0.evaluate --server ws://127.0.0.1:8000`.
http://127.0.0.1:8000/healthz says OK once requests are answered, and /latency has counts and percentiles of answer times.
Requests of several clients go through the network together. SIGTERM or Ctrl+C ends it after the answers to what has come.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.libero.settings import ScoreConfig, range_of
from pi0.policy.command_line import add_policy_options, load_acting

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.serve", description=__doc__, formatter_class=_Formatter
    )
    parser.add_argument("--policy_path", required=True, help="policy folder")
    add_policy_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on; 127.0.0.1: this machine alone; 0.0.0.0: every network it is in, without a password",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=ranged(int, low=0, high=65535), default=8000, help="port; 0: any that is free"
    )
    parser.add_argument(
        "--batch_size",
        type=ranged(int, low=1),
        default=8,
        help="most requests that go through the network together",
    )
    parser.add_argument(
        "--pad", action="store_true",
        help="fill every pass to --batch_size: then an answer does not depend, to the last bit, on how many ask at once",
    )  # fmt: skip
    parser.add_argument(
        "--max_clients",
        type=ranged(int, low=1),
        default=64,
        help="connections at once; more are refused",
    )
    parser.add_argument("--max_message_mb", type=ranged(float, above=0), default=16.0, help="largest request")
    parser.add_argument(
        "--seed", type=range_of(ScoreConfig, "seed"), default=0, help="seed of the policy's noise"
    )
    parser.add_argument(
        "--threads",
        type=ranged(int, low=1),
        help="threads that compute on a CPU; default: all cores for a policy with SigLIP's tower, 1 for a small one",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Load, warm up, serve."""
    options = parse_arguments(arguments)
    acting, config = load_acting(options, options.threads)

    from pi0.serving.server import HEALTH, PolicyServer, serve_until_asked_to_end  # not for `--help`

    server = PolicyServer(
        acting,
        config,
        Path(options.policy_path).resolve().name,
        batch_size=options.batch_size,
        pad=options.pad,
        max_clients=options.max_clients,
        max_message_bytes=int(options.max_message_mb * 2**20),
        seed=options.seed,
    )
    if options.host not in LOOPBACK:
        print(f"{options.host} can be reached from other machines, and there is no password", flush=True)

    def ready(port: int) -> None:
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(
            f"serving {server.metadata['policy']}: ws://{name}:{port}, http://{name}:{port}{HEALTH}",
            flush=True,
        )

    asyncio.run(serve_until_asked_to_end(server, options.host, options.port, ready))
    done = server.times.summary()
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in done["milliseconds"].items())
    print(f"ended: {done['answers']} answers, {done['errors']} errors{', ' if times else ''}{times}")


if __name__ == "__main__":
    run_command(main)
