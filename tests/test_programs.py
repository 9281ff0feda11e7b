"""Python that tests fork from a server does what Python started for real does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.programs import children_of, fresh_python, server

pytestmark = pytest.mark.runs

PROGRAMS = {
    "status": "import sys; print(sys.argv[1:], flush=True); sys.exit(3)",
    "words": "import sys; sys.exit('why')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "interrupted": "import signal; signal.raise_signal(signal.SIGINT)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first')",
    "environment": "import os; print(sorted(os.environ.items()), os.getcwd(), os.getpgrp() == os.getsid(0))",
    "imports": "import sys, __main__; print(sys.path, __main__.__name__, __name__)",
    "input": "print(input(), input())",
    "descriptor": "import os, sys; os.write(int(sys.argv[1]), b'written')",
    "child": "import os, subprocess, sys\n"
    "done = subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True)\nprint(done.stdout)",
}


def outcome(code: str, folder: Path) -> tuple:
    reading, writing = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", code, str(writing)],
        cwd=folder, env={**os.environ, "GIVEN": "1"}, input="a\nb\n", capture_output=True, text=True, check=False,
        pass_fds=[writing], start_new_session=True, timeout=60,
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as written:
        return (
            done.returncode,
            done.stdout.replace(str(writing), "N"),
            done.stderr.splitlines()[-1:],
            written.read(),
        )


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_a_forked_program_does_what_a_fresh_one_does(code, tmp_path):
    forked = outcome(code, tmp_path)
    with fresh_python():
        fresh = outcome(code, tmp_path)
    if "environ" in code:  # the server's imports have set where caches are, as the program's would have done
        assert "('GIVEN', '1')" in forked[1] and forked[1].endswith(f"{tmp_path} True\n")
    else:
        assert forked == fresh


def test_a_forked_program_is_known_by_its_arguments_and_its_parent():
    process = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True); input()", "so-called"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    assert "so-called" in children_of(os.getpid())[process.pid]
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_program_that_is_killed_while_it_starts_another_takes_nobody_with_it():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server().address)  # and ends before it asks
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(server().address)
            job = {
                "words": ["-c", ""], "unbuffered": False, "folder": "/", "environment": {}, "new_session": True,
                "process_group": None, "parent": 0, "descriptors": [],
            }  # fmt: skip
            connection.send(json.dumps(job).encode())
    assert subprocess.check_output([sys.executable, "-c", "print('here')"], text=True) == "here\n"


def test_a_forked_program_draws_numbers_of_its_own():
    code = "import random, numpy as np; print(random.random(), np.random.rand())"
    drawn = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(drawn) == 2


def test_a_forked_program_starts_at_once():
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, mujoco, wandb, pi0.warmstart"], check=True)
    with fresh_python():
        forked, started = time.monotonic() - started, time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch, mujoco, wandb, pi0.warmstart"], check=True)
    assert forked < time.monotonic() - started


@pytest.mark.usefixtures("fresh_python")
def test_python_is_started_for_real_where_a_test_asks_for_it():
    code = "import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
