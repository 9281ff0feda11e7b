"""How commands end: Ctrl+C, a reader that has gone, closed streams and narrow terminals leave no traceback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pi0.base.paths import REPO_ROOT
from tests.support.programs import children_of

pytestmark = pytest.mark.runs

POLICY = "checkpoints/pi0_tiny_libero_spatial"
LEAST = [
    "--tasks",
    "3",
    "--episodes",
    "1",
    "--max_episode_length",
    "2",
    "--settle_steps",
    "0",
    "--workers",
    "1",
]
EVALUATE = ["-m", "pi0.evaluate", "--policy_path", POLICY, "--assets", "standins", *LEAST, "--output"]
TRAIN = [
    "--config_path",
    "configs/minimal_test.yaml",
    "--override",
    "task.assets=standins",
    "task.num_parallel_envs=1",
]
DOORS = [
    *sorted(REPO_ROOT.glob("[01][0-9]_train_*.py")),
    *sorted(REPO_ROOT.glob("pi0/[a-z]*.py")),
    *sorted(REPO_ROOT.glob("pi0/*/__main__.py")),
    *sorted(REPO_ROOT.glob("benchmarks/*.py")),
    REPO_ROOT / "tools" / "mutations.py",
]
# One of each kind; the others are started in the same way.
EXAMPLES = (
    "08_train_with_epochs.py",
    "13_train_production_ready.py",
    "pi0/evaluate.py",
    "pi0/stages/__main__.py",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO_ROOT))


def soaked(path: Path) -> list[pytest.MarkDecorator]:
    return [] if name_of(path) in EXAMPLES else [pytest.mark.soak]


# Runs a script as it is started, with a signal where it reads its arguments or, without any, loads its policy.
INTERRUPTED = """
import argparse, runpy, signal, sys
from pi0 import PI0Policy
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
interrupt = lambda *_, **__: signal.raise_signal(signal.SIGINT)
argparse.ArgumentParser.parse_args = PI0Policy.from_pretrained = interrupt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Python with these words, and with Ctrl+C, which is ignored if the tests run in the background.
HEARS_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPO_ROOT, capture_output=True, timeout=100, check=False,
        **({"text": True} | options),
    )  # fmt: skip


@pytest.mark.parametrize("path", [pytest.param(path, marks=soaked(path), id=name_of(path)) for path in DOORS])
@pytest.mark.tried(
    "Ctrl+C while a program reads its arguments or loads its policy", '"interrupted", status 130'
)
def test_ctrl_c_ends_every_program_with_one_line(path):
    done = run("-c", INTERRUPTED, path)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize(
    "command", [EVALUATE, ["09_train_with_config.py", *TRAIN, "output_dir="]], ids=["evaluation", "training"]
)
@pytest.mark.tried("Ctrl+C while workers start", '"interrupted", status 130; no worker is left')
def test_ctrl_c_while_workers_start_leaves_none_of_them(tmp_path, command):
    place = [f"{command[-1]}{tmp_path}"] if command[-1].endswith("=") else [command[-1], str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *command[:-1], *place], cwd=REPO_ROOT, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not (workers := [c for c, words in children_of(process.pid).items() if "pi0.workers" in words]):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.strip().splitlines()[-1] == "interrupted"
    time.sleep(0.1)
    assert not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]


BROKEN = """
import os
from pi0.base.errors import run_command
def main():
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"x")
run_command(main)
"""


def test_a_pipe_of_the_program_itself_that_breaks_is_a_fault_of_the_program():
    done = run("-c", BROKEN)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


LINES = """
import sys
from pi0.base.errors import run_command
def main():
    print("a line")
    print("a fault", file=sys.stderr)
    print("the end")
run_command(main)
"""


@pytest.mark.parametrize("unbuffered", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.tried("Ranks print to one terminal, with PYTHONUNBUFFERED=1", "Lines do not join")
def test_a_line_and_its_end_are_written_at_once(unbuffered):
    reader, writer = os.pipe2(os.O_DIRECT)  # each write is read by itself
    subprocess.run(
        [sys.executable, *unbuffered, "-c", LINES],
        cwd=REPO_ROOT,
        stdout=writer,
        stderr=writer,
        timeout=100,
        check=True,
    )
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        assert list(iter(lambda: pipe.read(4096), b"")) == [b"a line\n", b"a fault\n", b"the end\n"]


FULL = """
import resource, signal, sys
from pathlib import Path
from pi0.base.errors import run_command
from pi0.base.files import write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
run_command(lambda: write_json(Path(sys.argv[1]), "x" * 5000))
"""


@pytest.mark.tried("The disk is full when a command writes its results", "One line with the file, status 1")
def test_a_full_disk_is_one_line_with_the_file(tmp_path):
    done = run("-c", FULL, tmp_path / "results.json")
    assert done.returncode == 1 and os.listdir(tmp_path) == []
    said = f"error: [Errno 27] File too large: '{tmp_path / 'results.json'}'; make room, or choose another folder"
    assert done.stderr.strip() == said


def shell(line: str, tmp_path) -> subprocess.CompletedProcess:
    """A line of a shell, where $EVALUATE is the command, and $? that of the first program of a pipe."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=REPO_ROOT, env=environment, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip


EVALUATED = f'"$PYTHON" {" ".join(EVALUATE)} "$OUT"'


@pytest.mark.parametrize(
    "line",
    [
        '"$PYTHON" -m pi0.stages diff 8 13 | head -1',
        f'"$PYTHON" -m pi0.checkpoint inspect {POLICY} | true',
        f"{EVALUATED} 2>&1 | head -1",
    ],
)
@pytest.mark.tried("`... | head -1`: the reader of the output goes", "Nothing; status 141, as for SIGPIPE")
def test_a_reader_that_goes_ends_a_command_quietly(line, tmp_path):
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_output_to_a_full_disk_is_one_line(tmp_path):
    done = shell('"$PYTHON" -m pi0.stages > /dev/full', tmp_path)
    said = "error: [Errno 28] No space left on device; make room, or choose another folder\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.soak
def test_closed_streams_drop_what_is_written(tmp_path):
    done = shell(f"{EVALUATED} >&- 2>&- <&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize(
    "console",
    [
        "2>&1 >&- | head -1",
        pytest.param("| head -1", marks=pytest.mark.soak),
        pytest.param(">&-", marks=pytest.mark.soak),
    ],
)
@pytest.mark.tried("Standard output or error of a training run is closed", "It goes on; its log file has all")
def test_training_with_a_log_file_goes_on_without_its_console(console, tmp_path):
    least = (
        "training.num_train_steps=1 evaluation.episodes=1 features.save_video=false logging.use_wandb=false"
    )
    more = "task.max_episode_length=2 task.settle_steps=0"
    done = shell(
        f'"$PYTHON" 13_train_production_ready.py {" ".join(TRAIN)} output_dir="$OUT" {least} {more} {console}',
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("*/train_rank0.log")
    assert "score after" in log.read_text() and "Traceback" not in log.read_text()
    assert list(tmp_path.glob("*/results.json"))


@pytest.fixture
def umlauts(tmp_path):
    """A policy folder whose path not every terminal can show."""
    return shutil.copytree(REPO_ROOT / POLICY, tmp_path / "Prüfung" / "Größe")


@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried("An ASCII terminal", "Characters that it cannot show are escapes")
def test_a_terminal_without_umlauts_gets_escapes(umlauts):
    narrow = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run("-m", "pi0.checkpoint", "inspect", umlauts, env=narrow, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/Pr\\xfcfung/Gr\\xf6\\xdfe/model.safetensors" in done.stdout


@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried("LC_ALL=C without UTF-8, folders with umlauts", "The command runs")
def test_a_command_runs_where_the_locale_knows_no_umlauts(umlauts):
    """Names of files are then bytes that no character stands for."""
    command = [umlauts if word == POLICY else word for word in EVALUATE]
    done = run(*command, umlauts / "Maß", env=os.environ | LOCALE, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert "written to " in done.stdout
    assert (umlauts / "Maß" / "results.json").is_file()


@pytest.mark.usefixtures("fresh_python")
def test_a_name_that_the_locale_cannot_express_is_answered_with_what_to_set(tmp_path):
    """As one of a configuration, which is UTF-8 whatever the locale."""
    code = "import os; from pi0.base.errors import run_command\nrun_command(lambda: os.mkdir('Ma\\xdf'))"
    done = run("-c", code, env=os.environ | LOCALE, encoding="ascii")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*'ascii'.*\\xdf.*; set PYTHONUTF8=1\n", done.stderr)
