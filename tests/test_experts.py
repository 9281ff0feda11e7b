"""Scripted experts solve the pick-and-place tasks from training states."""

import numpy as np
import pytest

from pi0.libero.assets import resolve_assets
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import Environments
from pi0.libero.experts import NoExpertError, PickAndPlace
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import TaskSim
from pi0.libero.suites import suite_tasks
from pi0.model.config import Pi0Config

pytestmark = pytest.mark.engine

TASKS = [(suite, index) for suite in ("libero_spatial", "libero_object") for index in range(10)]
TASKS += [("libero_10", index) for index in (0, 1, 4, 6, 7)]  # those that place two things


@pytest.mark.parametrize(("suite", "index"), TASKS)
def test_an_expert_solves_most_drawn_states(suite, index):
    task = suite_tasks(suite)[index]
    sim = TaskSim(task, resolve_assets("standins"))
    np.random.seed(0)
    solved = 0
    for _ in range(3):
        sim.reset(sim.draw_init_state(), settle_steps=10)
        expert = PickAndPlace(sim)
        solved += any(sim.step(expert.action()) for _ in range(task.horizon))
    assert solved >= 2


def test_a_task_without_an_expert_is_refused_by_name():
    sim = TaskSim(suite_tasks("libero_goal")[7], resolve_assets("standins"))
    with pytest.raises(NoExpertError, match="turn_on_the_stove"):
        PickAndPlace(sim)


def test_two_things_are_placed_one_after_the_other():
    task = suite_tasks("libero_10")[0]
    sim = TaskSim(task, resolve_assets("standins"))
    np.random.seed(1)
    sim.reset(sim.draw_init_state(), settle_steps=10)
    goals = sim.libero.parsed_problem["goal_state"]
    expert = PickAndPlace(sim)
    placed = []
    for _ in range(task.horizon):
        solved = sim.step(expert.action())
        placed.append([bool(sim.libero._eval_predicate(goal)) for goal in goals])
        if solved:
            break
    assert placed[-1] == [True, True]
    assert [True, False] in placed
    assert [False, True] not in placed


def test_demonstrations_hold_what_the_policy_would_see_and_what_to_do():
    task = TaskConfig(task_names_to_use=[3], num_parallel_envs=2, assets="standins")
    with Environments(task, Pi0Config.preset("pi0_tiny")) as environments:
        chunks, summary = record_demonstrations(environments, per_task=2, seed=0, noise=0.1, frame_every=3)
    (counts,) = summary.values()
    assert counts["attempts"] == 2
    assert counts["successes"] >= 1
    assert len(chunks) * 3 >= counts["successes"] * counts["mean_steps"] - 6
    assert chunks.images["left_wrist_0_rgb"].shape == (len(chunks), 64, 64, 3)
    assert chunks.actions.abs().max() <= 1
    assert chunks.valid[0].all()
    # Only the end of a demonstration is cut off, and there the invalid actions come last.
    assert (chunks.valid.int().diff(dim=1) <= 0).all()
    # Neighbouring labels of one moment agree: the second observation's first action is the first's fourth.
    assert np.allclose(chunks.actions[1, 0], chunks.actions[0, 3])
