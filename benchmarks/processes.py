"""Commands that benchmarks run: those that they measure, each in a process group that ends with them, and whole runs."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pi0.base.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
LIMIT_S = 3600.0  # for a command
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
LIBC = ctypes.CDLL(None)


def require_peers() -> None:
    """Check that the other trainers are there.

    Raises:
        InputError: they are not.
    """
    if not PEERS_PYTHON.exists():
        raise InputError("the other trainers are not installed (.venv-peers): run `make peers`")


def end_on_sigterm() -> None:
    """End the commands' processes on SIGTERM, too, as Ctrl+C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(*command: object, shows_errors: bool = False) -> dict[str, Any]:
    """The JSON that a command prints last; the rest as `start`."""
    return json.loads(start(*command, shows_errors=shows_errors).splitlines()[-1])


def start(*command: object, shows_errors: bool = False) -> str:
    """What a command prints. It and its processes end with this function.

    Args:
        command: its words.
        shows_errors: its standard error, where progress is, goes to this process's.

    Raises:
        InputError: it failed, with its last line.
    """
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    texts = [str(word) for word in command]
    process = subprocess.Popen(
        texts,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=None if shows_errors else subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call, no lock
    )
    try:
        printed, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise InputError(f"`{' '.join(texts)}` took longer than {LIMIT_S:.0f} s") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        process.wait()
    if process.returncode:
        last = ((errors or "").strip() or printed.strip() or "it printed nothing").splitlines()[-1]
        raise InputError(f"`{' '.join(texts)}` failed: {last}")
    return printed


def call_python(*arguments: object) -> None:
    """Run Python with these arguments in the project's folder; shows the command and what it prints.

    Raises:
        InputError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print("$ python", *words, flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise InputError(f"`python {' '.join(words)}` ended with status {status}")


def end_with_parent() -> None:
    """Let this process end when its parent does, even if that is killed; workers end with theirs."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
