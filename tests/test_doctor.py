"""The doctor finds what would stop a run, says the mend, and does not cry wolf."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pi0 import PI0Policy, doctor
from pi0.base.paths import REPO_ROOT
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.doctor import NOTE, OK, STOP
from pi0.libero.suites import find_tasks
from pi0.model.config import Pi0Config, SiglipDims
from pi0.policy.normalization import NormStats
from pi0.ript.config import Config, TaskConfig
from tests.support.recordings import FPS, make_demonstration


def save(folder, **changes):
    """A policy of random weights that learned from states and actions around 0."""
    random = np.random.default_rng(0)
    stats = NormStats.of(random.normal(size=(9, 8)), random.normal(size=(9, 7)))
    PI0Policy(Pi0Config.preset("pi0_tiny", **changes), stats).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to be broken."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def config_of(checkpoint, **task) -> Config:
    return Config(policy_path=str(checkpoint), task=TaskConfig(task_name=3, **task))


def stops(findings) -> list[str]:
    return [str(finding) for finding in findings if finding.status == STOP]


def test_a_sound_checkpoint_is_loaded_and_acts(checkpoint):
    findings = list(doctor.check_checkpoint(config_of(checkpoint)))
    assert {finding.status for finding in findings} == {OK}
    assert findings[-1].text.startswith("acts; ")


def test_a_missing_checkpoint_is_named(tmp_path):
    (line,) = stops(doctor.check_checkpoint(config_of(tmp_path / "nowhere")))
    assert "nowhere not found" in line and "correct policy_path" in line


def test_demonstrations_to_learn_from_are_looked_at(checkpoint, tmp_path):
    config = config_of(checkpoint)
    config.algo.cotraining_path = str(tmp_path / "nowhere")
    (line,) = stops(doctor.check_checkpoint(config))
    assert "nowhere" in line and "algo.cotraining_path" in line
    config.algo.cotraining_path = str(tmp_path / "set")
    with LeRobotWriter(tmp_path / "set", FPS) as writer:
        writer.add(make_demonstration(12, 0, find_tasks("libero_spatial", [3])[0].prompt))
    findings = list(doctor.check_checkpoint(config))
    assert not stops(findings)
    assert f"{tmp_path / 'set'}: 1 demonstrations of 1 tasks" in [finding.text for finding in findings]
    inverted = make_demonstration(12, 0, find_tasks("libero_spatial", [3])[0].prompt)
    inverted.actions[:, -1] = inverted.executed[:, -1] = 1
    with LeRobotWriter(tmp_path / "inverted", FPS) as writer:
        writer.add(inverted)
    config.algo.cotraining_path, config.algo.cotraining_gripper = str(tmp_path / "inverted"), None
    (line,) = stops(doctor.check_checkpoint(config))
    assert "gripper actions are 1 to 1" in line and "algo.cotraining_gripper" in line
    config.algo.cotraining_gripper = "open-is-1"
    assert not stops(doctor.check_checkpoint(config))


def test_images_that_would_have_to_be_blown_up_are_noted(checkpoint):
    findings = doctor.check_checkpoint(config_of(checkpoint, image_size=32))
    (line,) = [str(finding) for finding in findings if finding.status == NOTE]
    assert "drawn with 32 pixels" in line and "set task.image_size to 64" in line


def test_a_published_input_wants_the_frames_that_openpi_draws(tmp_path):
    tower = SiglipDims(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=56)
    save(tmp_path, vision=tower)
    for unfit in (None, 224, 128):
        findings = doctor.check_checkpoint(config_of(tmp_path, image_size=unfit))
        (line,) = [str(finding) for finding in findings if finding.status == NOTE]
        assert f"drawn with {unfit or 224} pixels" in line and "set task.image_size to 256" in line
    findings = list(doctor.check_checkpoint(config_of(tmp_path, image_size=256)))
    assert {finding.status for finding in findings} == {OK}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_that_do_not_fit_in_memory_are_found_by_the_type_they_are_wanted_in(
    tmp_path, monkeypatch, dtype, size
):
    # Nearly all of this policy is its token embedding.
    config = config_of(save(tmp_path, vocab_size=50_000))
    config.dtype = dtype
    weights = 50_000 * Pi0Config.preset("pi0_tiny").gemma.width * size
    monkeypatch.setattr(doctor, "_available_memory", lambda: weights)
    (line,) = stops(doctor.check_checkpoint(config))
    assert f"as {dtype}, but" in line
    assert ("set dtype: bfloat16" in line) == (dtype == "float32")
    monkeypatch.setattr(doctor, "_available_memory", lambda: 2 * weights)
    assert not stops(doctor.check_checkpoint(config))


def test_truncated_weights_are_found(broken):
    os.truncate(broken / "model.safetensors", 1000)
    (line,) = stops(doctor.check_checkpoint(config_of(broken)))
    assert "truncated" in line


def test_a_checkpoint_without_statistics_cannot_act(broken):
    (broken / "norm_stats.json").unlink()
    (line,) = stops(doctor.check_checkpoint(config_of(broken)))
    assert "has no norm_stats.json" in line and "set norm_stats_path" in line


def test_configured_statistics_take_the_place_of_missing_ones(broken, checkpoint):
    (broken / "norm_stats.json").unlink()
    config = config_of(broken)
    config.norm_stats_path = str(checkpoint / "norm_stats.json")
    assert not stops(doctor.check_checkpoint(config))


def test_statistics_of_another_robot_are_found(checkpoint, tmp_path):
    stats = NormStats.of(np.eye(5), np.eye(4))
    path = tmp_path / "norm_stats.json"
    path.write_text(str(stats.to_dict()).replace("'", '"'))
    config = config_of(checkpoint)
    config.norm_stats_path = str(path)
    (line,) = stops(doctor.check_checkpoint(config))
    assert "the robot has 8 features" in line


def test_one_of_several_statistics_is_taken_when_it_is_named(broken):
    statistics = (broken / "norm_stats.json").read_text()
    (broken / "norm_stats.json").unlink()
    for robot in ("droid", "libero"):
        (broken / "assets" / robot).mkdir(parents=True)
        (broken / "assets" / robot / "norm_stats.json").write_text(statistics)
    config = config_of(broken)
    (line,) = stops(doctor.check_checkpoint(config))
    assert "several statistics: assets/droid/norm_stats.json, assets/libero" in line
    assert "norm_stats_path" in line
    config.norm_stats_path = str(broken / "assets/libero/norm_stats.json")
    assert not stops(doctor.check_checkpoint(config))


def test_named_statistics_are_checked_as_a_run_checks_them(tmp_path):
    save(tmp_path, use_quantile_norm=True, delta_actions=False)
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    config = config_of(tmp_path)
    config.norm_stats_path = str(tmp_path / "other.json")

    def lines():
        (tmp_path / "other.json").write_text(json.dumps(content))
        return stops(doctor.check_checkpoint(config))

    assert lines() == []
    content["norm_stats"]["state"]["mean"][3] = 3.0
    content["norm_stats"]["actions"]["mean"][3] = -3.0
    (line,) = lines()
    assert "other.json: mean actions" in line and "set delta_actions to true" in line
    content["norm_stats"]["actions"]["mean"][3] = 0.0
    del content["norm_stats"]["state"]["q01"]
    (line,) = lines()
    assert "other.json: norm_stats.state has no q01 and q99" in line


def test_missing_named_statistics_are_named(checkpoint, tmp_path):
    config = config_of(checkpoint)
    config.norm_stats_path = str(tmp_path / "nowhere.json")
    (line,) = stops(doctor.check_checkpoint(config))
    assert "nowhere.json not found" in line and "norm_stats_path" in line


def test_more_steps_than_a_chunk_holds_are_found(checkpoint):
    (line,) = stops(doctor.check_checkpoint(config_of(checkpoint, replan_steps=11)))
    assert "task.replan_steps is 11" in line and "10 or less" in line


def test_packages_as_locked_are_one_line():
    (finding,) = doctor.check_packages(doctor.locked_versions())
    assert finding.status == OK and finding.text.endswith("packages as locked")


def test_a_missing_package_stops_and_another_version_does_not():
    findings = list(doctor.check_packages({"no-such-package": "1.0", "numpy": "1.0"}))
    assert [(finding.status, finding.text.split(" is ")[0]) for finding in findings] == [
        (STOP, "no-such-package"),
        (NOTE, "numpy"),
    ]
    assert all("make setup" in finding.mend for finding in findings)


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_a_back_end_that_draws_is_enough(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    # EGL finds its drivers through these files; without them it has no device.
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere.json")
    status = {finding.text.split()[0]: finding.status for finding in doctor.check_gl()}
    assert status == {"egl": NOTE, "osmesa": OK}


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_no_back_end_that_draws_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere.json")
    (line,) = stops(doctor.check_gl())
    assert "egl does not draw" in line and "apt-get install" in line


def test_a_back_end_that_needs_a_screen_is_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    (line,) = stops(doctor.check_gl())
    assert "MUJOCO_GL=glfw" in line and "egl, osmesa" in line


def test_chosen_stand_ins_are_fine_and_a_missing_folder_is_not(tmp_path):
    assert [finding.status for finding in doctor.check_assets("standins")] == [OK]
    (line,) = stops(doctor.check_assets(str(tmp_path / "nowhere")))
    assert "nowhere does not exist" in line and "task.assets" in line


def test_recorded_initial_states_of_the_tasks_are_counted():
    (finding,) = doctor.check_init_states("libero_spatial", [3, 8])
    assert (finding.status, finding.text) == (OK, "100 recorded for 2 tasks of libero_spatial")


def test_an_unknown_task_is_named():
    (line,) = stops(doctor.check_init_states("libero_spatial", ["pick_up_the_bowl"]))
    assert "unknown task 'pick_up_the_bowl'" in line and "task_names_to_use" in line


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (line,) = stops(doctor.check_output(file / "outputs"))
    assert "cannot write" in line and "set output_dir" in line
    assert not stops(doctor.check_output(tmp_path / "new" / "outputs"))
    assert not (tmp_path / "new").exists()


def test_too_many_workers_for_memory_and_cores_are_found():
    status = {finding.subject: finding.status for finding in doctor.check_memory_and_cores(100_000)}
    assert status == {"memory": STOP, "cores": NOTE}


@pytest.mark.runs
def test_a_wrong_configuration_is_reported_and_the_rest_is_still_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", "standins")
    path = tmp_path / "run.yaml"
    path.write_text("policy_path: a\nalgo: {learning_rate: 1}\n")
    assert doctor.main(["--config_path", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stop  config") and lines[0].endswith("the nearest one is algo.lr")
    assert {line.split()[1] for line in lines[1:-1]} >= {"python", "packages", "gl", "gpu", "memory", "disk"}
    assert lines[-1] == "findings that would stop a run: 1"


@pytest.mark.runs
def test_a_machine_and_configuration_that_are_fine_end_with_status_0(checkpoint, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    task = "{assets: standins, task_name: 3, num_parallel_envs: 1}"
    path.write_text(f"policy_path: {checkpoint}\noutput_dir: {tmp_path}\ntask: {task}\n")
    assert doctor.main(["--config_path", str(path)]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.splitlines()[-1] == "nothing would stop a run"


@pytest.mark.runs
def test_a_check_that_breaks_is_itself_a_finding(monkeypatch):
    def broken_check():
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "check_gl", broken_check)
    assert any("gl" in line and "surprise" in line for line in stops(doctor.examine(None)))


WITHOUT_PACKAGES = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("yaml", "numpy", "torch", "av", "gymnasium"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from pi0 import doctor
"""


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_the_doctor_is_imported_where_packages_are_missing():
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGES], cwd=REPO_ROOT, check=True, timeout=60)
