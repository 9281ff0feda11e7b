"""`lerobot-eval` on this engine: LeRobot's own code, in .venv-lerobot (`make lerobot`)."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.libero.environments import Environments
from pi0.libero.evaluation import evaluate
from pi0.libero.gym_env import LIBEROEnv
from pi0.libero.settings import TaskConfig
from pi0.policy.acting import ActingPolicy
from tests.support.episodes import write_chunks

CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"

pytestmark = [pytest.mark.soak, pytest.mark.engine, pytest.mark.runs]

LEROBOT = REPO_ROOT / ".venv-lerobot" / "bin"


@pytest.fixture(scope="module", autouse=True)
def needs_lerobot():
    if not (LEROBOT / "lerobot-eval").exists():
        pytest.skip("make lerobot installs LeRobot")


def lerobot_eval(output: Path, *options: str, extra: Path | None = None) -> dict:
    done = subprocess.run(
        [LEROBOT / "lerobot-eval", "--env.type=pi0_libero", "--env.assets=standins", f"--output_dir={output}", *options],
        cwd=output.parent, capture_output=True, text=True, timeout=500, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(output.parent), "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(extra)} if extra else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "eval_info.json").read_text())


def test_a_policy_in_lerobot_gets_the_outcomes_it_has_here(tmp_path):
    policy = PI0Policy.from_pretrained(CHECKPOINT)
    task = TaskConfig(task_names_to_use=[3, 8], assets="standins", max_episode_length=120)
    with Environments(task, policy.config) as environments:
        known = evaluate(environments, ActingPolicy(policy), 12, 0)
    write_chunks(tmp_path / "table.npz", known.episodes)
    package = tmp_path / "packages" / "lerobot_policy_repeats-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_policy_repeats\nVersion: 0\n")
    shutil.copy(REPO_ROOT / "tests" / "support" / "lerobot_policy_repeats.py", package.parent)

    info = lerobot_eval(
        tmp_path / "scored", "--policy.type=repeats", f"--policy.table={tmp_path / 'table.npz'}", "--policy.push_to_hub=false",
        "--policy.device=cpu", "--env.task=libero_spatial", "--env.task_ids=[3,8]", "--env.episode_length=120",
        "--env.observation_height=64", "--env.observation_width=64", "--env.render=fast", "--eval.n_episodes=6",
        "--eval.batch_size=3", extra=package.parent,
    )  # fmt: skip
    scored = {
        (each["task_group"], each["task_id"]): each["metrics"]["successes"] for each in info["per_task"]
    }
    assert scored == {("libero_spatial", 3): known.outcomes[:6], ("libero_spatial", 8): known.outcomes[6:]}
    assert {*known.outcomes} == {True, False}
    assert info["overall"]["n_episodes"] == 12

    seen = np.load(tmp_path / "seen.npz")
    env = LIBEROEnv(task=3, assets="standins", image_size=64)
    for state in range(3):  # the batch
        images = env.reset(options={"init_state": state})[0]["images"]
        for name, camera in (("image", "base_0_rgb"), ("image2", "left_wrist_0_rgb")):
            turned = images[camera][::-1][
                ::-1, ::-1
            ]  # upside down, as LIBERO draws it, and turned by 180 degrees
            assert np.array_equal(seen[f"observation.images.{name}"][state].transpose(1, 2, 0), turned)
    assert seen["task"].tolist() == [env.task.prompt] * 3
    env.close()
    films = sorted((tmp_path / "scored" / "videos" / "libero_spatial_3").glob("*.mp4"))
    assert len(films) == 6


def test_a_policy_of_lerobots_own_runs_and_its_rollouts_become_a_data_set(tmp_path):
    info = lerobot_eval(
        tmp_path / "scored", "--policy.type=act", "--policy.push_to_hub=false", "--policy.device=cpu",
        "--policy.pretrained_backbone_weights=null", "--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=64",
        "--policy.chunk_size=10", "--policy.n_action_steps=10", "--env.task=libero_object", "--env.task_ids=[1]",
        "--env.episode_length=20", "--env.observation_height=96", "--env.observation_width=96", "--eval.n_episodes=2",
        "--eval.batch_size=2", "--eval.recording=true",
    )  # fmt: skip
    assert info["per_task"][0]["metrics"]["successes"] == [False, False]
    recorded = tmp_path / "scored" / "recordings" / "libero_object_1" / "env_0" / "meta" / "info.json"
    features = json.loads(recorded.read_text())["features"]
    assert features["observation.images.image"]["shape"] == [96, 96, 3]
    assert features["agent_pos"]["shape"] == [8]


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_object", 1), ("libero_spatial", 3), ("libero_goal", 5), ("libero_10", 2)]
)
def test_a_policy_sees_what_lerobots_own_environment_shows(tmp_path, suite, task):
    """Up to what LIBERO draws at a reset: noise of the arm's joints, of which the first sub-step takes note."""
    script = REPO_ROOT / "tests" / "support" / "beside_lerobots_libero.py"
    command = [LEROBOT / "python", script, suite, str(task), tmp_path / "seen.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    seen = np.load(tmp_path / "seen.npz")
    assert seen["ours"].tolist() == seen["theirs"].tolist()
    keys = ["observation.images.image", "observation.images.image2", "observation.state"]
    assert sorted(name for name in seen if "/" in name) == sorted(
        f"{who}/{key}" for who in ("ours", "theirs") for key in keys
    )
    np.testing.assert_allclose(seen[f"ours/{keys[2]}"], seen[f"theirs/{keys[2]}"], atol=5e-4)
    assert np.ptp(seen[f"ours/{keys[2]}"], axis=0).max() > 0.05  # it has moved
    for key in keys[:2]:
        ours, theirs = seen[f"ours/{key}"], seen[f"theirs/{key}"]
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert np.abs(ours - theirs).mean() < 2e-3
        assert np.abs(ours[..., ::-1] - theirs).mean() > 0.02  # a mirrored one is another picture


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--env.task=libero_spatail", "unknown suite 'libero_spatail'"),
        ("--env.task_ids=[12]", "libero_spatial has tasks 0 to 9, not 12"),
        ("--env.observation_width=64", "frames are square"),
        ("--env.fps=10", "LIBERO's control steps are 50 ms, so it is 20"),
        ("--env.camera_name=frontview", "unknown camera 'frontview'"),
        ("--env.obs_type=state", "use pixels_agent_pos or pixels"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, option, said):
    with pytest.raises(AssertionError, match=said):
        lerobot_eval(
            tmp_path / "scored",
            "--policy.type=act",
            "--policy.push_to_hub=false",
            "--policy.device=cpu",
            option,
        )
