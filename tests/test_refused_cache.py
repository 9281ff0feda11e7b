"""A cache that cannot be written or is full ends a command with one line and the mend, or costs nothing but time."""

import os
import shutil
import subprocess
import sys

import pytest

from pi0 import doctor
from pi0.base.errors import OutputError
from pi0.base.paths import REPO_ROOT, cache_dir, writing_cache
from tests.support.programs import SET_BY_IMPORTS

MEND = "; set PI0_CACHE_DIR to a writable folder with room"
SIMULATED = "--tasks 3 --episodes 1 --max_episode_length 2 --settle_steps 0 --workers 1 --assets standins"
EVALUATION = f"-m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial {SIMULATED} --output $OUT"
TRAINING = (
    "13_train_production_ready.py --config_path configs/minimal_test.yaml --override output_dir=$OUT "
    "task.assets=standins task.num_parallel_envs=1 logging.use_wandb=false"
)
ALONE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def in_own_mounts(mount: str, command: str, tmp_path, **environment) -> subprocess.CompletedProcess:
    """A command after another one has changed what is mounted, for them alone."""
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    places = {
        "REPO": REPO_ROOT,
        "CACHE": tmp_path / "cache",
        "OUT": tmp_path / "out",
        "PYTHON": sys.executable,
    }
    (tmp_path / "cache").mkdir()
    (tmp_path / "out").mkdir()
    theirs = ("PI0_CACHE_DIR", *SET_BY_IMPORTS)  # which the tests' own imports may have set
    variables = {name: value for name, value in os.environ.items() if name not in theirs}
    return subprocess.run(
        [*ALONE, "sh", "-ec", f'{mount}; cd "$REPO"; exec "$PYTHON" {command}'],
        env=variables | {name: str(place) for name, place in places.items()} | environment,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def last_error(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.runs
@pytest.mark.parametrize("command", [EVALUATION, pytest.param(TRAINING, marks=pytest.mark.soak)])
@pytest.mark.tried("A read-only checkout without PI0_CACHE_DIR", "One line: set PI0_CACHE_DIR")
def test_a_read_only_checkout_is_answered_with_what_to_set(tmp_path, command):
    (REPO_ROOT / ".cache").mkdir(exist_ok=True)
    read_only = 'mount --bind "$REPO" "$REPO"; mount -o remount,bind,ro "$REPO"'
    done = in_own_mounts(read_only, command, tmp_path)
    assert done.returncode == 1
    assert (
        last_error(done)
        == f"error: {REPO_ROOT}/.cache cannot be the folder of the cache: it is read-only{MEND}"
    )


@pytest.mark.runs
@pytest.mark.parametrize(
    ("room", "command"),
    [
        ("100k", EVALUATION),  # too little for the stand-ins
        pytest.param("100k", TRAINING, marks=pytest.mark.soak),
        pytest.param("900k", EVALUATION, marks=pytest.mark.soak),  # for what a worker compiles
        pytest.param("900k", TRAINING, marks=pytest.mark.soak),
    ],
)
@pytest.mark.tried(
    "The cache is on a full disk, in evaluation and in training",
    "One line: set PI0_CACHE_DIR to a folder with room; nothing is scored",
)
def test_a_full_cache_is_answered_with_what_to_set(tmp_path, room, command):
    mount = f'mount -t tmpfs -o size={room} tmpfs "$CACHE"'
    done = in_own_mounts(mount, command, tmp_path, PI0_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1, done.stderr
    assert f"PI0_CACHE_DIR = {tmp_path}/cache cannot be the folder of the cache: No space left" in last_error(
        done
    )
    assert last_error(done).endswith(MEND)
    assert not list((tmp_path / "out").rglob("results.json")), "episodes that did not run are no failures"


def write_to_a_full_disk() -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"0")


def test_a_full_disk_is_the_caches_and_other_files_errors_are_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PI0_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match="No space left on device"), writing_cache():
        write_to_a_full_disk()
    (tmp_path / "cache").touch()
    with (
        pytest.raises(OutputError, match=f"PI0_CACHE_DIR = {tmp_path}/cache .*Not a directory"),
        writing_cache(),
    ):
        (tmp_path / "cache" / "scenes").mkdir()
    with pytest.raises(FileNotFoundError), writing_cache():
        (tmp_path / "mesh.obj").read_text()


def test_the_doctor_stops_at_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PI0_CACHE_DIR", str(tmp_path))
    (finding,) = doctor.check_cache()
    assert finding.status in (doctor.OK, doctor.NOTE) and f"free in {cache_dir()}" in finding.text
    (tmp_path / "file").touch()
    monkeypatch.setenv("PI0_CACHE_DIR", str(tmp_path / "file"))
    (finding,) = doctor.check_cache()
    assert finding.status == doctor.STOP and str(finding).endswith(MEND)
    assert [finding.status for finding in doctor.check_assets("standins")] == [doctor.STOP]


@pytest.mark.runs
def test_liberos_configuration_that_cannot_be_written_is_named(tmp_path):
    code = "from pi0.base.errors import run_command; from pi0.libero.libero_import import prepare_libero\n"
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", f"{code}run_command(prepare_libero)"], cwd=REPO_ROOT, capture_output=True, text=True,
        env=os.environ | {"LIBERO_CONFIG_PATH": str(tmp_path / "file" / "below")}, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"error: cannot write {tmp_path}/file/below/config.yaml: Not a directory" in last_error(done)
