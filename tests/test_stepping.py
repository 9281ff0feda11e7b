"""`TaskSim` is LIBERO to the last bit: dynamics, observations, goals, and fixture placements."""

import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from pi0.libero import suites
from pi0.libero.assets import resolve_assets, use_assets
from pi0.libero.libero_import import prepare_libero
from pi0.libero.stepping import SETTLE_ACTION, InitState, TaskSim, quat_to_axis_angle
from pi0.libero.suites import DamagedPackageError, find_tasks, suite_tasks

# A table, an open drawer, a floor of groceries, a stove to turn on, a kitchen with articulated doors, a tray, a shelf.
TASKS = [
    ("libero_spatial", 3),
    ("libero_spatial", 4),
    ("libero_object", 1),
    ("libero_goal", 7),
    ("libero_10", 9),
    ("libero_90", 63),
    ("libero_90", 88),
    # LIBERO-PRO: other places, another goal
    ("libero_pro/object_swap", 3),
    ("libero_pro/goal_task", 0),
]


class Pair:
    """The same task twice: here and as LIBERO runs it."""

    def __init__(self, suite: str, index: int):
        self.task = suite_tasks(suite)[index]
        assets = resolve_assets("standins")
        self.ours = TaskSim(self.task, assets)
        use_assets(assets)
        from libero.libero.envs.env_wrapper import ControlEnv

        # hard_reset as in LIBERO's evaluation: every reset rebuilds the scene.
        self.theirs = ControlEnv(self.task.bddl_file, use_camera_obs=False, has_offscreen_renderer=False)

    def their_fixtures(self) -> np.ndarray:
        model, bodies = self.theirs.sim.model, self.theirs.env.obj_body_id
        return np.array(
            [
                np.r_[model.body_pos[bodies[name]], model.body_quat[bodies[name]]]
                for name in self.theirs.env.fixtures_dict
            ]
        ).reshape(-1, 7)

    def our_state(self) -> np.ndarray:
        return np.r_[self.ours.data.time, self.ours.data.qpos, self.ours.data.qvel]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def pair(request):
    pair = Pair(*request.param)
    yield pair
    pair.theirs.close()


@pytest.mark.engine
def test_placements_are_those_of_rebuilding_resets(pair):
    pair.theirs.seed(0)
    theirs = []
    for _ in range(3):
        pair.theirs.reset()
        theirs.append((pair.theirs.get_sim_state(), pair.their_fixtures()))
    np.random.seed(0)
    # LIBERO's constructor has reset once, and each reset adds a copy of its joint initialisers.
    ours = [pair.ours.draw_init_state(resets=reset + 1) for reset in range(3)]
    for (state, fixtures), drawn in zip(theirs, ours, strict=True):
        assert np.array_equal(state, drawn.state)
        assert np.array_equal(fixtures, drawn.fixtures)


@pytest.mark.engine
def test_states_observations_and_success_are_bit_identical(pair):
    recorded = pair.task.recorded_init_states()[0]
    pair.theirs.seed(0)
    pair.theirs.reset()
    pair.theirs.set_init_state(recorded)
    pair.ours.reset(InitState(recorded, pair.their_fixtures()))
    random = np.random.default_rng(0)
    seen = []
    for step in range(60):
        action = SETTLE_ACTION if step < 10 else random.uniform(-1.2, 1.2, 7)
        if 20 <= step < 25:
            action[3:6] = 0.0  # no rotation asked for: the goal orientation stays
        observation, _, done, _ = pair.theirs.step(action)
        success = pair.ours.step(action, lambda: seen.append(pair.ours.proprioception()))
        assert np.array_equal(pair.theirs.get_sim_state(), pair.our_state()), f"step {step}"
        assert done == success
        assert len(seen) == step + 1
        assert np.array_equal(seen[-1][:3], observation["robot0_eef_pos"].astype(np.float32))
        turn = quat_to_axis_angle(observation["robot0_eef_quat"]).astype(np.float32)
        assert np.array_equal(seen[-1][3:6], turn)
        assert np.array_equal(seen[-1][6:], observation["robot0_gripper_qpos"].astype(np.float32))


@pytest.mark.engine
def test_a_restored_snapshot_continues_to_the_bit(pair):
    recorded = pair.task.recorded_init_states()
    fixtures = pair.their_fixtures()
    random = np.random.default_rng(1)
    pair.ours.reset(InitState(recorded[0], fixtures), settle_steps=3)
    snapshot = pair.ours.snapshot()
    actions = random.uniform(-1, 1, (15, 7))
    for action in actions:
        pair.ours.step(action)
    straight = pair.our_state()
    moved = fixtures + np.array([0.01, 0, 0, 0, 0, 0, 0])
    pair.ours.reset(InitState(recorded[1], moved), settle_steps=2)  # somebody else used the scene meanwhile
    pair.ours.restore(snapshot)
    for action in actions:
        pair.ours.step(action)
    assert np.array_equal(straight, pair.our_state())


@pytest.mark.engine
def test_reset_refuses_a_state_of_another_task(pair):
    with pytest.raises(ValueError, match="has shape"):
        pair.ours.reset(InitState(np.zeros(3), pair.their_fixtures()))


@pytest.mark.engine
def test_a_diverged_simulation_is_an_error_not_a_number(pair):
    state = pair.task.recorded_init_states()[0]
    state[1] = np.nan
    pair.ours.reset(InitState(state, pair.their_fixtures()))
    with pytest.raises(FloatingPointError, match="diverged"):
        pair.ours.step(SETTLE_ACTION)


@pytest.mark.engine
def test_an_action_that_is_not_finite_is_an_error_and_no_step(pair):
    time = pair.ours.data.time
    with pytest.raises(ValueError, match="is not finite"):
        pair.ours.step(np.array([0, 0, np.nan, 0, 0, 0, -1]))
    assert pair.ours.data.time == time


def test_tasks_and_recorded_states_are_those_libero_lists():
    import torch

    prepare_libero()
    from libero.libero.benchmark import task_maps

    for suite, theirs in task_maps.items():
        for task, their in zip(suite_tasks(suite), theirs.values(), strict=True):
            assert (task.name, task.prompt) == (their.name, their.language)
            assert task.bddl_file.endswith(f"/{their.problem_folder}/{their.bddl_file}")
            assert task.init_states_file.endswith(f"/{their.problem_folder}/{their.init_states_file}")
    recorded = torch.load(task.init_states_file, weights_only=False)  # the installed package's own file
    assert np.array_equal(task.recorded_init_states(), recorded)


def test_recorded_states_are_arrays_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "states.pruned_init"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("states/data.pkl", pickle.dumps(print))
    task = suite_tasks("libero_spatial")[0]
    monkeypatch.setattr(suites, "libero_package_root", lambda: tmp_path)
    task = replace(task, init_states_file=str(file))
    with pytest.raises(DamagedPackageError, match="no place in an array"):
        task.recorded_init_states()


def test_unknown_suites_and_tasks_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'libero_spatial'"):
        suite_tasks("libero_spacial")
    with pytest.raises(ValueError, match="did you mean 'pick_up_the_milk_and_place_it_in_the_basket'"):
        find_tasks("libero_object", ["pick_up_the_milk_and_place_it_in_basket"])
    with pytest.raises(ValueError, match="tasks 0 to 9, not 12"):
        find_tasks("libero_object", [12])
