"""Programs under torchrun, on one host or as if on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from pi0.base.paths import REPO_ROOT


def torchrun(
    processes: int, *arguments: str, agent: tuple[str, ...] = ("--standalone",), cwd: Path = REPO_ROOT
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *agent, f"--nproc_per_node={processes}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_hosts(
    port: int, *arguments: str, folders: tuple[Path, Path] = (REPO_ROOT, REPO_ROOT)
) -> list[subprocess.Popen]:
    """Two launchers, as on two hosts, that meet at a port of this one; `folders` are where each is started."""
    agent = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test")
    return [torchrun(1, *arguments, agent=agent, cwd=folder) for folder in folders]


def error_line(output: str) -> str:
    """The one line with which the ranks named an error; if there is not exactly one, the test shows all the output."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
