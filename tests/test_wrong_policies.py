"""A policy that cannot be used here is answered by every command with one line that names it and the mend."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from pi0 import PI0Policy
from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.paths import REPO_ROOT
from pi0.checkpoint import main as checkpoint
from pi0.doctor import STOP, check_checkpoint
from pi0.libero.environments import Environments
from pi0.libero.settings import TaskConfig
from pi0.model.config import Pi0Config
from pi0.policy.normalization import NormStats
from pi0.policy.tokenizer import PaligemmaTokenizer, TinyTokenizer
from pi0.ript.config import Config
from tests.support.published_files import LEROBOT_CONFIG, weights, write_json, write_lerobot, write_openpi

POLICY = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SIMULATED = ["--tasks", "3", "--workers", "1", "--assets", "standins", "--output"]


def evaluation(policy, folder):
    return ["-m", "pi0.evaluate", "--policy_path", policy, *SIMULATED, folder / "out"]


def cloning(policy, folder):
    return ["-m", "pi0.warmstart", "--start-from", policy, *SIMULATED, folder / "out"]


def training(policy, folder):
    overrides = [
        f"policy_path={policy}",
        f"output_dir={folder}",
        "task.num_parallel_envs=1",
        "task.assets=standins",
    ]
    return ["09_train_with_config.py", "--config_path", "configs/minimal_test.yaml", "--override", *overrides]


COMMANDS = pytest.mark.parametrize("command", [evaluation, cloning, training])


def refusal(words, **environment) -> str:
    """The one line with which a command ends."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPO_ROOT, capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line and "%|" not in line]  # no progress bar
    assert len(said) == 1 and said[0].startswith("error: "), done.stderr
    return said[0]


def stops(policy) -> str:
    """What the doctor says of it."""
    config = Config(policy_path=str(policy), task=TaskConfig(task_name=3))
    (line,) = [str(finding) for finding in check_checkpoint(config) if finding.status == STOP]
    return line


# Policies of other robots


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A policy of a robot with six joints."""
    random = np.random.default_rng(0)
    stats = NormStats.of(random.normal(size=(9, 6)), random.normal(size=(9, 6)))
    folder = tmp_path_factory.mktemp("arm")
    PI0Policy(Pi0Config.preset("pi0_tiny", robot_state_dim=6, robot_action_dim=6), stats).save_pretrained(
        folder
    )
    return folder


OTHER_ROBOT = (
    "config.json: this policy is of another robot, whose state has 6 features and whose actions have 6; LIBERO's have "
    "8 and 7. Take a policy that was trained on LIBERO"
)


@pytest.mark.runs
@COMMANDS
@pytest.mark.tried(
    "A policy of another robot's widths", "One line with both widths, in every command that acts in LIBERO"
)
def test_a_policy_of_another_robot_is_refused_by_every_command_that_acts_in_libero(arm, tmp_path, command):
    assert refusal(command(arm, tmp_path)) == f"error: {arm}/{OTHER_ROBOT}"


def test_the_doctor_stops_a_policy_of_another_robot(arm):
    assert OTHER_ROBOT in stops(arm)


@pytest.mark.parametrize("widths", [(6, 6), (14, 14), (8, 14)])
@pytest.mark.tried("The same in `inspect`", "A line that it is of another robot; it still fits its own files")
def test_inspect_says_that_a_policy_of_lerobot_is_of_another_robot(tmp_path, capsys, widths):
    folder = write_lerobot(tmp_path / "policy", weights())
    for processor in folder.glob("policy_p*"):
        processor.unlink()
    content = LEROBOT_CONFIG | {"output_features": {"action": {"type": "ACTION", "shape": [widths[1]]}}}
    content["input_features"] = content["input_features"] | {
        "observation.state": {"type": "STATE", "shape": [widths[0]]}
    }
    write_json(folder / "config.json", content)
    assert checkpoint(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert (
        f"whose state has {widths[0]} features and whose actions have {widths[1]}; LIBERO's have 8 and 7"
        in said
    )
    assert said.splitlines()[-1].startswith("fits")


def test_inspect_says_nothing_of_robots_where_a_policy_is_liberos(capsys):
    assert checkpoint(["inspect", str(POLICY)]) == 0
    assert "not LIBERO" not in capsys.readouterr().out


def test_environments_refuse_other_robots_before_they_start_anything():
    with pytest.raises(
        CheckpointError, match="the policy: this policy is of another robot, whose state has 14"
    ):
        Environments(TaskConfig(), Pi0Config.preset("pi0", robot_state_dim=14))


def test_where_a_configuration_comes_from_is_no_part_of_it():
    config = Pi0Config.preset("pi0_tiny")
    read = Pi0Config.from_dict(config.to_dict(), "folder/config.json")
    assert (read.source, read) == ("folder/config.json", config)
    assert "source" not in read.to_dict()
    with pytest.raises(ValueError, match="unknown key 'source'"):
        Pi0Config.from_dict(config.to_dict() | {"source": "folder"})


# Folders that hold no policy, or not in the right place


def run_folder(folder):
    """A run of this project, and its policy folder."""
    shutil.copytree(POLICY, folder / "policy")
    shutil.copytree(POLICY, folder / "checkpoints" / "step-000002" / "policy")
    (folder / "config.yaml").write_text(yaml.safe_dump({}))
    return folder, folder / "policy"


def checkpoints_folder(folder):
    for step in (2, 10, 9):
        shutil.copytree(POLICY, folder / f"step-{step:06}" / "policy")
    return folder, folder / "step-000010" / "policy"


def run_without_policy(folder):
    shutil.copytree(POLICY, folder / "checkpoints" / "step-000002" / "policy")
    return folder, folder / "checkpoints" / "step-000002" / "policy"


def checkpoint_folder(folder):
    shutil.copytree(POLICY, folder / "policy")
    return folder, folder / "policy"


def lerobots_run(folder):
    for step in ("005000", "010000"):
        shutil.copytree(POLICY, folder / "checkpoints" / step / "pretrained_model")
    return folder, folder / "checkpoints" / "010000" / "pretrained_model"


def parent(folder):
    shutil.copytree(POLICY, folder / "pi0_libero")
    return folder, folder / "pi0_libero"


@pytest.mark.parametrize(
    "make", [run_folder, checkpoints_folder, run_without_policy, checkpoint_folder, lerobots_run, parent]
)
def test_the_policy_folder_in_a_folder_is_named(tmp_path, make):
    named, inner = make(tmp_path / "named")
    with pytest.raises(
        MissingFileError, match=rf"has no model\.safetensors; .*\. The policy folder is {inner}$"
    ):
        PI0Policy.from_pretrained(named)


def test_several_policy_folders_are_named_all(tmp_path):
    for name in ("b", "a"):
        shutil.copytree(POLICY, tmp_path / name)
    with pytest.raises(MissingFileError, match=rf"The policy folder is {tmp_path}/a or {tmp_path}/b$"):
        PI0Policy.from_pretrained(tmp_path)


def test_a_file_in_place_of_its_folder_is_told():
    with pytest.raises(MissingFileError, match=r"model\.safetensors is a file; name its folder"):
        PI0Policy.from_pretrained(POLICY / "model.safetensors")


@pytest.mark.runs
@COMMANDS
@pytest.mark.tried(
    "The folder of a run, or a parent folder, in place of a policy folder",
    "The error names the policy folder in it",
)
def test_every_command_that_loads_a_policy_names_the_one_in_a_run(tmp_path, command):
    run, inner = run_folder(tmp_path / "run")
    assert refusal(command(run, tmp_path)).endswith(f"The policy folder is {inner}")


def test_the_doctor_names_the_policy_in_a_run(tmp_path):
    run, inner = run_folder(tmp_path / "run")
    assert f"The policy folder is {inner}" in stops(run)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("params/_METADATA", "openpi's JAX checkpoint: convert it"),
        ("model.safetensors.index.json", "split into shards"),
        ("adapter_model.safetensors", "holds an adapter only"),
        ("pytorch_model.bin", "never pickles"),
    ],
)
@pytest.mark.tried(
    "A JAX checkpoint, shards, an adapter, a pickle in place of a policy",
    "Every command says which it is, and what to do",
)
def test_the_doctor_gives_the_hints_of_inspect(tmp_path, content, hint):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).touch()
    assert hint in stops(tmp_path)


# Tokenizers


@pytest.fixture
def published(tmp_path):
    return write_openpi(tmp_path / "published", weights())


@pytest.fixture
def other_tokenizer(tmp_path, monkeypatch):
    """A tokenizer of another kind, as folders of language models have it, where PaliGemma's is looked for."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    monkeypatch.setenv("PALIGEMMA_TOKENIZER", str(file))
    return file


def test_a_tokenizer_of_another_kind_is_named(other_tokenizer):
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: not a sentencepiece model: .*paligemma_tokenizer"
    ):
        PaligemmaTokenizer(None, 48)


@pytest.mark.runs
@pytest.mark.tried("A tokenizer file of another kind", "One line with the file and where the right one is")
def test_an_evaluation_with_a_tokenizer_of_another_kind_ends_with_one_line(
    published, other_tokenizer, tmp_path
):
    said = refusal([*evaluation(published, tmp_path), "--episodes", "1"])
    assert f"PaliGemma tokenizer file {other_tokenizer}: not a sentencepiece model" in said


def test_inspect_and_the_doctor_tell_a_tokenizer_of_another_kind(published, other_tokenizer, capsys):
    assert checkpoint(["inspect", str(published)]) == 0
    assert f"acting needs it: PaliGemma tokenizer file {other_tokenizer}: not" in capsys.readouterr().out
    config = Config(policy_path=str(published), task=TaskConfig(task_name=3, replan_steps=5))
    (line,) = [str(finding) for finding in check_checkpoint(config) if finding.status == STOP]
    assert "does not act: PaliGemma tokenizer file" in line


def test_a_tokenizer_of_more_tokens_than_the_model_is_told(tmp_path):
    folder = shutil.copytree(POLICY, tmp_path / "policy")
    PI0Policy(Pi0Config.preset("pi0_tiny", vocab_size=300)).save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=rf"{folder}/config\.json: the tiny tokenizer knows 384 tokens.*300;"
    ):
        _ = PI0Policy.from_pretrained(folder).tokenizer


@pytest.mark.tried("A prompt that the model has no room for", "One line with the number of tokens")
def test_a_prompt_that_is_too_long_is_an_error_of_the_input():
    with pytest.raises(CheckpointError, match=r"takes \d+ tokens; the model is built for 14 .*choose a task"):
        TinyTokenizer(14).encode("zwischen Teller und Schale")
