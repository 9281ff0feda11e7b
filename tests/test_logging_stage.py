"""Stage 11: everything said is in the log, every step in the metrics, WandB and TensorBoard take part for real."""

import base64
import importlib.util
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from pi0.base.paths import REPO_ROOT
from pi0.libero.environments import EVALUATION_STATES
from pi0.report.record import read_run
from pi0.ript.config import load_config
from pi0.ript.metrics import METRICS
from pi0.training.metrics import TensorBoard, finish_wandb

SCRIPT = REPO_ROOT / "11_train_with_logging.py"
CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SHORT = str(REPO_ROOT / "tests" / "support" / "short_practice.py")
SMALL = [
    f"policy_path={CHECKPOINT}", "algo.rloo_batch_size=4", "algo.data_batch_size=8", "algo.train_init_states=8",
    "algo.num_epochs=1", "algo.minibatch_size=6", "training.num_train_steps=2", "evaluation.episodes=2",
    "task.task_names_to_use=[3]", "task.num_parallel_envs=1", "algo.lr=1e-4", "training.optimizer.final_lr_share=0.5",
]  # fmt: skip


def start(output_dir: Path, *overrides: str, processes: int = 1, **options) -> subprocess.Popen:
    """A run with short episodes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [SHORT, str(SCRIPT), "--config_path", "configs/stage11_ript_vla.yaml", "--override"]
    return subprocess.Popen(
        [
            sys.executable,
            *(launch if processes > 1 else []),
            *script,
            *SMALL,
            f"output_dir={output_dir}",
            *overrides,
        ],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: what reached the console, and the folder."""
    output_dir = tmp_path_factory.mktemp("logging")
    process = start(output_dir)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    (run_dir,) = output_dir.glob("stage11_ript_vla-*")
    return output, run_dir


@pytest.mark.runs
def test_it_says_what_it_set_up(run):
    output, run_dir = run
    for line in ("WandB initialised", f"log file {run_dir / 'train_rank0.log'} created", "metrics recorded"):
        assert line in output


@pytest.mark.runs
def test_the_log_has_every_line_of_the_console_and_of_a_progress_bar_only_the_last_state(run):
    output, run_dir = run
    log = (run_dir / "train_rank0.log").read_text()
    assert "\r" not in log
    for line in output.splitlines():
        last_state = line.rpartition("\r")[2]
        if "|" not in last_state:  # redraws of bars are on the console alone
            assert last_state in log
    bars = [line for line in log.splitlines() if line.startswith("rollouts 0:")]
    assert len(bars) == 1
    assert "8/8" in bars[0]


@pytest.mark.runs
def test_each_process_has_a_log_of_its_own_and_one_of_them_the_rest(tmp_path):
    output, _ = (
        process := start(
            tmp_path,
            "task.task_names_to_use=[3, 8]",
            "training.num_train_steps=1",
            "features.save_video=false",
            processes=2,
        )
    ).communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    (run_dir,) = tmp_path.glob("stage11_ript_vla-*")
    first, second = ((run_dir / f"train_rank{rank}.log").read_text() for rank in (0, 1))
    assert "iteration 0: " in first
    assert "iteration 0: " in second
    assert output.count("iteration 0: ") == 1, "the console hears one process"
    (row,) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert row["rollouts"] == 16
    assert {name: count for name, (_, count) in row["tasks"].items()} == dict.fromkeys(row["tasks"], 8)
    assert len(row["tasks"]) == 2
    assert len(list((run_dir / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert output.count("WandB initialised") == 1
    assert (run_dir / "report.html").is_file()


@pytest.mark.runs
def test_every_step_is_a_line_of_metrics_and_every_metric_is_declared(run):
    _, run_dir = run
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 5e-5]), "of the step, not of the next"
    assert read_run(run_dir).declaration == METRICS
    for line in lines:
        assert METRICS.undeclared(line) == []
        assert {"dropped_share", "skipped_share", "skipped_states"} <= set(line)
        successes, rollouts = next(iter(line["tasks"].values()))
        assert (successes, rollouts) == (line["successes"], 8)
        assert line["memory"]["rss_mb"] > 100


@pytest.mark.runs
def test_the_phases_of_a_step_add_up_to_its_time(run):
    _, run_dir = run
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        phases = line["phases"]
        assert min(phases.values()) >= -1e-6
        collecting = sum(phases[name] for name in ("inference", "physics", "render", "wait"))
        assert 0.8 * line["rollout_seconds"] < collecting <= 1.01 * line["rollout_seconds"]
        assert phases["physics"] > phases["render"] > 0


@pytest.mark.runs
def test_the_wandb_run_is_one_that_wandb_sync_accepts(run):
    output, run_dir = run
    folder = Path(re.search(r"upload it with: wandb sync (\S+)", output).group(1))
    assert folder.is_relative_to(run_dir)
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)],
        capture_output=True, text=True, check=False, env={**os.environ, "WANDB_API_KEY": "0" * 40}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert next(folder.glob("run-*.wandb")).name in done.stdout + done.stderr
    assert b"success_rate" in next(folder.glob("run-*.wandb")).read_bytes()


@pytest.mark.runs
def test_the_wandb_run_ends_with_both_scores(run):
    _, run_dir = run
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    summary, kinds = {}, []
    for record in wandb_records(file.read_bytes()):
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
        kinds.append(record.WhichOneof("record_type"))
    results = json.loads((run_dir / "results.json").read_text())
    for when in ("before", "after"):
        assert summary[when] == results[when]["success_rate"]
        assert summary[f"{when}_successes"] == results[when]["successes"]
        assert summary[f"{when}_episodes"] == results[when]["episodes"] == 2
    assert kinds.count("history") == 2
    assert kinds.count("run") >= 1
    assert kinds.count("exit") == 1, "it has ended in order"


def wandb_records(data: bytes) -> Iterator[Record]:
    """Records of a file in LevelDB's log format: 7 bytes, then blocks of pieces: checksum (4), length (2), kind (1)."""
    place, record = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # no room for a piece
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.runs
def test_metrics_that_cannot_be_written_or_sent_are_said_and_end_nothing(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    config = load_config(REPO_ROOT / "configs" / "stage11_ript_vla.yaml", ["logging.log_freq=100"])
    stage = load_script()
    metrics, board = {"step": 1, "rollouts": 4, "successes": 1}, TensorBoard(tmp_path / "tensorboard")
    ended = stage.init_wandb(config, tmp_path)
    ended.finish()
    stage.log_metrics(config, tmp_path, metrics, ended, board)
    assert re.search(r"step 1: metrics or report not written: .*finished", capsys.readouterr().out)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == metrics
    finish_wandb(ended, {"before": [True]})
    assert re.search(r"WandB's run is not finished: .*finished", capsys.readouterr().out)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    stage.log_metrics(config, tmp_path, metrics, None, board)
    assert "step 1: metrics or report not written: [Errno 21] Is a directory" in capsys.readouterr().out


@pytest.mark.runs
def test_tensorboard_has_the_same_numbers(run):
    _, run_dir = run
    (file,) = (run_dir / "tensorboard").glob("events.out.tfevents.*")
    scalars: dict[str, list[float]] = {}
    for event in tensorboard_events(file.read_bytes()):
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append(value.simple_value)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert scalars["rollouts"] == [8, 8]
    assert scalars["successes"] == [line["successes"] for line in lines]
    assert scalars["phases/update"] == pytest.approx([line["phases"]["update"] for line in lines])


def tensorboard_events(data: bytes) -> list[Event]:
    """Events of a file: length (8 bytes), its checksum (4), the event, its checksum (4), and again."""
    events, place = [], 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 16 + length
    return events


@pytest.mark.runs
def test_the_report_stands_by_itself_and_shows_the_run(run):
    _, run_dir = run
    page = (run_dir / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert base64.b64encode((run_dir / "before_after.mp4").read_bytes()).decode()[:200] in page
    assert (run_dir / "plots").is_dir()


@pytest.mark.runs
def test_a_run_in_progress_has_a_report(tmp_path):
    process = start(tmp_path, "training.num_train_steps=50", "logging.use_wandb=false")
    try:
        wait_for(lambda: list(tmp_path.glob("*/report.html")), 200)
        page = next(tmp_path.glob("*/report.html")).read_text()
        assert process.poll() is None, "the page is that of a finished run"
        for part in ("libero_eval", "standins", EVALUATION_STATES.replace("'", "&#x27;")):
            assert part in page, "what its scores will depend on"
    finally:
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert "WandB" not in output


def wait_for(condition, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing came of it"
        time.sleep(0.2)


@pytest.mark.runs
def test_an_uncaught_error_is_in_the_log_with_its_traceback(tmp_path):
    process = start(tmp_path, "algo.lr=1e30", "algo.grad_norm_clip=1e30")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    log = next(tmp_path.glob("*/train_rank0.log")).read_text()
    for text in (output, log):
        assert "Traceback" in text
        assert "FloatingPointError: loss is" in text


@pytest.mark.runs
@pytest.mark.parametrize("key", [None, "0" * 40], ids=["no key", "no network"])
def test_online_without_a_key_or_a_network_trains_offline(tmp_path, key):
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    environment |= {"NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    # A key, but a port where nobody answers.
    unreachable = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"} if key else {}
    # WandB tries again once and soon; else it would for 20 seconds.
    waits = {f"WANDB__GRAPHQL_RETRY_WAIT_{bound}_SECONDS": "0.1" for bound in ("MIN", "MAX")}
    unreachable |= {"WANDB__GRAPHQL_RETRY_MAX": "1", **waits}
    process = start(
        tmp_path,
        "logging.wandb_mode=online",
        "training.num_train_steps=0",
        "features.save_video=false",
        env=environment | unreachable,
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "WandB online is not available" in output
    assert "WandB initialised: offline run" in output


@pytest.mark.runs
def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    process = start(
        tmp_path, "logging.wandb_run_id=ript1234", "training.num_train_steps=0", "features.save_video=false"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "offline run ript1234" in output
    assert list(tmp_path.glob("*/wandb/offline-run-*-ript1234/run-ript1234.wandb"))


# The tee by itself -------------------------------------------------------------------------------------


TEE = """
import importlib.util, os, subprocess, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("stage_11", sys.argv[1])
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
sys.stdout.reconfigure(line_buffering=True)  # as `run_command` does
tees = stage.setup_run_logging(int(sys.argv[3]))
print("before the file has a name")
for tee in tees:
    tee.log_to(Path(sys.argv[2]))
"""


def run_with_tee(tmp_path: Path, code: str, rank: int = 0, **options) -> subprocess.CompletedProcess:
    log = tmp_path / "train.log"
    return subprocess.run(
        [sys.executable, "-c", TEE + code, str(SCRIPT), str(log), str(rank)],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, capture_output=True, text=True,
        check=False, timeout=120, **options,
    )  # fmt: skip


@pytest.mark.runs
def test_child_processes_and_libraries_are_logged_too(tmp_path):
    code = 'subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"]); os.write(1, b"below Python\\n")'
    done = run_with_tee(tmp_path, code)
    log = (tmp_path / "train.log").read_text()
    for line in ("before the file has a name", "from a child", "and its errors", "below Python"):
        assert line in log
    assert "and its errors" in done.stderr
    assert "below Python" in done.stdout


@pytest.mark.runs
def test_other_ranks_are_quiet_on_the_console_and_complete_in_their_log(tmp_path):
    done = run_with_tee(tmp_path, 'print("of rank 1"); print("an error", file=sys.stderr)', rank=1)
    assert done.stdout == ""
    assert "an error" in done.stderr
    log = (tmp_path / "train.log").read_text().splitlines()
    assert [line for line in log if line != "an error"] == ["before the file has a name", "of rank 1"]
    assert "an error" in log  # anywhere: each stream is in order, the two are read apart


@pytest.mark.runs
@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)"])
def test_last_words_before_a_crash_reach_console_and_log(tmp_path, end):
    done = run_with_tee(tmp_path, f'os.write(2, b"terminate called\\n"); {end}')
    assert done.returncode in (-signal.SIGABRT, -signal.SIGKILL)
    for text in (done.stderr, (tmp_path / "train.log").read_text()):
        assert "terminate called" in text
        assert ("Fatal Python error: Aborted" in text) == ("abort" in end), "with the place"


@pytest.mark.runs
def test_ends_of_lines_that_come_in_two_pieces_are_ends_of_lines(tmp_path):
    code = """
import time
for piece in (b"10%\\r20%", b"\\r", b"\\n", b"of another system\\r", b"\\n"):
    os.write(1, piece)
    time.sleep(0.2)
"""
    run_with_tee(tmp_path, code)
    assert (tmp_path / "train.log").read_text().splitlines()[-2:] == ["20%", "of another system"]


@pytest.mark.runs
def test_a_last_line_without_an_end_is_in_the_log(tmp_path):
    done = run_with_tee(tmp_path, 'sys.stdout.write("cut off"); sys.stdout.flush()')
    assert done.stdout.endswith("cut off")
    assert (tmp_path / "train.log").read_text().endswith("\ncut off\n")


@pytest.mark.runs
def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path):
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    code = """
import resource, time
for i in range(100):
    print("line", i, "x" * 60)
    time.sleep(0.005)
print("the end")
time.sleep(0.2)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("room again")
"""
    done = run_with_tee(tmp_path, code, preexec_fn=small_files)
    assert done.returncode == 0, done.stderr
    assert "the end" in done.stdout
    assert "the log file ends here" in done.stdout
    assert "room again" in done.stdout
    assert (tmp_path / "train.log").stat().st_size <= 2000, "it ends where the disk was full, without holes"


@pytest.mark.runs
def test_a_terminal_stays_a_terminal(tmp_path):
    code = "print('a terminal', sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(1).columns)"
    command = [sys.executable, "-c", TEE + code, str(SCRIPT), str(tmp_path / "train.log"), "0"]
    import pty

    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 91, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 4096):
            shown += data
    except OSError:  # all writers are gone
        pass
    assert process.wait(60) == 0
    assert b"a terminal True True 91" in shown


def test_stage_11_is_a_module_without_side_effects():
    stage = load_script()
    assert issubclass(stage._TeeIO, stage.DescriptorTap)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_11", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
