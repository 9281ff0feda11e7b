"""Scripted experts solve their tasks from training states."""

import numpy as np
import pytest

from pi0.base.errors import InputError
from pi0.libero.assets import resolve_assets
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import Environments
from pi0.libero.evaluation import BrokenSimulationsError
from pi0.libero.experts import Expert, NoExpertError
from pi0.libero.microwave import PutIn
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import TaskSim
from pi0.libero.suites import suite_tasks
from pi0.model.config import Pi0Config

pytestmark = pytest.mark.engine

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
TASKS = [(suite, index) for suite in SUITES for index in range(10)]


def solved_of(suite: str, index: int, count: int) -> int:
    """How many of so many drawn states the expert solves."""
    task = suite_tasks(suite)[index]
    sim = TaskSim(task, resolve_assets("standins"))
    np.random.seed(0)
    solved = 0
    for _ in range(count):
        sim.reset(sim.draw_init_state(), settle_steps=10)
        expert = Expert(sim)
        solved += any(sim.step(expert.action()) for _ in range(task.horizon))
    return solved


@pytest.mark.parametrize(("suite", "index"), TASKS)
def test_an_expert_solves_most_drawn_states(suite, index):
    assert solved_of(suite, index, 3) >= 2


@pytest.mark.soak
@pytest.mark.parametrize(("suite", "index"), TASKS)
def test_an_expert_solves_eight_of_ten_drawn_states(suite, index):
    assert solved_of(suite, index, 10) >= 8


def test_a_task_without_an_expert_is_refused_by_name():
    task = next(task for task in suite_tasks("libero_90") if task.name.endswith("turn_off_the_stove"))
    sim = TaskSim(task, resolve_assets("standins"))
    with pytest.raises(NoExpertError, match=r"no motion for the goal \['turnoff', 'flat_stove_1'\]"):
        Expert(sim)


def test_a_thing_whose_handle_is_unknown_is_refused_by_name():
    sim = TaskSim(suite_tasks("libero_10")[9], resolve_assets("standins"))
    with pytest.raises(NoExpertError, match="no handle is known for porcelain_mug"):
        PutIn(sim, ["in", "porcelain_mug_1", "microwave_1_heating_region"])


def test_a_microwave_is_shut_only_after_the_mug_is_inside():
    sim = TaskSim(suite_tasks("libero_10")[9], resolve_assets("standins"))
    np.random.seed(0)
    sim.reset(sim.draw_init_state(), settle_steps=10)
    inside, shut = sim.libero.parsed_problem["goal_state"]
    expert, held = Expert(sim), []
    for _ in range(sim.task.horizon):
        solved = sim.step(expert.action())
        held.append((sim.libero._eval_predicate(inside), sim.libero._eval_predicate(shut)))
        if solved:
            break
    assert held[0] == (False, False) and held[-1] == (True, True)
    assert (False, True) not in held


def test_a_mug_that_slips_out_of_the_hand_is_taken_again():
    sim = TaskSim(suite_tasks("libero_10")[9], resolve_assets("standins"))
    np.random.seed(0)
    sim.reset(sim.draw_init_state(), settle_steps=10)
    mug = sim.libero.obj_body_id["white_yellow_mug_1"]
    table = float(sim.data.xpos[mug][2])
    expert, dropped, fell = Expert(sim), 0, False
    for _ in range(sim.task.horizon):
        action = expert.action()
        if dropped < 5 and sim.data.xpos[mug][2] > table + 0.02:
            action[6], dropped = -1.0, dropped + 1
        solved = sim.step(action)
        fell |= dropped == 5 and sim.data.xpos[mug][2] < table + 0.005
        if solved:
            break
    assert fell and solved


def test_a_drawer_is_opened_before_a_bowl_is_put_into_it():
    sim = TaskSim(suite_tasks("libero_goal")[3], resolve_assets("standins"))
    np.random.seed(0)
    sim.reset(sim.draw_init_state(), settle_steps=10)
    drawer = sim.libero.object_states_dict["wooden_cabinet_1_top_region"]
    expert, opened = Expert(sim), []
    for _ in range(sim.task.horizon):
        solved = sim.step(expert.action())
        opened.append(drawer.is_open())
        if solved:
            break
    assert solved and not opened[0] and opened[-1]
    assert opened.index(True) < len(opened) - 50


def test_two_things_are_placed_one_after_the_other():
    task = suite_tasks("libero_10")[0]
    sim = TaskSim(task, resolve_assets("standins"))
    np.random.seed(1)
    sim.reset(sim.draw_init_state(), settle_steps=10)
    words = ["in alphabet_soup_1 basket_1_contain_region", "in tomato_sauce_1 basket_1_contain_region"]
    expert = Expert(sim)
    placed = []
    for _ in range(task.horizon):
        solved = sim.step(expert.action())
        conditions = sim.conditions()
        assert list(conditions) == words
        assert all(conditions.values()) == solved
        placed.append([*conditions.values()])
        if solved:
            break
    assert placed[-1] == [True, True]
    assert [True, False] in placed
    assert [False, True] not in placed


def test_experts_that_solve_nothing_are_an_error_that_names_the_tasks():
    task = TaskConfig(task_names_to_use=[3], num_parallel_envs=1, assets="standins", max_episode_length=5)
    with (
        Environments(task, Pi0Config.preset("pi0_tiny")) as environments,
        pytest.raises(
            InputError, match=r"solved none of 2 episodes of pick_up_the_black_bowl_on_the_cookie_box"
        ),
    ):
        record_demonstrations(environments, per_task=2, seed=0, noise=0.1, frame_every=3)


def test_attempts_whose_simulation_breaks_are_not_counted_as_failures_of_the_expert():
    task = TaskConfig(task_names_to_use=[3], num_parallel_envs=1, assets="standins")
    with (
        Environments(task, Pi0Config.preset("pi0_tiny")) as environments,
        pytest.raises(BrokenSimulationsError, match=r"demonstrations: 2 of 2 broken"),
    ):
        record_demonstrations(environments, per_task=2, seed=0, noise=float("nan"), frame_every=3)


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
