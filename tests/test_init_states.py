"""Two pools of initial states that never mix."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from pi0.base.errors import MissingFileError
from pi0.data import DataError
from pi0.libero.environments import Environments
from pi0.libero.init_states import (
    FIXTURE_MODES,
    evaluation_pools,
    state_hash,
    training_pools,
    with_demonstrated,
)
from pi0.libero.settings import TaskConfig
from pi0.libero.suites import DamagedPackageError
from pi0.model.config import Pi0Config

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def environments():
    task = TaskConfig(task_names_to_use=[3, 4], image_size=32, num_parallel_envs=2, assets="standins")
    with Environments(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))) as environments:
        yield environments


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.libero.init_states.cache_dir", lambda: tmp_path)


def test_evaluation_states_are_all_fifty_that_libero_recorded(environments):
    for pool in environments.evaluation_states():
        assert pool.kind == "evaluation"
        recorded = pool.task.recorded_init_states()
        assert np.array_equal(np.array([state.state for state in pool.states]), recorded)
        assert len(pool) == 50


def test_training_and_evaluation_states_never_mix(environments):
    for training, evaluation in zip(
        environments.training_states(12, seed=0), environments.evaluation_states(), strict=True
    ):
        assert training.kind == "training"
        hashes = {state_hash(state.state) for state in training.states}
        assert len(hashes) == 12
        assert not hashes & {state_hash(state.state) for state in evaluation.states}


def write_demonstrations(folder, task, states, fixtures):
    """An HDF5 file as LIBERO writes them, as far as it says where episodes began."""
    with h5py.File(folder / f"{task.name}_demo.hdf5", "w") as file:
        for number, (state, placement) in enumerate(zip(states, fixtures, strict=True)):
            demo = file.create_group(f"data/demo_{number}")
            demo["states"] = np.stack([state, state + 1.0])
            bodies = "".join(
                f'<body name="{name}" pos="{x} {y} {z}" quat="{a} {b} {c} {d}"/>'
                for name, (x, y, z, a, b, c, d) in placement.items()
            )
            demo.attrs["model_file"] = f"<mujoco><worldbody><body>{bodies}</body></worldbody></mujoco>"


def test_training_states_begin_where_demonstrations_did_except_evaluations_own(environments, tmp_path):
    drawn, other = environments.training_states(4, seed=0)
    moved = [state.state + 0.001 for state in drawn.states[:2]]
    recorded = drawn.task.recorded_init_states()[7]
    placement = {"wooden_cabinet_1_main": (0.1, -0.2, 0.9, 0.0, 0.0, 0.0, 1.0),
                 "flat_stove_1_main": (-0.4, 0.2, 0.9, 1.0, 0.0, 0.0, 0.0)}  # fmt: skip
    write_demonstrations(tmp_path, drawn.task, [moved[0], recorded, moved[1]], [placement] * 3)
    ours, theirs = with_demonstrated(environments.pool, [drawn, other], tmp_path)
    assert [state.state.tolist() for state in ours.states[:2]] == [state.tolist() for state in moved]
    assert ours.states[0].fixtures.tolist() == [list(placement[name]) for name in placement]
    assert [state_hash(state.state) for state in ours.states[2:]] == [
        state_hash(state.state) for state in drawn.states[:2]
    ]
    assert (ours.provenance["demonstrated"], ours.provenance["left_out"], len(ours)) == (2, 1, 4)
    assert theirs is other
    # Of several ranks one may have no task, or none that was demonstrated.
    assert with_demonstrated(environments.pool, [], tmp_path) == []
    assert with_demonstrated(environments.pool, [other], tmp_path) == [other]


def test_recorded_states_that_are_not_held_out_may_be_practised_and_are_never_scored(environments):
    recorded = [[state_hash(state) for state in task.recorded_init_states()] for task in environments.tasks]
    environments.held_out_states = 20
    try:
        scored, practised = environments.evaluation_states(), environments.training_states(8, seed=0)
        rest = environments.training_states(100, seed=0)
    finally:
        environments.held_out_states = None
    for hashes, of_scores, of_practice, whole in zip(recorded, scored, practised, rest, strict=True):
        assert [state_hash(state.state) for state in of_scores.states] == hashes[:20]
        assert [state_hash(state.state) for state in of_practice.states] == hashes[20:28]
        assert [state_hash(state.state) for state in whole.states] == hashes[20:]
        assert (of_practice.kind, of_practice.provenance["held_out"]) == ("training", 20)
        assert of_scores.kind == "evaluation"
    assert [len(pool) for pool in environments.evaluation_states()] == [50, 50], (
        "nothing is held out for good"
    )


def test_demonstrations_of_another_scene_or_none_are_named(environments, tmp_path):
    (drawn, _) = environments.training_states(2, seed=0)
    with pytest.raises(MissingFileError, match=f"has no demonstrations .*{drawn.task.name}_demo.hdf5"):
        with_demonstrated(environments.pool, [drawn], tmp_path)
    write_demonstrations(tmp_path, drawn.task, [drawn.states[0].state], [{"another_main": (0,) * 7}])
    with pytest.raises(DataError, match="the scene has no wooden_cabinet_1_main"):
        with_demonstrated(environments.pool, [drawn], tmp_path)
    write_demonstrations(tmp_path, drawn.task, [drawn.states[0].state[:-1]], [{}])
    with pytest.raises(DataError, match="demo_0/states has shape"):
        with_demonstrated(environments.pool, [drawn], tmp_path)


def test_training_states_spread_like_the_recorded_ones(environments):
    training, evaluation = environments.training_states(12, seed=0)[0], environments.evaluation_states()[0]
    ours, recorded = (np.array([state.state for state in pool.states]) for pool in (training, evaluation))
    assert np.allclose(ours.mean(0), recorded.mean(0), atol=0.03)


def test_training_states_depend_on_the_seed_and_not_on_how_many_are_drawn(environments):
    few, many = environments.training_states(3, seed=1)[0], environments.training_states(5, seed=1)[0]
    other = environments.training_states(3, seed=2)[0]
    for index in range(3):
        assert np.array_equal(few.states[index].state, many.states[index].state)
        assert np.array_equal(few.states[index].fixtures, many.states[index].fixtures)
        assert not np.array_equal(few.states[index].state, other.states[index].state)


def test_training_states_are_kept_in_a_file_with_their_provenance(environments, tmp_path):
    drawn = environments.training_states(2, seed=3)[0]
    again = training_pools(environments.pool, environments.tasks, 2, 3)[0]
    assert again.provenance == drawn.provenance
    assert drawn.provenance["seed"] == 3
    assert drawn.provenance["assets"]["source"] == "standins"
    assert (tmp_path / "init_states").is_dir()
    assert np.array_equal(drawn.states[1].state, again.states[1].state)


def without(file, name):
    """The bytes of a file of arrays with one of them left out."""
    with np.load(file) as content:
        kept = {key: content[key] for key in content.files if key != name}
    np.savez(file, **kept)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-200]),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"),
    "altered": lambda file: file.write_bytes(file.read_bytes().replace(b"NUMPY", b"NUMBY")),
    "without an array": lambda file: without(file, "fixtures"),
    "of fewer states": lambda file: np.savez(file, states=[], fixtures=[], provenance=np.array("{}")),
    "an array alone": lambda file: file.write_bytes(np.lib.format.magic(1, 0)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("folder", ["init_states", "fixtures"])
@pytest.mark.tried("Initial states or fixtures in the cache are damaged", "They are made again")
def test_damaged_files_of_the_cache_are_made_again(environments, tmp_path, caplog, folder, damage):
    def states():
        if folder == "fixtures":
            return evaluation_pools(environments.pool, environments.tasks[:1], "pinned")[0].states
        return training_pools(environments.pool, environments.tasks[:1], 2, 3)[0].states

    before = states()
    (file,) = (tmp_path / folder).iterdir()
    damage(file)
    after = states()
    assert [state.fixtures.tolist() for state in after] == [state.fixtures.tolist() for state in before]
    assert [state.state.tolist() for state in after] == [state.state.tolist() for state in before]
    assert f"{file} are damaged" in caplog.text and "made again" in caplog.text
    caplog.clear()
    assert len(states()) == len(before)
    assert not caplog.text, "the file was not replaced"


def test_states_that_cannot_be_kept_are_drawn_all_the_same(environments, tmp_path, caplog):
    (tmp_path / "init_states").write_text("a file where the folder should be")
    drawn = training_pools(environments.pool, environments.tasks[:1], 2, 3)[0]
    assert len(drawn) == 2
    assert f"could not be kept in {tmp_path}/init_states" in caplog.text


def test_damaged_states_of_the_installed_package_are_named_with_the_mend(environments, tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.libero.suites.libero_package_root", lambda: tmp_path)
    task = replace(environments.tasks[0], init_states_file=str(tmp_path / "states.pruned_init"))
    for make in (lambda file: None, lambda file: file.write_bytes(b"PK"), lambda file: file.touch()):
        make(tmp_path / "states.pruned_init")
        with pytest.raises(DamagedPackageError, match=r"states\.pruned_init.*pip install .*hf-libero==\d"):
            task.recorded_init_states()


def test_fixtures_follow_liberos_evaluation_or_stay_pinned(environments):
    follow = evaluation_pools(environments.pool, environments.tasks, "libero_eval")[0]
    pinned = evaluation_pools(environments.pool, environments.tasks, "pinned")[0]
    assert np.array_equal(follow.states[0].fixtures, pinned.states[0].fixtures)
    assert all(np.array_equal(state.fixtures, pinned.states[0].fixtures) for state in pinned.states)
    assert not np.array_equal(follow.states[1].fixtures, follow.states[0].fixtures)


def test_an_unknown_placement_of_fixtures_is_refused(environments):
    with pytest.raises(ValueError, match=f"use one of {', '.join(FIXTURE_MODES)}"):
        evaluation_pools(environments.pool, environments.tasks, "anywhere")
