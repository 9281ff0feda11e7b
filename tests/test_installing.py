"""`python -m pi0` with its commands, and the project installed by pip in an empty environment (docs/installing.md)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pi0.__main__ import MODULES
from pi0.base.paths import REPO_ROOT


def run(*command: object, cwd: Path = REPO_ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.runs
def test_every_command_is_listed_and_is_its_module():
    listed = run(sys.executable, "-m", "pi0", "--help")
    assert listed.returncode == 0
    for name in (*MODULES, "train", "examples"):
        assert re.search(rf"^  {name} +[A-Z`]", listed.stdout, re.MULTILINE), name
    # python -m pi0 evaluate --help
    for name, module in (("evaluate", "pi0.evaluate"), ("doctor", "pi0.doctor")):
        ours, module_s = (run(sys.executable, "-m", *words, "--help") for words in (("pi0", name), (module,)))
        assert (ours.returncode, ours.stdout) == (0, module_s.stdout)


@pytest.mark.runs
def test_what_is_no_command_or_no_new_folder_is_named(tmp_path):
    wrong = run(sys.executable, "-m", "pi0", "evalute")
    assert wrong.returncode == 2
    assert (
        "pi0: error: argument COMMAND: invalid choice: 'evalute' (choose from 'evaluate', 'serve', "
        in wrong.stderr
    )
    there = run(sys.executable, "-m", "pi0", "examples", tmp_path)
    assert there.returncode == 1 and f"{tmp_path} is there already" in there.stderr
    none = run(sys.executable, "-m", "pi0", "examples")
    assert none.returncode == 1 and "name one folder" in none.stderr


@pytest.mark.runs
def test_examples_are_what_the_readmes_commands_name(tmp_path):
    done = run(sys.executable, "-m", "pi0", "examples", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    copied = {
        str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*") if file.is_file()
    }
    named = set(
        re.findall(r"(?:configs/\w+\.yaml|[01]\d_train_\w+\.py)", (REPO_ROOT / "README.md").read_text())
    )
    assert named <= copied
    starts = (file.relative_to(REPO_ROOT) for file in (REPO_ROOT / "checkpoints").glob("*/model.safetensors"))
    assert {str(file) for file in starts} <= copied


def documented_commands() -> list[str]:
    """The two lines of docs/installing.md that install the project and LIBERO."""
    text = (REPO_ROOT / "docs" / "installing.md").read_text()
    return re.findall(r"^    pip (install .*)$", text, re.MULTILINE)[:2]


@pytest.mark.soak
def test_installed_by_pip_it_evaluates_trains_and_serves_far_from_the_checkout(tmp_path):
    """What docs/installing.md does; 2 GB and two minutes."""
    checkout = tmp_path / "checkout"
    tracked = run("git", "ls-files", "-z").stdout.split("\0")
    for name in filter(None, tracked):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO_ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "ript"], check=True)
    bin_folder = tmp_path / "ript" / "bin"
    alone, both = {"PYTHONPATH": "", "PI0_CACHE_DIR": ""}, documented_commands()
    assert len(both) == 2
    for number, command in enumerate(both):
        words = command.replace('"', "").split()
        done = run(bin_folder / "pip", *words, cwd=checkout, **alone)
        assert done.returncode == 0, done.stderr
        if number == 0:
            shown = run(bin_folder / "pi0", "evaluate", "--policy_path", "x", cwd=tmp_path, **alone)
            assert "error: " in shown.stderr
    shutil.rmtree(checkout)

    home = {**alone, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", "WANDB_MODE": "offline"}
    pi0 = bin_folder / "pi0"
    assert run(pi0, "examples", "practice", cwd=tmp_path, **home).returncode == 0
    practice = tmp_path / "practice"
    short = ["--tasks", "3", "--episodes", "2", "--assets", "standins", "--max_episode_length", "20"]
    policy = "checkpoints/pi0_tiny_libero_spatial"
    scored = run(pi0, "evaluate", "--policy_path", policy, *short, cwd=practice, **home)
    assert scored.returncode == 0 and "0/2" in scored.stdout, scored.stderr
    assert (tmp_path / "home" / ".cache" / "ript-pi0" / "standins").is_dir()
    config = ["--config_path", "configs/minimal_test.yaml", "--override", "task.max_episode_length=20"]
    trained = run(pi0, "train", *config, cwd=practice, **home)
    assert trained.returncode == 0, trained.stderr
    assert list((practice / "outputs").glob("minimal-*/policy/model.safetensors"))
    assert "acrlpd_quickstart" in run(pi0, "acrlpd", "--list", cwd=practice, **home).stdout
    doctor = run(pi0, "doctor", cwd=practice, **home)
    assert "nothing would stop a run" in doctor.stdout, doctor.stdout
    server = subprocess.Popen(
        [pi0, "serve", "--policy_path", policy, "--port", "0"], cwd=practice, env={**os.environ, **home},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "serving pi0_tiny_libero_spatial: ws://127.0.0.1:" in server.stdout.readline()
    finally:
        server.terminate()
        assert server.wait(60) == 0


def dockerfile_steps() -> list[tuple[str, str]]:
    """Instructions and their arguments."""
    lines = (REPO_ROOT / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def test_the_dockerfile_copies_what_is_there_and_installs_what_set_up_asks_for():
    steps = dockerfile_steps()
    for kind, words in steps:
        if kind == "COPY":
            assert (REPO_ROOT / words.split()[0]).exists(), words
    (system,) = [words for kind, words in steps if kind == "RUN" and "apt-get" in words]
    set_up = (REPO_ROOT / "tools" / "setup.py").read_text()
    for package in ("libegl1", "libgl1-mesa-dri", "libosmesa6"):
        assert package in system and f'"{package}"' in set_up
    assert steps[-1] == ("CMD", '["make", "quickstart"]')
    ignored = (REPO_ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", ".cache", "outputs"} <= set(ignored)


@pytest.mark.soak
def test_the_steps_of_the_dockerfile_run_in_an_empty_folder(tmp_path):
    """All but apt-get, whose packages `make setup` installs where it may; then the quickstart, cut short."""
    tracked = [name for name in run("git", "ls-files", "-z").stdout.split("\0") if name]
    for kind, words in dockerfile_steps():
        if kind == "COPY":
            source = words.split()[0]
            for name in tracked if source == "." else [source]:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPO_ROOT / name, tmp_path / name)
        elif kind == "RUN" and "apt-get" not in words:
            done = run("sh", "-c", words, cwd=tmp_path, TORCH="cpu", PYTHONPATH="", PI0_CACHE_DIR="")
            assert done.returncode == 0, done.stdout + done.stderr
    short = (
        "training.num_train_steps=1 algo.data_batch_size=4 algo.rloo_batch_size=4 task.max_episode_length=20"
    )
    rest = f"{short} algo.train_init_states=4 evaluation.episodes=2 logging.use_wandb=false"
    done = run(
        "make", "quickstart", f"ARGS=--override {rest}", cwd=tmp_path, TORCH="cpu", PYTHONPATH="", PI0_CACHE_DIR="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("outputs/quickstart-*/report.html"))
