"""Python programs as processes forked from a server that has made their imports.

A stage's imports take three seconds and those of its rollout worker two, on top of each of its runs. A process that is
forked from the server has them in milliseconds, and is otherwise a process as any: with arguments, environment,
folder, standard streams, inherited descriptors, signals, and an exit status of its own. The Python programs that it starts
are forked from the same server: torchrun's ranks, rollout workers.

`install` makes `subprocess.Popen` start Python so. What a forked program cannot show is started for real, by the
fixture `fresh_python`: what an interpreter does at its start, what is imported by whom, how much memory is taken, and what
depends on the seed of `hash`, which all programs of one server share.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pi0.base.paths import REPO_ROOT

# What stages, commands, launchers and rollout workers import.
IMPORTED = (
    "pi0.doctor", "pi0.evaluate", "pi0.warmstart", "pi0.report.html_report", "pi0.libero.gym_env", "pi0.libero.worker",
    "pi0.libero.controller", "libero.libero.envs.problems", "matplotlib.pyplot", "torch.distributed.fsdp",
    "torch.distributed.run", "wandb", "tensorboardX", "av",
)  # fmt: skip
# Imports depend on them: a program that is to have others than the server is started for real.
DECIDE_IMPORTS = ("HOME", "PI0_CACHE_DIR", "LIBERO_CONFIG_PATH", "MUJOCO_GL")
# Set by an import for those that come after it.
SET_BY_IMPORTS = ("LIBERO_CONFIG_PATH", "MPLCONFIGDIR", "MESA_SHADER_CACHE_DIR", "NUMBA_CACHE_DIR")
ROOM_FOR_ARGUMENTS = 16384
ABOVE_ALL_DESCRIPTORS = 512

_RealPopen = subprocess.Popen
_environment = dict(os.environ)  # before any test has changed it


class Program(_RealPopen):
    """A process, as of `subprocess.Popen`; one of Python's is forked from the server if it can be.

    Attributes:
        fresh: whether Python is started for real, too.
    """

    fresh = False
    _exit_status: socket.socket | None = None

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group,
    ):  # fmt: skip
        words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
        environment = {
            os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()
        }
        unbuffered = words[1:2] == ["-u"]
        if unbuffered:
            del words[1]
        forkable = words[:1] == [sys.executable] and (words[1:2] in (["-m"], ["-c"]) or words[1][0] != "-")
        if Program.fresh or not forkable or preexec_fn or executable or not server().suits(environment):
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
        sys.audit("subprocess.Popen", executable, args, cwd, env)
        job = {
            "words": words[1:],
            "unbuffered": unbuffered,
            "folder": os.path.abspath(cwd or os.getcwd()),
            "environment": environment,
            "new_session": start_new_session,
            "process_group": process_group,
            "parent": os.getpid(),
            "descriptors": [0, 1, 2, *pass_fds],
        }
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid, self._exit_status = server().fork(job, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        if self._exit_status is None:
            return super()._try_wait(wait_flags)
        try:
            answer = self._exit_status.recv(4, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        self._exit_status.close()
        return self.pid, struct.unpack("i", answer)[0] if answer else signal.SIGKILL  # with its server

    def _internal_poll(self, _deadstate=None, **options):
        if self._exit_status is None:
            return super()._internal_poll(_deadstate, **options)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


@contextlib.contextmanager
def fresh_python() -> Iterator[None]:
    """Meanwhile Python is started for real."""
    before, Program.fresh = Program.fresh, True
    try:
        yield
    finally:
        Program.fresh = before


def install() -> None:
    """Make `subprocess` start Python as `Program` does, in this process and those forked for it."""
    subprocess.Popen = Program


class Server:
    """The server as a process sees it that asks for programs.

    Args:
        address: of its socket.
        environment: of its imports, where programs depend on it.
    """

    def __init__(self, address: str, environment: dict[str, str | None]):
        self.address = address
        self.environment = environment

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether a program with this environment would have made the same imports."""
        return all(
            environment.get(name, own if name in ("LIBERO_CONFIG_PATH", "MUJOCO_GL") else None) == own
            for name, own in self.environment.items()
        )

    def fork(self, job: dict, descriptors: list[int]) -> tuple[int, socket.socket]:
        """Process id of the new program, and the socket on which its exit status will come."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self.address)
        message = json.dumps(job).encode()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(message))
        socket.send_fds(connection, [message], descriptors)
        answer = connection.recv(4)
        if not answer:
            raise OSError("the server of programs has ended")
        return struct.unpack("i", answer)[0], connection


_server: Server | None = None
_keep: list = []  # the server ends when this is closed, with this process
_lock = threading.Lock()


def server() -> Server:
    """The server of this process, started when it is first needed."""
    global _server
    with _lock:
        if _server is None:
            address = f"\0pi0-tests-{os.getpid()}"
            code = "import sys; from tests.support.programs import serve; serve(sys.argv[1])"
            process = _RealPopen(
                [sys.executable, "-c", code, address[1:], " " * ROOM_FOR_ARGUMENTS],
                cwd=REPO_ROOT, env={**_environment, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            _keep.append(process)
            line = process.stdout.readline()
            if not line:
                raise OSError(f"the server of programs ended with {process.wait()} at its start")
            _server = Server(address, json.loads(line))
    return _server


def children_of(pid: int) -> dict[int, str]:
    """Programs that a process has started and that are there, by process id their arguments; forked ones, too."""
    own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if process.name in own or f"PARENT={pid}" in arguments:
            found[int(process.name)] = " ".join(filter(None, arguments))
    return found


# In the server ------------------------------------------------------------------------------------------


def serve(name: str) -> None:
    """Fork programs for those who ask at the abstract socket `name`, until standard input is closed.

    Returns in each of the forked processes when its program has come to its end, so that Python ends it as any.
    """
    global _server
    from pi0.libero import gl
    from pi0.libero.libero_import import prepare_libero

    gl.select_backend()
    prepare_libero()
    for module in IMPORTED:
        importlib.import_module(module)
    install()
    sys.modules[
        "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    ].Popen = Program
    _server = Server(f"\0{name}", {variable: os.environ.get(variable) for variable in DECIDE_IMPORTS})
    set_by_imports = {variable: os.environ[variable] for variable in SET_BY_IMPORTS if variable in os.environ}
    ctypes.pythonapi.Py_IncRef(ctypes.py_object([dict(vars(module)) for module in sys.modules.values()]))
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(_server.address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    os.write(1, json.dumps(_server.environment).encode() + b"\n")
    running: dict[
        int, tuple[int, socket.socket]
    ] = {}  # by descriptor of the process: its id, who waits for it
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 64)
                if not message:  # who asked was killed before it could say for what
                    connection.close()
                    continue
                job = json.loads(message)
                if (pid := os.fork()) == 0:
                    for theirs in (listener, selector, connection, *(waits for _, waits in running.values())):
                        theirs.close()
                    for descriptor in running:
                        os.close(descriptor)
                    _become(job, descriptors, set_by_imports)
                    return
                for descriptor in descriptors:
                    os.close(descriptor)
                running[process := os.pidfd_open(pid)] = pid, connection
                selector.register(process, selectors.EVENT_READ)
                _send(connection, pid)
            else:
                selector.unregister(key.fd)
                pid, connection = running.pop(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                _send(connection, status)
                connection.close()


def _send(connection: socket.socket, number: int) -> None:
    try:
        connection.send(struct.pack("i", number))
    except OSError:  # nobody waits for it any more, as when who asked was killed
        pass


def _become(job: dict, descriptors: list[int], set_by_imports: dict[str, str]) -> None:
    """Go on as the program of a job."""
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, ABOVE_ALL_DESCRIPTORS) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for place, descriptor in zip(job["descriptors"], aside, strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    if job["new_session"]:
        os.setsid()
    else:
        os.setpgid(0, 0 if job["process_group"] in (None, -1) else job["process_group"])
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update({**set_by_imports, **job["environment"]})
    rank = [f"RANK={os.environ['RANK']}"] if "RANK" in os.environ else []
    _show_arguments([sys.executable, *job["words"], *rank, f"PARENT={job['parent']}"])
    random.seed()
    np.random.seed()
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = given + [path for path in sys.path[1:] if path not in _environment.get("PYTHONPATH", "")]
    _open_streams(job["unbuffered"])
    words = job["words"]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)  # noqa: S102 as `python -c` does
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        if not hasattr(sys.modules.get(words[1]), "__path__"):
            sys.modules.pop(words[1], None)  # it runs as __main__, and was imported for others
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _open_streams(unbuffered: bool) -> None:
    """As Python does at its start: those of the server are for files of another kind."""
    errors = {"buffering": 1, "errors": "backslashreplace"}
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", 1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", **errors, closefd=False)  # noqa: SIM115
    if unbuffered:
        raw = io.FileIO(1, "w", closefd=False)
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(raw, sys.stdout.encoding, write_through=True)


def _show_arguments(words: list[str]) -> None:
    """Let /proc and `ps` show them: rank and parent too, since the process was forked from the server."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    shown = b"\0".join(word.encode() for word in words)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
