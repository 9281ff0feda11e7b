"""RIPT that practises with the best of several chunks by a critic: who acts so, and whole stages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pi0 import PI0Policy
from pi0.base.errors import MissingFileError
from pi0.base.paths import REPO_ROOT
from pi0.policy.critics import BestOfPolicy, CriticNetworks, PolicyFeatures, save_critic
from pi0.ript.config import load_config
from pi0.ript.learner import acting_policies

CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
SHORT = str(REPO_ROOT / "tests" / "support" / "short_practice.py")


@pytest.fixture(scope="module")
def policy() -> PI0Policy:
    return PI0Policy.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def critic(policy, tmp_path_factory) -> Path:
    """A critic that nobody has trained: it prefers some chunks to others."""
    folder = tmp_path_factory.mktemp("critic")
    torch.manual_seed(0)
    features, config = PolicyFeatures(policy.config, policy.network), policy.config
    critics = CriticNetworks(features.width, config.action_dim, 10, config.robot_action_dim)
    save_critic(folder, critics, features)
    return folder


def policies(policy, *overrides):
    config = load_config(REPO_ROOT / "configs" / "quickstart.yaml", list(overrides))
    return acting_policies(config, SimpleNamespace(average=SimpleNamespace(module=policy)))


def test_without_a_critic_practice_and_scores_are_of_the_same_policy(policy):
    scored, practising = policies(policy)
    assert practising(0) is scored
    assert not isinstance(scored, BestOfPolicy)


def test_a_critic_of_the_first_iterations_chooses_in_no_other(policy, critic):
    scored, practising = policies(policy, f"algo.critic_path={critic}", "algo.critic_iterations=2")
    assert [practising(step) is scored for step in range(4)] == [False, False, True, True]
    assert isinstance(practising(1), BestOfPolicy)


def test_with_a_critic_practice_takes_the_chunk_of_highest_value_and_scores_take_one(policy, critic):
    more = ("algo.num_action_samples=4", "algo.critic_iterations=null")
    scored, of_step = policies(policy, f"algo.critic_path={critic}", *more)
    practising = of_step(100)
    assert not isinstance(scored, BestOfPolicy)
    noise = practising.noise((1, 2, 3))
    assert noise.shape == (4, policy.config.action_horizon, policy.config.action_dim)
    assert np.array_equal(noise[0], scored.noise((1, 2, 3)))
    random = np.random.default_rng(0)
    size = policy.config.image_size
    images = {
        name: random.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for name in policy.config.cameras
    }
    states = random.normal(size=(1, 8)).astype(np.float32)
    seen = (images, states, ["pick up the bowl"])
    each = np.stack([scored.act(*seen, one[None])[0] for one in noise])
    best = practising.act(*seen, noise[None])[0]
    critics, features = practising._critics, practising._features
    inputs = policy.prepare({"images": images, "state": states, "prompt": seen[2]})
    chunks = policy.normalize_actions(torch.from_numpy(each), states)[..., :10, :7]
    observed = critics.observe(features(**inputs), inputs["state"])
    values = critics.values(observed, chunks[:, None]).mean(0)[:, 0]
    assert np.abs(best - each[int(values.argmax())]).max() < 1e-5
    assert np.abs(each - best).reshape(4, -1).max(1).max() > 1e-2, "the chunks differ"


def test_a_critic_that_is_not_there_is_named(policy, tmp_path):
    with pytest.raises(MissingFileError, match="critic.json is not there"):
        policies(policy, f"algo.critic_path={tmp_path / 'none'}")


@pytest.mark.runs
@pytest.mark.parametrize(
    "script",
    [pytest.param("09_train_with_config.py", marks=pytest.mark.soak), "13_train_production_ready.py"],
)
def test_a_stage_practises_with_the_critic_and_is_scored_without(script, critic, tmp_path):
    rows = []
    for name, more in (("plain", []), ("best", [f"algo.critic_path={critic}"])):
        command = [
            sys.executable, SHORT, script, "--config_path", "configs/minimal_test.yaml", "--override",
            f"output_dir={tmp_path / name}", "training.num_train_steps=1", *more,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=REPO_ROOT,
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (results,) = (tmp_path / name).glob("*/results.json")
        rows.append(json.loads(results.read_text()))
    plain, best = rows
    assert plain["before"]["outcomes"] == best["before"]["outcomes"]
    assert plain["history"][0]["loss"] != best["history"][0]["loss"]
