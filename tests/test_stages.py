"""The stage scripts: real runs, the spec's lines, and what holds between stages."""

import ast
import difflib
import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.base.video import CAPTION_HEIGHT
from pi0.ript.config import Config, TrainingConfig, describe_keys
from pi0.ript.metrics import METRICS

STAGES = [
    "08_train_with_epochs.py",
    "09_train_with_config.py",
    "10_train_with_distributed.py",
    "11_train_with_logging.py",
    "12_train_with_dataset.py",
    "13_train_production_ready.py",
]
# Functions that a stage changes because its lesson is in them; all others it takes over to the letter.
CHANGED = {
    "09_train_with_config.py": {"main"},
    "10_train_with_distributed.py": {
        "make_states",
        "make_learner",
        "update_policy",
        "train_iteration",
        "train",
        "main",
    },
    "11_train_with_logging.py": {"train_iteration", "write_results", "train", "main"},
    "12_train_with_dataset.py": {
        "distributed_collect_batches",
        "make_states",
        "make_rollout_generator",
        "write_results",
        "train",
    },
    "13_train_production_ready.py": {
        "make_learner",
        "update_policy",
        "train_iteration",
        "write_results",
        "train",
        "validate_config",
        "parse_arguments",
        "evaluate_periodically",
        "main",
    },
}
LONGEST = {"08": 300, "09": 300}  # and 650 for the later ones
CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SHORT = str(REPO_ROOT / "tests" / "support" / "short_practice.py")


def run_script(*arguments: str, cwd: Path = REPO_ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def functions(stage: str) -> dict[str, str]:
    """Source of every top-level function and class."""
    source = (REPO_ROOT / stage).read_text()
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def losses(run_dir: Path) -> list[float]:
    return [
        row["loss"] for row in json.loads((run_dir / "results.json").read_text())["history"] if "loss" in row
    ]


@pytest.mark.parametrize(("earlier", "later"), list(pairwise(STAGES)))
def test_functions_that_two_stages_share_are_the_same_to_the_letter(earlier, later):
    ours, theirs = functions(earlier), functions(later)
    shared = set(ours) & set(theirs)
    assert len(shared) >= 6
    assert {name for name in shared if ours[name] != theirs[name]} == CHANGED[later]


@pytest.mark.parametrize(("earlier", "later"), list(pairwise(STAGES)))
def test_most_lines_of_a_stage_survive_into_the_next(earlier, later):
    before, after = ((REPO_ROOT / stage).read_text().splitlines() for stage in (earlier, later))
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in blocks) >= 0.85 * len(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_short(stage):
    assert len((REPO_ROOT / stage).read_text().splitlines()) <= LONGEST.get(stage[:2], 650)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All stages with the same small settings and short episodes: by script, what it printed and its run folder."""
    folder = tmp_path_factory.mktemp("runs")
    config = {
        "policy_path": str(CHECKPOINT),
        "output_dir": str(folder),
        "task": {"task_names_to_use": [3], "assets": "standins", "num_parallel_envs": 1},
        "algo": {
            "rloo_batch_size": 4,
            "data_batch_size": 8,
            "train_init_states": 8,
            "num_epochs": 2,
            "minibatch_size": 6,
            "gradient_accumulation_steps": 2,
            # What stage 12 adds, off.
            "group_by": "batch",
            "enable_dynamic_sampling": False,
            "enable_rollout_stats_tracking": False,
        },
        "training": {"num_train_steps": 2},
        "evaluation": {"episodes": 2},
    }
    done = {}
    for number, stage in enumerate(STAGES):
        file = folder / f"{number}.yaml"
        extras = {"features": {"save_video": number in (1, 5)}, "logging": {"use_wandb": False}}
        file.write_text(yaml.safe_dump({**config, **extras, "exp_name": f"run{number}"}))
        if number:
            completed = run_script(SHORT, stage, "--config_path", str(file))
        else:
            completed = run_edited_stage_08(folder, file)
        assert completed.returncode == 0, completed.stderr[-2000:]
        (run_dir,) = folder.glob(f"run{number}-*")
        done[stage] = (completed, run_dir)
    return done


def run_edited_stage_08(folder: Path, config: Path) -> subprocess.CompletedProcess:
    """Stage 08 has its settings in the file: edit them, as its reader would."""
    source = (REPO_ROOT / STAGES[0]).read_text()
    edited = source.replace(
        "train(AdvancedTrainingConfig())", f"train(load_config({str(config)!r}))"
    ).replace("import AlgoConfig, Config,", "import load_config, AlgoConfig, Config,")
    assert edited.count("load_config") == 2
    (folder / STAGES[0]).write_text(edited)
    return subprocess.run(
        [sys.executable, SHORT, str(folder / STAGES[0])],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.runs
def test_stage_09_says_what_it_did(runs):
    nine, _ = runs[STAGES[1]]
    for line in (
        "configuration loaded",
        "configuration validated",
        "training started",
        "LIBERO assets: standins",
    ):
        assert line in nine.stdout


@pytest.mark.runs
@pytest.mark.parametrize(("earlier", "later"), list(pairwise(STAGES)))
def test_with_its_own_feature_off_a_stage_trains_to_exactly_the_losses_of_the_one_before(
    runs, earlier, later
):
    (_, before), (_, after) = runs[earlier], runs[later]
    assert losses(before) == losses(after)
    assert len(losses(after)) == 2


@pytest.mark.runs
@pytest.mark.parametrize("stage", [STAGES[1], STAGES[5]])
def test_a_run_leaves_results_a_picture_a_video_and_a_policy_that_loads(runs, stage):
    _, run_dir = runs[stage]
    results = json.loads((run_dir / "results.json").read_text())
    for when in ("before", "after"):
        assert results[when]["episodes"] == 2
        low, high = results[when]["interval_95"]
        assert 0 <= low <= results[when]["success_rate"] <= high <= 1
    assert results["protocol"]["assets"]["source"] == "standins"
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(run_dir / "before_after.mp4")) as film:
        frame = next(film.decode(video=0)).to_ndarray(format="gray")
    caption = frame[:CAPTION_HEIGHT]
    for half in (caption[:, :256], caption[:, -256:]):
        assert np.median(half) > 240
        assert (half < 100).sum() > 50, "each side says whose it is"
    assert np.median(frame[CAPTION_HEIGHT:]) < 240
    PI0Policy.from_pretrained(run_dir / "policy")


@pytest.mark.runs
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_records_nothing_that_is_not_declared(runs, stage):
    _, run_dir = runs[stage]
    for row in json.loads((run_dir / "results.json").read_text())["history"]:
        assert METRICS.undeclared(row) == []


def config_error(tmp_path: Path, change: dict, *overrides: str) -> str:
    config = {"policy_path": str(CHECKPOINT), "exp_name": "bad", "output_dir": str(tmp_path), **change}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    done = run_script(STAGES[1], "--config_path", str(tmp_path / "bad.yaml"), "--override", *overrides)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.runs
def test_bad_settings_are_named_before_anything_starts(tmp_path):
    assert "algo.lr" in config_error(tmp_path, {"algo": {"learning_rate": 1e-4}})
    assert "algo.lr = -1.0" in config_error(tmp_path, {}, "algo.lr=-1.0")
    assert "did you mean" in config_error(tmp_path, {"task": {"task_names_to_use": ["pick_up_the_bowl"]}})
    assert "did you mean" in config_error(tmp_path, {"task": {"task_name": "pick_up_the_bowl"}})
    too_many = {"task": {"task_name": 3}, "evaluation": {"episodes": 51}}
    assert "evaluation.episodes = 51 is more than the 50 states" in config_error(tmp_path, too_many)
    too_many = {"task": {"task_name": 3, "held_out_states": 9}, "evaluation": {"episodes": 10}}
    assert "evaluation.episodes = 10 is more than the 9 held-out states" in config_error(tmp_path, too_many)
    assert not list(tmp_path.glob("bad-*")), "a run folder was made before the error"
    assert "no such folder" in config_error(tmp_path, {"policy_path": "nowhere"})
    assert "cannot write" in config_error(tmp_path, {"output_dir": "/proc/nowhere"})


@pytest.mark.runs
def test_help_lists_every_key():
    text = run_script(STAGES[1], "--help").stdout
    assert [each.name for each in describe_keys() if f"  {each.name}: " not in text] == []


# What the stages share to the letter, so that one stands for all.


@pytest.fixture(scope="module")
def stage_08():
    spec = importlib.util.spec_from_file_location("stage_08", REPO_ROOT / STAGES[0])
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "stage_08", module)  # where its dataclass looks for its module
        spec.loader.exec_module(module)
    return module


def test_a_policy_is_loaded_as_configured(stage_08, tmp_path):
    statistics = json.loads((CHECKPOINT / "norm_stats.json").read_text())
    statistics["norm_stats"]["state"]["mean"][0] += 0.5
    (tmp_path / "norm_stats.json").write_text(json.dumps(statistics))
    config = Config(
        policy_path=str(CHECKPOINT),
        dtype="bfloat16",
        compile=True,
        norm_stats_path=str(tmp_path / "norm_stats.json"),
        training=TrainingConfig(trainable="expert"),
    )
    policy = stage_08.load_policy(config)
    plain = PI0Policy.from_pretrained(CHECKPOINT)
    trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    assert trained < {name for name, p in plain.network.named_parameters() if p.requires_grad}
    assert {p.dtype for p in policy.network.parameters()} == {torch.bfloat16, torch.float32}
    assert policy.compiled
    assert policy.norm_stats.state.mean[0] == pytest.approx(plain.norm_stats.state.mean[0] + 0.5)


@pytest.mark.runs
def test_stage_08_runs_with_the_settings_in_it(tmp_path):
    run_stage_08(tmp_path, SHORT)


@pytest.mark.soak  # the test above shows it with short episodes
def test_stage_08_runs_as_documented(tmp_path):
    run_stage_08(tmp_path)


def run_stage_08(folder: Path, *wrapper: str) -> None:
    (folder / "checkpoints").symlink_to(REPO_ROOT / "checkpoints")
    done = run_script(*wrapper, str(REPO_ROOT / STAGES[0]), cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    iterations = re.findall(r"^iteration \d: \d+ of 16 solved, (\d+) updates", done.stdout, re.MULTILINE)
    assert len(iterations) == 3
    (run_dir,) = folder.glob("outputs/08_epochs-*")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["before"]["episodes"] == results["after"]["episodes"] == 20
    assert (run_dir / "before_after.mp4").is_file()
