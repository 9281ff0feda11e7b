"""Demonstrations learned from beside practice."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pi0 import PI0Policy
from pi0.data import DataError
from pi0.data.lerobot_writer import LeRobotWriter
from pi0.libero.suites import find_tasks
from pi0.model.config import PUBLISHED_CAMERAS
from pi0.model.network import POSITIVE
from pi0.ript.config import AlgoConfig, Config, TaskConfig
from pi0.ript.cotraining import load_cotraining
from pi0.training.flow_loss import flow_loss
from tests.support.recordings import FPS, make_demonstration
from tests.support.stage_13_runs import CHECKPOINT, SCRIPT, SHORT, finish, run_of, start

TASKS = find_tasks("libero_spatial", [3])
LENGTHS = (31, 12)  # of control steps; an observation every 10 of them makes 4 and 2 chunks


@pytest.fixture(scope="module")
def policy():
    return PI0Policy.from_pretrained(CHECKPOINT)


def write(path, prompt=TASKS[0].prompt):
    with LeRobotWriter(path, FPS) as writer:
        for seed, length in enumerate(LENGTHS):
            writer.add(make_demonstration(length, seed, prompt))
    return path


def config_of(path, **algo) -> Config:
    return Config(
        policy_path=str(CHECKPOINT),
        algo=AlgoConfig(cotraining_path=path and str(path), **algo),
        task=TaskConfig(task_name=3),
    )


def test_without_a_data_set_there_is_none(policy):
    assert load_cotraining(config_of(None), policy, TASKS) is None


def test_a_draw_is_decided_by_the_generator_alone_and_weighs_what_was_asked(policy, tmp_path, capsys):
    config = config_of(write(tmp_path / "set"), cotraining_chunks=40, cotraining_weight=0.25)
    cotraining = load_cotraining(config, policy, TASKS)
    assert "co-training: 6 chunks of 2 demonstrations" in capsys.readouterr().out
    first, again, other = (cotraining.draw(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert len(first) == 40
    assert first.chunks.images["base_0_rgb"].shape == (40, 64, 64, 3)
    assert (first.weights == 0.25).all()
    assert (first.optimality == POSITIVE).all()
    assert torch.equal(first.chunks.states, again.chunks.states)
    assert not torch.equal(first.chunks.states, other.chunks.states)
    assert len(first.chunks.states.unique(dim=0)) == 6


def test_demonstrations_of_other_tasks_or_cameras_are_refused(policy, tmp_path):
    with pytest.raises(DataError, match=r"no demonstration of pick_up.*has: make tea"):
        load_cotraining(config_of(write(tmp_path / "tea", "make tea")), policy, TASKS)
    one_eyed = PI0Policy(dataclasses.replace(policy.config, cameras=("base_0_rgb",)), policy.norm_stats)
    with pytest.raises(
        DataError, match="has images of base_0_rgb, left_wrist_0_rgb; the policy uses base_0_rgb$"
    ):
        load_cotraining(config_of(write(tmp_path / "set")), one_eyed, TASKS)


def test_a_set_whose_gripper_is_opened_by_1_is_learned_from_once_that_is_said(policy, tmp_path):
    demonstration = make_demonstration(31, 0, TASKS[0].prompt)
    demonstration.actions[:, -1] = np.arange(31) < 20  # open, then closed
    demonstration.executed[:, -1] = demonstration.actions[:, -1]
    with LeRobotWriter(tmp_path / "set", FPS) as writer:
        writer.add(demonstration)
    with pytest.raises(DataError, match=r"set: gripper actions are 0 to 1, .* algo\.cotraining_gripper"):
        load_cotraining(config_of(tmp_path / "set"), policy, TASKS)
    config = config_of(tmp_path / "set", cotraining_gripper="open-is-1")
    chunks = load_cotraining(config, policy, TASKS).draw(torch.Generator().manual_seed(0)).chunks
    whole = chunks.actions[chunks.valid.all(1)]
    assert set(whole[:, 0, -1].tolist()) == {-1.0, 1.0}
    early = whole[whole[:, 0, -1] == -1]
    assert (early[..., -1] == -1).all()


def test_a_camera_that_libero_has_not_is_masked(policy, tmp_path):
    published = PI0Policy(dataclasses.replace(policy.config, cameras=PUBLISHED_CAMERAS), policy.norm_stats)
    config = config_of(write(tmp_path / "set"), cotraining_chunks=6)
    cotraining = load_cotraining(config, published, TASKS)
    generator = torch.Generator().manual_seed(0)
    flow_loss(published, cotraining.draw(generator).chunks, samples=1, generator=generator).mean().backward()
    towers = published.network.vision.state_dict(keep_vars=True)
    learned = {
        name.split(".")[1] for name, weight in towers.items() if weight.grad is not None and weight.grad.any()
    }
    assert learned == {"base_0_rgb", "left_wrist_0_rgb"}


@pytest.mark.runs
def test_a_run_learns_from_demonstrations_as_well(tmp_path):
    overrides = [
        f"algo.cotraining_path={write(tmp_path / 'set')}", "algo.cotraining_chunks=72",
        "training.num_train_steps=1", "evaluation.periodic_episodes=0",
    ]  # fmt: skip
    short = ("tests/support/short_practice.py", SCRIPT)
    output = finish(start(tmp_path / "runs", "--override", *overrides, script=short))
    assert "co-training: 6 chunks of 2 demonstrations" in output
    (row,) = map(json.loads, (run_of(tmp_path / "runs") / "metrics.jsonl").read_text().splitlines())
    assert row["updates"] >= 2 * 72 / 24  # two passes in minibatches of 24; four rollouts alone make two


@pytest.mark.runs
def test_where_practice_teaches_nothing_demonstrations_do_not_stand_in_for_it(tmp_path):
    overrides = [
        f"algo.cotraining_path={write(tmp_path / 'set')}",
        "training.num_train_steps=1",
        "evaluation.periodic_episodes=0",
    ]
    output = finish(start(tmp_path / "runs", *SHORT, *overrides))
    assert "co-training: 6 chunks of 2 demonstrations" in output
    assert "nothing to learn from" in output
    (row,) = map(json.loads, (run_of(tmp_path / "runs") / "metrics.jsonl").read_text().splitlines())
    assert "updates" not in row
