"""A folder of BDDL files is a suite."""

import json
import shutil

import pytest

from pi0.base.errors import InputError, OutputError
from pi0.base.paths import REPO_ROOT
from pi0.evaluate import main as evaluate_command
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import DRAWN_EVALUATION_STATES, Environments
from pi0.libero.init_states import EVALUATION_SEED, VALIDATION_SEED
from pi0.libero.settings import TaskConfig
from pi0.libero.suites import UnknownTaskError, find_tasks
from pi0.model.config import Pi0Config
from pi0.ript.config import ConfigError, load_config
from pi0.ript.resume import compare_outside

EXAMPLE = REPO_ROOT / "examples" / "breakfast"
POLICY = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"


@pytest.fixture
def suite(tmp_path):
    """A copy of the example, whose files a test may change."""
    return shutil.copytree(EXAMPLE, tmp_path / "breakfast")


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.libero.init_states.cache_dir", lambda: tmp_path / "cache")


def environments_of(suite, **settings):
    task = TaskConfig(
        benchmark_name=str(suite), image_size=32, num_parallel_envs=1, assets="standins", **settings
    )
    return Environments(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",)))


def test_its_files_are_tasks_in_the_order_of_their_names():
    tasks = find_tasks(f"{EXAMPLE}/", [])
    assert [(task.index, task.name, task.prompt) for task in tasks] == [
        (0, "put_the_butter_on_the_plate", "put the butter on the plate"),
        (1, "put_the_cream_cheese_in_the_bowl", "put the cream cheese in the bowl"),
    ]
    assert (tasks[0].label, tasks[0].horizon) == ("breakfast-0", 400)
    assert find_tasks(str(EXAMPLE), ["put_the_cream_cheese_in_the_bowl"]) == find_tasks(str(EXAMPLE), [1])


@pytest.mark.tried(
    "`--suite DIR/` without BDDL files, or with one that has no instruction", "An error that names it"
)
def test_a_folder_without_bddl_files_and_a_file_without_an_instruction_are_refused(suite):
    with pytest.raises(
        UnknownTaskError, match=r"nowhere/: a suite with a slash in its name is a folder of BDDL"
    ):
        find_tasks("nowhere/", [])
    file = suite / "put_the_butter_on_the_plate.bddl"
    file.write_text(file.read_text().replace(":language", ":words"))
    with pytest.raises(InputError, match=r"put_the_butter_on_the_plate.bddl has no instruction: \(:language"):
        find_tasks(str(suite), [])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"put_the_butter_on_the_plate.bddl cannot be read"):
        find_tasks(str(suite), [])


def test_a_configuration_names_it_by_a_path_with_a_slash(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"policy_path: {POLICY}\ntask:\n  benchmark_name: {EXAMPLE}\n")
    assert find_tasks(load_config(path).task.benchmark_name, []) == find_tasks(str(EXAMPLE), [])
    path.write_text(f"policy_path: {POLICY}\ntask:\n  benchmark_name: breakfast\n")
    with pytest.raises(
        ConfigError, match=r'run.yaml:3: task.benchmark_name = "breakfast": .* or a path with a slash'
    ):
        load_config(path)


@pytest.mark.engine
def test_its_evaluation_states_are_drawn_apart_from_all_others(suite, fresh_cache):
    with environments_of(suite, task_names_to_use=[0]) as environments:
        (evaluation,) = environments.evaluation_states()
        (validation,) = environments.validation_states(50)
        (training,) = environments.training_states(50, seed=0)
        names = [{state.name for state in pool.states} for pool in (evaluation, validation, training)]
        assert [len(each) for each in names] == [50, 50, 50] and len(set.union(*names)) == 150
        assert (evaluation.kind, evaluation.provenance["seed"]) == ("evaluation", EVALUATION_SEED)
        assert load_seed_range() < VALIDATION_SEED < EVALUATION_SEED
        (again,) = environments.evaluation_states()
        assert [state.name for state in again.states] == [state.name for state in evaluation.states]
        # The file is another now, so its states are drawn again.
        file = suite / "put_the_butter_on_the_plate.bddl"
        file.write_text(file.read_text().replace("(0.02 0.14 0.06 0.18)", "(0.00 0.12 0.04 0.16)"))
        assert environments.evaluation_states()[0].provenance["file"] != evaluation.provenance["file"]


def load_seed_range() -> int:
    """The highest seed of a run."""
    from pi0.ript.config import describe_keys

    (seed,) = (key for key in describe_keys() if key.name == "training.seed")
    return int(seed.high)


@pytest.mark.engine
@pytest.mark.tried(
    "A BDDL file of one's own that LIBERO cannot build", "An error with the file and what LIBERO says"
)
def test_a_file_that_libero_cannot_build_is_named(suite):
    file = suite / "put_the_butter_on_the_plate.bddl"
    file.write_text(file.read_text().replace("butter_1 - butter", "butter_1 - margarine"))
    with (
        environments_of(suite, task_names_to_use=[0]) as environments,
        pytest.raises(
            InputError, match=r"put_the_butter_on_the_plate.bddl: LIBERO cannot build this task .*margarine"
        ),
    ):
        environments.evaluation_states()


@pytest.mark.engine
def test_the_expert_solves_the_example(fresh_cache):
    with environments_of(EXAMPLE) as environments:
        _, summary = record_demonstrations(environments, 3, seed=0, noise=0.1, frame_every=3)
    assert {name: each["successes"] for name, each in summary.items()} == {
        "put_the_butter_on_the_plate": 3,
        "put_the_cream_cheese_in_the_bowl": 3,
    }


@pytest.mark.engine
def test_a_score_says_of_which_files_it_is(suite, tmp_path):
    output = tmp_path / "score"
    evaluate_command(
        ["--policy_path", str(POLICY), "--suite", str(suite), "--episodes", "2", "--max_episode_length", "2",
         "--assets", "standins", "--workers", "1", "--output", str(output)]
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    protocol = results["protocol"]
    assert (results["episodes"], protocol["init_states"]) == (2, DRAWN_EVALUATION_STATES)
    assert protocol["bddl"] == {task.name: task.bddl_hash() for task in find_tasks(str(suite), [])}


@pytest.mark.engine
@pytest.mark.tried(
    "A run on a folder's tasks is resumed after a BDDL file was changed",
    "An error: scores would not be of the same tasks",
)
def test_a_run_is_not_resumed_with_other_files(suite):
    path = suite / "run.yaml"
    path.write_text(f"policy_path: {POLICY}\ntask:\n  benchmark_name: {suite}\n")
    config = load_config(path)
    with environments_of(suite) as environments:
        begun = compare_outside(config, environments, {})
        compare_outside(config, environments, begun)
        file = suite / "put_the_butter_on_the_plate.bddl"
        file.write_text(file.read_text().replace("milk_1 - milk", "milk_1 - orange_juice"))
        with pytest.raises(OutputError, match="BDDL files was"):
            compare_outside(config, environments, begun)
