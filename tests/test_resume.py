"""Stage 13: a run continues exactly where it stopped, in one process and in several, with copies and with shards."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pi0 import PI0Policy
from pi0.base.errors import OutputError
from pi0.base.paths import REPO_ROOT
from pi0.base.typed_yaml import fixed_keys
from pi0.libero.assets import resolve_assets
from pi0.libero.suites import find_tasks
from pi0.ript.config import Config, TaskConfig, to_dict
from pi0.ript.resume import SETTINGS, compare_outside
from pi0.training.checkpoint_store import CheckpointStore
from pi0.training.fingerprints import WHOLE_BYTES, fingerprint
from pi0.training.run_folder import new_run_dir, run_to_resume, take_run
from tests.support.browser import browser_check
from tests.support.programs import fresh_python
from tests.support.stage_13_runs import (
    CHECKPOINT,
    SHORT,
    STEPS,
    assert_same,
    finish,
    kill_after_a_step,
    outcome,
    run_of,
    start,
    steps_saved,
    wait_until,
)


def from_a_copy(folder: Path) -> list[str]:
    return ["--override", f"policy_path={folder / 'base'}"]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    """A run that was killed after its first iteration; its Python is not that of the run which it is compared with."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(CHECKPOINT, folder / "base")
    with fresh_python():
        process = start(folder, *from_a_copy(folder))
    wait_until(lambda: 1 in steps_saved(folder), process)
    process.kill()
    process.communicate()
    return folder


@pytest.fixture
def killed(killed_run, tmp_path):
    """The same in a folder of one's own."""
    return Path(shutil.copytree(killed_run, tmp_path / "killed"))


@pytest.mark.runs
@pytest.mark.tried(
    "The statistics of the policy that a run began with are edited between stop and `--resume`",
    "The run continues with those of its checkpoint, to the bit; a line says that the folder has changed",
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(straight, killed, killed_run):
    # The policy that it began with has other statistics by now, and its folder and task are written in other ways.
    statistics = killed_run / "base" / "norm_stats.json"
    content = json.loads(statistics.read_text())
    content["norm_stats"]["actions"]["mean"] = [0.5] * 7
    statistics.write_text(json.dumps(content))
    policy = os.path.relpath(killed_run / "base", REPO_ROOT)
    (task,) = find_tasks("libero_spatial", [3])
    others = ["--override", f"policy_path={policy}", f"task.task_names_to_use=[{task.name}]"]
    output = finish(
        start(killed, *others, "--resume", str(run_of(killed)))
    )  # other tests: without its folder
    assert re.search(r"resuming with other policy_path: it was \w{16} and is \w{16}\n", output)
    assert "resuming with task" not in output
    assert re.search(r"continuing from .*step-00000[12], [12] iterations done", output)
    assert_same(killed, straight[0])
    lines = (run_of(killed) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds), "time continues from where the run stopped"


@pytest.mark.runs
@pytest.mark.tried("A run that is still running is resumed", "An error; the first run is not disturbed")
def test_a_running_run_cannot_be_resumed(tmp_path):
    long = [*SHORT, "training.num_train_steps=1000"]
    process = start(tmp_path, *long)
    wait_until(lambda: 0 in steps_saved(tmp_path), process)
    second, _ = (beside := start(tmp_path, "--resume", *long)).communicate(timeout=100)
    assert beside.returncode == 1
    assert "error: another process writes to" in second
    steps = (run_of(tmp_path) / "metrics.jsonl").read_text().count("\n")
    wait_until(lambda: (run_of(tmp_path) / "metrics.jsonl").read_text().count("\n") > steps + 1, process)
    process.kill()
    process.communicate()


@pytest.mark.runs
def test_every_metric_of_a_run_is_documented(straight):
    documented = set(re.findall(r"`([\w/]+)`", (REPO_ROOT / "docs" / "metrics.md").read_text()))
    nested = {name.partition("/")[0] for name in documented if "/" in name}  # phases, memory
    for row in outcome(straight[0])["rows"]:
        assert set(row) <= documented | nested
        assert {"dropped_share", "skipped_share", "bad_updates", "rollbacks"} <= set(row)
    memory = json.loads((run_of(straight[0]) / "metrics.jsonl").read_text().splitlines()[0])["memory"]
    assert {f"memory/{name}" for name in memory} <= documented
    assert list(memory["worker_mb"]) == ["0"]
    assert memory["workers_mb"] == memory["worker_mb"]["0"] > 100


@pytest.mark.soak
def test_chromium_shows_the_report_of_a_run(straight, tmp_path):
    seen = browser_check(run_of(straight[0]), tmp_path, 1200)
    assert seen["failures"] == []
    assert seen["broken_images"] == seen["dangling"] == 0
    assert seen["plots"] >= 5
    assert seen["window_width"] == seen["content_width"]
    assert "libero_spatial" in seen["text"]


@pytest.mark.runs
def test_a_killed_and_resumed_run_of_two_processes_ends_with_the_same_bits(straight_of_two, tmp_path):
    with fresh_python():
        kill_after_a_step(tmp_path)
    finish(start(tmp_path, "--resume", processes=2))
    assert_same(tmp_path, straight_of_two)


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_another_number_of_processes_resumes_and_reports_what_it_distributed_again(killed, killed_run):
    # As after memory ran out once: minibatches are computed in two passes.
    store = CheckpointStore(run_of(killed) / "checkpoints", 2)
    newest, _ = store.newest_valid()
    run = json.loads((newest / "run.json").read_text())
    run["facts"]["passes"] = 2
    shutil.copytree(newest, store.begin(run["step"]), dirs_exist_ok=True)
    (store.temporary(run["step"]) / "run.json").write_text(json.dumps(run))
    store.seal(run["step"], facts=store.facts(newest))
    output = finish(start(killed, *from_a_copy(killed_run), "--resume", processes=2))
    assert "written by 1 processes, read by 2" in output
    assert len(outcome(killed)["rows"]) == STEPS
    newest, _ = store.newest_valid()
    assert json.loads((newest / "run.json").read_text())["facts"]["passes"] == 2


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_the_newest_checkpoint_that_verifies_is_taken_and_the_others_are_named(straight, killed, killed_run):
    newest = max(run_of(killed).glob("checkpoints/step-*"))
    damaged = newest / "training.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    output = finish(start(killed, *from_a_copy(killed_run), "--resume"))
    assert f"skipped {newest}: training.safetensors: its checksum differs" in output
    assert_same(killed, straight[0])


@pytest.mark.runs
@pytest.mark.tried("All checkpoints are damaged", "An error that says why for each; nothing is changed")
def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(killed, killed_run):
    for manifest in killed.glob("run-*/checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    lines = (run_of(killed) / "metrics.jsonl").read_text()
    output, _ = (process := start(killed, *from_a_copy(killed_run), "--resume")).communicate(timeout=300)
    assert process.returncode == 1
    assert "error: no checkpoint in" in output
    assert "is valid; start a new run, without --resume" in output
    assert (run_of(killed) / "metrics.jsonl").read_text() == lines != ""


@pytest.mark.parametrize(
    "changed", [{"norm_stats_path": "others.json"}, {"task": {"demonstrations": "folder"}}]
)
@pytest.mark.tried(
    "A setting that decides what scores mean is changed on resume", "An error with the old and the new value"
)
def test_what_weights_and_states_mean_cannot_change_in_between(tmp_path, changed):
    config = {"norm_stats_path": None, "task": {"demonstrations": None}}
    run_dir = new_run_dir(str(tmp_path), "run", config)
    (run_dir / "checkpoints").mkdir()
    assert run_to_resume("newest", str(tmp_path), "run", config, fixed_keys(Config)) == run_dir
    with pytest.raises(OutputError, match=r"cannot be resumed with other settings \(\S+ was None and is '"):
        run_to_resume("newest", str(tmp_path), "run", config | changed, fixed_keys(Config))


@pytest.mark.runs
def test_nothing_to_resume_is_an_error_that_says_so(tmp_path):
    process = start(tmp_path, "--resume")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: nothing to resume" in output
    assert "Traceback" not in output


@pytest.mark.tried("A path as `./x` and absolute, a task by name and by index", "They are the same setting")
def test_one_place_written_in_two_ways_is_the_same(tmp_path, monkeypatch, capsys):
    (task,) = find_tasks("libero_spatial", [3])
    config = to_dict(Config(policy_path=str(tmp_path / "policy"), task=TaskConfig(task_names_to_use=[3, 8])))
    run_dir = new_run_dir(str(tmp_path / "runs"), "run", config)
    (run_dir / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    other = copy.deepcopy(config)
    other["policy_path"], other["task"]["task_names_to_use"] = "./x/../policy", [task.name, "8"]
    where = ("newest", str(tmp_path / "runs"), "run")
    assert run_to_resume(*where, other, *SETTINGS) == run_dir
    assert capsys.readouterr().out == ""
    other["policy_path"] = "policy-2"
    with pytest.raises(OutputError, match=r"\(policy_path was '/.*/policy' and is 'policy-2'\)"):
        run_to_resume(*where, other, *SETTINGS)
    config["task"]["task_names_to_use"] = [8, 3]
    with pytest.raises(OutputError, match=r"\(task\.task_names_to_use was \[3, 8\] and is \[8, 3\]\)"):
        run_to_resume(*where, config, *SETTINGS)


@pytest.mark.tried(
    "A run is resumed with other assets or another simulator; or with another policy folder, data set, OpenGL or package version",
    "Other assets and simulators are refused. The rest is printed, and every score records OpenGL and versions",
)
def test_what_decides_results_outside_a_run_is_compared(tmp_path, capsys):
    shutil.copytree(CHECKPOINT, tmp_path / "policy")
    config = Config(policy_path=str(tmp_path / "policy"))
    spec = SimpleNamespace(assets=resolve_assets("standins"))
    environments = SimpleNamespace(pool=SimpleNamespace(spec=spec), bddl={}, benchmark_name="libero_spatial")
    facts = compare_outside(config, environments, {})
    assert facts["outside"]["mujoco"] == version("mujoco") and facts["outside"]["norm_stats_path"] is None
    assert compare_outside(config, environments, facts) == facts
    assert capsys.readouterr().out == ""
    statistics = tmp_path / "policy" / "norm_stats.json"
    statistics.write_text(statistics.read_text().replace("0.0175", "0.0176"))  # of the same size
    now = compare_outside(config, environments, facts)
    assert re.fullmatch(r"resuming with other policy_path: it was \w+ and is \w+\n", capsys.readouterr().out)
    assert {name for name in now["outside"] if now["outside"][name] != facts["outside"][name]} == {
        "policy_path"
    }
    for name in ("assets", "mujoco"):
        with pytest.raises(OutputError, match=rf"scores before and after .*\({name} was other and is "):
            compare_outside(config, environments, {"outside": {**facts["outside"], name: "other"}})
    shutil.rmtree(tmp_path / "policy")
    compare_outside(config, environments, facts)
    assert re.search(r"other policy_path: it was \w+ and is missing", capsys.readouterr().out)


def test_a_fingerprint_is_that_of_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / ".cache").write_text("not counted")
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / ".cache").write_text("changed")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert fingerprint(tmp_path / "b") != first
    (tmp_path / "a" / "x").write_text("2")
    assert fingerprint(tmp_path / "a") != first
    large = tmp_path / "large"
    with large.open("wb") as file:  # sparse
        file.truncate(WHOLE_BYTES + 5)
    empty = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert fingerprint(large) != empty
    assert (fingerprint(None), fingerprint(tmp_path / "nowhere")) == (None, "missing")


def make_run(folder: Path, name: str, config: dict) -> Path:
    (folder / name / "checkpoints").mkdir(parents=True)
    (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / name


def test_resume_takes_the_newest_run_of_just_this_experiment(tmp_path):
    make_run(tmp_path, "run-20260101-000000", {"seed": 0})
    newest = make_run(tmp_path, "run-20260201-000000", {"seed": 0})
    make_run(tmp_path, "run-b-20260301-000000", {"seed": 0})
    assert run_to_resume("newest", str(tmp_path), "run", {"seed": 0}, ["seed"]) == newest


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path):
    folders = {new_run_dir(str(tmp_path), "run", {"seed": seed}) for seed in range(3)}
    assert len(folders) == 3
    assert sorted(yaml.safe_load((path / "config.yaml").read_text())["seed"] for path in folders) == [0, 1, 2]


def test_a_run_without_checkpoints_does_not_hide_an_older_one_that_has_some(tmp_path):
    older = make_run(tmp_path, "run-20260101-000000", {"seed": 0})
    (older / "checkpoints/step-000004").mkdir()
    newest = make_run(tmp_path, "run-20260201-000000", {"seed": 0})
    assert run_to_resume("newest", str(tmp_path), "run", {"seed": 0}, ["seed"]) == older
    (newest / "checkpoints/step-000000").mkdir()
    assert run_to_resume("newest", str(tmp_path), "run", {"seed": 0}, ["seed"]) == newest


def test_what_a_run_was_built_on_cannot_change_and_what_it_was_not_can(tmp_path, capsys):
    make_run(tmp_path, "run-20260101-000000", {"algo": {"lr": 1e-4, "num_epochs": 2}})
    run_to_resume("newest", str(tmp_path), "run", {"algo": {"lr": 1e-4, "num_epochs": 3}}, fixed_keys(Config))
    assert "resuming with algo.num_epochs = 3, which was 2" in capsys.readouterr().out
    with pytest.raises(OutputError, match=r"algo\.lr was 0\.0001 and is 0\.001.*policy_path"):
        run_to_resume(
            "newest", str(tmp_path), "run", {"algo": {"lr": 1e-3, "num_epochs": 2}}, fixed_keys(Config)
        )


@pytest.mark.runs
def test_two_processes_cannot_write_to_one_run(tmp_path):
    code = "import sys; from pathlib import Path; from pi0.training.run_folder import take_run; take_run(Path(sys.argv[1]), {}); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPO_ROOT, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    wait_until(lambda: (tmp_path / ".lock").exists(), holder)
    time.sleep(0.2)
    with pytest.raises(OutputError, match="another process writes to"):
        take_run(tmp_path, {})
    holder.kill()
    holder.wait()
    take_run(tmp_path, {"algo": {"num_epochs": 3}})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"algo": {"num_epochs": 3}}


@pytest.mark.runs
def test_the_policy_in_a_checkpoint_is_a_checkpoint_of_its_own(straight):
    folder, _ = straight
    newest, damaged = CheckpointStore(run_of(folder) / "checkpoints", 2).newest_valid()
    assert newest.name == f"step-{STEPS:06d}"
    assert damaged == []
    ours = PI0Policy.from_pretrained(newest / "policy").network.state_dict()
    saved = PI0Policy.from_pretrained(run_of(folder) / "policy").network.state_dict()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_the_best_checkpoint_stays_when_newer_ones_come(tmp_path):
    # A success in evaluation, then an update that spoils the policy: the first iteration makes four at most.
    few = ["training.keep_checkpoints=1", "logging.log_freq=1", "algo.lr=1e-5", "algo.ema_decay=0"]
    script = ("tests/support/spoilt_weights.py", "5", "0")
    finish(
        start(tmp_path, "--override", *few, script=script, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)})
    )
    (run_dir,) = tmp_path.glob("run-*")
    evaluations = json.loads((run_dir / "metrics.json").read_text())
    scores = {entry["step"]: entry["success_rate"] for entry in evaluations}
    assert sorted(scores) == [1, 2, 3]
    results = json.loads((run_dir / "results.json").read_text())
    assert evaluations[-1]["outcomes"] == results["after"]["outcomes"] != results["before"]["outcomes"]
    best = max(scores, key=lambda step: (scores[step], step))
    assert best < STEPS
    assert steps_saved(tmp_path) == sorted({best, STEPS})
    for step in {best, STEPS}:
        manifest = json.loads((run_dir / f"checkpoints/step-{step:06d}/manifest.json").read_text())
        assert manifest["score"] == scores[step]
        assert manifest["facts"]["config"]["algo"]["lr"] == 1e-5


PRACTISED = [
    "task.task_names_to_use=[3,8]", "algo.group_by=state", "algo.enable_dynamic_sampling=true",
    "algo.max_sampling_attempts=4", "algo.data_batch_size=8", "algo.rollout_skip_threshold=1", "logging.use_wandb=true",
]  # fmt: skip


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_a_killed_and_resumed_run_with_all_that_samplers_remember_ends_with_the_same_bits(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(start(straight, "--override", *PRACTISED))
    process = start(killed, "--override", *PRACTISED)
    wait_until(lambda: 2 in steps_saved(killed), process)
    process.kill()
    process.communicate()
    finish(start(killed, "--resume", "--override", *PRACTISED))
    assert_same(killed, straight)
    rows = outcome(straight)["rows"]
    assert any(row["dropped_groups"] for row in rows[:2])
    assert len({task for row in rows for task in row["tasks"]}) == 2
    # One WandB run, in a folder for each process.
    folders = sorted((run_of(killed) / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


@pytest.mark.soak  # tests/test_stages.py shows it in one process
def test_two_processes_learn_what_they_learn_in_stage_12(straight_of_two, tmp_path):
    finish(start(tmp_path, processes=2, script=("12_train_with_dataset.py",)))
    (metrics,) = tmp_path.glob("run-*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(rows) == STEPS
    for mine, other in zip(rows, outcome(straight_of_two)["rows"], strict=True):
        assert mine["successes"] == other["successes"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


# Large policies ----------------------------------------------------------------------------------------


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_shards_learn_what_copies_learn_and_can_be_resumed_after_a_kill(straight_of_two, tmp_path):
    fsdp = ["--override", "training.use_fsdp=true"]
    kill_after_a_step(tmp_path, *fsdp)
    output = finish(start(tmp_path, "--resume", *fsdp, processes=2))
    assert "1 iterations done" in output or "2 iterations done" in output
    ours, theirs = outcome(tmp_path), outcome(straight_of_two)
    assert ours["after"] == theirs["after"]
    for mine, other in zip(ours["rows"], theirs["rows"], strict=True):
        assert mine["successes"] == other["successes"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    newest, _ = CheckpointStore(run_of(tmp_path) / "checkpoints", 2).newest_valid()
    other, _ = CheckpointStore(run_of(straight_of_two) / "checkpoints", 2).newest_valid()
    trained, copied = (load_file(path / "training.safetensors") for path in (newest, other))
    assert all(torch.allclose(trained[name], copied[name], atol=1e-5) for name in copied)


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_shards_of_a_policy_that_trains_in_part_learn_what_its_copies_learn(tmp_path):
    lora = ["--override", "training.trainable=lora", "training.num_train_steps=2", "algo.lr=0.01"]
    finish(start(tmp_path / "copies", *lora, processes=2))
    kill_after_a_step(tmp_path / "shards", *lora, "training.use_fsdp=true")
    finish(start(tmp_path / "shards", "--resume", *lora, "training.use_fsdp=true", processes=2))
    ours, theirs = outcome(tmp_path / "shards"), outcome(tmp_path / "copies")
    assert len(theirs["rows"]) == 2
    for mine, other in zip(ours["rows"], theirs["rows"], strict=True):
        assert mine["successes"] == other["successes"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    before = PI0Policy.from_pretrained(CHECKPOINT)
    before.choose_trained("lora")
    after = PI0Policy.from_pretrained(run_of(tmp_path / "shards") / "policy").network.state_dict()
    named = before.network.named_parameters()
    frozen = {name: p for name, p in named if not p.requires_grad and "lora" not in name}
    assert "gemma.layers.0.mlp.up_proj.weight" in frozen
    assert [name for name, p in frozen.items() if not torch.equal(after[name], p)] == []
    assert any(name.endswith("lora_b") and tensor.any() for name, tensor in after.items())


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
@pytest.mark.parametrize(
    ("setting", "tolerance"), [("gradient_checkpointing", 0.0), ("use_mixed_precision", 0.02)]
)
def test_checkpointed_gradients_and_bfloat16_train_on_two_processes(
    straight_of_two, tmp_path, setting, tolerance
):
    overrides = [f"training.{setting}=true", "training.num_train_steps=1", "evaluation.periodic_episodes=0"]
    finish(start(tmp_path, "--override", *overrides, processes=2))
    mine = json.loads((run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()[0])
    other = outcome(straight_of_two)["rows"][0]
    assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance, abs=0)
    assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance, abs=0)
    assert (mine["loss"] == other["loss"]) == (tolerance == 0)


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
def test_all_that_saves_memory_goes_together_with_guidance(tmp_path):
    large = ["use_fsdp", "use_mixed_precision", "gradient_checkpointing"]
    overrides = [f"training.{setting}=true" for setting in large]
    finish(
        start(
            tmp_path,
            "--override",
            *overrides,
            "algo.mode=guidance",
            "training.num_train_steps=1",
            processes=2,
        )
    )
    row = json.loads((run_of(tmp_path) / "metrics.jsonl").read_text())
    assert row["updates"] > 0
    assert row["bad_updates"] == 0


@pytest.mark.runs
def test_shards_need_ranks(tmp_path):
    output, _ = (process := start(tmp_path, "--override", "training.use_fsdp=true")).communicate(timeout=300)
    assert process.returncode == 1
    assert "error: training.use_fsdp = true shards the policy over ranks: start it with torchrun" in output
