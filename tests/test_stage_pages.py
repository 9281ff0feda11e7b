"""The stages side by side: list, diffs, explained pages, and what the first page says of its parts."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from itertools import pairwise, permutations
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.libero.init_states import InitStatePool
from pi0.libero.stepping import InitState
from pi0.libero.suites import Task
from pi0.model.config import Pi0Config
from pi0.policy.normalization import NormStats, Stats
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import AlgoConfig, Config, validate
from pi0.ript.learner import Learner
from pi0.ript.replay import Replay
from pi0.ript.rollout_generator import Collection, Group
from pi0.stages.__main__ import main
from pi0.stages.diff import hunks, patch
from pi0.stages.pages import render_pages
from pi0.stages.scripts import Stage, compare, find_stages
from pi0.training.ema import AveragedModule
from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.settings import OptimizerConfig
from tests.support.episodes import CAMERAS, TASK, make_episode

STAGES = find_stages()
PAGES = REPO_ROOT / "docs" / "stages"
LABEL = attrgetter("label")


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pi0.stages", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT), **environment}
    return subprocess.run(command, cwd=REPO_ROOT, env=env, capture_output=True, text=True, check=False)


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the command prints on a real terminal."""
    here, there = os.openpty()
    env = {**{name: text for name, text in os.environ.items() if name != "NO_COLOR"}, **environment}
    command = [sys.executable, "-m", "pi0.stages", *arguments]
    with subprocess.Popen(command, cwd=REPO_ROOT, env=env, stdout=there, stderr=there) as process:
        os.close(there)
        printed = b""
        while True:
            try:
                part = os.read(here, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            printed += part
        os.close(here)
        assert process.wait() == 0
    return printed.decode().replace("\r\n", "\n")


def script(name: str, *lines: str) -> Stage:
    return Stage(Path(f"{name}.py"), "\n".join(lines) + "\n")


# The pages of this repository.


@pytest.mark.parametrize("stage", STAGES, ids=LABEL)
def test_every_stage_has_notes(stage):
    assert (PAGES / "notes" / f"{stage.label}.yaml").is_file()


@pytest.mark.parametrize("name", [*(f"{stage.label}.md" for stage in STAGES), "README.md"])
def test_a_page_is_what_scripts_and_notes_give(name):
    pages, problems = render_pages(REPO_ROOT)
    assert PAGES / name in pages, "\n".join(problems)
    assert (PAGES / name).read_text() == pages[PAGES / name], "run python -m pi0.stages pages"


def test_no_page_or_notes_are_left_of_a_stage_that_is_gone():
    labels = {stage.label for stage in STAGES}
    assert {path.stem for path in PAGES.glob("[0-9]*.md")} <= labels
    assert {path.stem for path in PAGES.glob("notes/*")} <= labels


def test_links_of_a_page_lead_to_files():
    for page in PAGES.glob("*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", prose):
            assert (PAGES / target).exists(), f"{page.name}: {target}"


# The list and the diffs.


@pytest.mark.runs
def test_the_list_names_every_stage_with_what_it_adds():
    listed = run_command(COLUMNS="300")
    assert listed.returncode == 0
    for stage in STAGES:
        (row,) = [row for row in listed.stdout.splitlines() if row.startswith(f"{stage.label}  ")]
        assert f" {stage.path.name} " in row and f" {len(stage.lines)} " in row
        assert row.endswith(stage.capability)
    assert run_command("list", COLUMNS="300").stdout == listed.stdout


def test_lines_that_survive_are_counted():
    before = script(
        "08_train_a", "import os", "", "a = 1", "b = 2", "c = 3", "", "", "print(a)", "print(b)", "print(c)"
    )
    after = script(
        "09_train_b", "import os", "", "a = 1", "b = 3", "c = 3", "d = 4", "", "", "print(a)", "print(c)"
    )
    counts = compare(before, after)
    assert (counts.added, counts.removed, counts.survive) == (2, 2, 0.8)


@pytest.mark.runs
@pytest.mark.parametrize(("before", "after"), list(pairwise(STAGES)), ids=lambda stage: stage.label)
def test_the_listed_share_is_that_of_the_lines_which_the_diff_leaves_alone(before, after):
    signs = Counter(line[0] for line in list(patch(before, after))[2:])
    counts = compare(before, after)
    assert (signs["+"], signs["-"]) == (counts.added, counts.removed)
    row = next(row for row in run_command(COLUMNS="300").stdout.splitlines() if row.startswith(after.label))
    kept = len(before.source.splitlines()) - signs["-"]
    assert f"+{signs['+']} " in row and f" -{signs['-']} " in row
    assert f" {100 * kept / len(before.source.splitlines()):.1f}% " in row


def applied(lines: list[str], diff: list[str]) -> list[str]:
    """`lines` after a unified diff, every line of which must fit."""
    result, at = [], 0
    for line in diff[2:]:
        if header := re.match(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@ \S", line):
            start = int(header[1]) - (header[2] != "0")
            result += lines[at:start]
            at = start
            assert len(result) == int(header[3]) - (header[4] != "0")
            continue
        if line[0] in " -":
            assert lines[at] == line[1:]
            at += 1
        if line[0] in " +":
            result.append(line[1:])
    return result + lines[at:]


@pytest.mark.parametrize("context", [0, 2, 5])
@pytest.mark.parametrize(("first", "second"), list(permutations(STAGES, 2)), ids=LABEL)
def test_a_diff_is_a_patch_that_turns_one_stage_into_the_other(first, second, context):
    assert applied(first.lines, list(patch(first, second, context))) == second.lines


def test_a_diff_reaches_no_further_than_the_ends_of_the_script():
    before, after = script("08_train_a", "a", "b", "c"), script("09_train_b", "a", "B", "c")
    assert list(patch(before, after, 5))[2:] == ["@@ -1,3 +1,3 @@ B", " a", "-b", "+B", " c"]


@pytest.mark.parametrize(("first", "second"), list(permutations(STAGES, 2)), ids=LABEL)
def test_the_hunks_of_a_page_hold_every_changed_line(first, second):
    def changed(lines):
        return Counter(line for line in lines if line[0] in "+-" and line[1:].strip())

    assert changed(line for hunk in hunks(first, second) for line in hunk.lines) == changed(
        list(patch(first, second))[2:]
    )


def test_changes_close_to_each_other_are_one_hunk_unless_an_anchor_begins_another():
    old = script("08_train_a", "def run():", "    a()", "    b()", "    c()", "    d()")
    new = script(
        "09_train_b", "def run():", "    a()", "    one()", "    b()", "    two()", "    c()", "    d()"
    )
    (hunk,) = hunks(old, new)
    assert hunk.changed == ["    one()", "    two()"]
    first, second = hunks(old, new, ["two("])
    assert (first.changed, second.changed) == (["    one()"], ["    two()"])
    assert (first.line, second.line) == (3, 5)
    assert second.lines == [" " + "    b()", "+    two()", "     c()", "     d()"]


def test_every_line_of_the_first_stage_is_in_one_of_its_parts():
    shown = [line for hunk in hunks(None, STAGES[0]) for line in hunk.changed]
    assert [line for line in shown if line.strip()] == [line for line in STAGES[0].lines if line.strip()]


@pytest.mark.runs
def test_diff_of_08_and_09_shows_what_moved_into_the_file():
    lines = run_command("diff", "8", "09").stdout.splitlines()
    assert lines[:2] == ["--- 08_train_with_epochs.py", "+++ 09_train_with_config.py"]
    assert "-class AdvancedTrainingConfig(Config):" in lines
    assert "+def load_config_from_yaml(path: str, overrides: list[str]) -> Config:" in lines
    assert "+def validate_config(config: Config) -> None:" in lines
    assert any(line.startswith("@@ ") and line.endswith(" load_config_from_yaml()") for line in lines)
    assert not any(line[1:].startswith("def update_policy") for line in lines)
    back = run_command("diff", "9", "8").stdout.splitlines()
    assert "+class AdvancedTrainingConfig(Config):" in back
    assert run_command("diff", "8", "8").stdout == ""


@pytest.mark.runs
def test_a_diff_is_coloured_on_a_terminal_only_and_not_against_the_users_will():
    plain = run_command("diff", "8", "9").stdout
    assert "\x1b" not in plain
    shown = on_a_terminal("diff", "8", "9")
    assert "\x1b[32m+import argparse\x1b[0m" in shown
    assert "\x1b[31m-class AdvancedTrainingConfig(Config):\x1b[0m" in shown
    assert re.sub(r"\x1b\[\d+m", "", shown) == plain
    assert on_a_terminal("diff", "8", "9", NO_COLOR="1") == plain


def test_a_definition_put_between_others_is_shown_whole_and_under_its_own_name():
    old = [
        "import os",
        "",
        "",
        "@cache",
        "def a():",
        "    return 1",
        "",
        "",
        "@cache",
        "def z():",
        "    return 1",
    ]
    new = [
        *old[:8],
        "@cache",
        "def b():",
        "    return 2",
        "",
        "",
        "@cache",
        "def c():",
        "    return 1",
        "",
        "",
        *old[8:],
    ]
    found = hunks(script("08_train_a", *old), script("09_train_b", *new))
    assert [(hunk.scope, hunk.line, hunk.lines) for hunk in found] == [
        ("b()", 9, ["+@cache", "+def b():", "+    return 2"]),
        ("c()", 14, ["+@cache", "+def c():", "+    return 1"]),
    ]


@pytest.mark.runs
def test_an_unknown_stage_is_answered_with_those_there_are():
    for wrong in ("7", "99", "nine"):
        done = run_command("diff", "8", wrong)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"there is no stage '{wrong}'" in done.stderr
        assert all(f"{stage.label}  {stage.capability}" in done.stderr for stage in STAGES)


def test_a_script_that_does_not_say_what_it_adds_is_named(tmp_path):
    (tmp_path / "08_train_x.py").write_text('"""Trains."""\n')
    with pytest.raises(InputError, match=r'08_train_x.py: begin its docstring with "Stage 08: "'):
        main([], tmp_path)
    (tmp_path / "08_train_x.py").write_text("def:\n")
    with pytest.raises(InputError, match=r"08_train_x.py:1: not valid Python"):
        main([], tmp_path)
    (tmp_path / "08_train_x.py").unlink()
    with pytest.raises(InputError, match="no stage scripts"):
        main([], tmp_path)


@pytest.mark.runs
def test_help_shows_examples_and_how_notes_are_written():
    assert "python -m pi0.stages diff 8 9" in run_command("--help").stdout
    assert "--context 6" in run_command("diff", "--help").stdout
    assert "anchors: [" in run_command("pages", "--help").stdout


# Pages of a copy, whose notes and scripts go wrong.


@pytest.fixture
def copy(tmp_path, capsys):
    """Stages 08 and 09 in a folder of their own, with notes, pages and the tests that they name."""
    for stage in STAGES[:2]:
        shutil.copy(stage.path, tmp_path)
        (tmp_path / "docs/stages/notes").mkdir(parents=True, exist_ok=True)
        shutil.copy(PAGES / "notes" / f"{stage.label}.yaml", tmp_path / "docs/stages/notes")
    (tmp_path / "tests").mkdir()
    for path in (REPO_ROOT / "tests").glob("test_*.py"):
        shutil.copy(path, tmp_path / "tests")
    assert main(["pages"], tmp_path) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def problems(copy, capsys):
    """What is said about the copy after the notes of stage 09 were changed."""

    def of(change) -> list[str]:
        path = copy / "docs/stages/notes/09.yaml"
        notes = yaml.safe_load(path.read_text())
        change(notes)
        path.write_text(yaml.safe_dump(notes))
        before = (copy / "docs/stages/09.md").read_text()
        assert main(["pages"], copy) == 1
        assert (copy / "docs/stages/09.md").read_text() == before
        prefix = "error: docs/stages/notes/09.yaml: "
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith(prefix) for line in lines)
        return [line.removeprefix(prefix) for line in lines]

    return of


def note_on(notes: dict, title: str) -> dict:
    return next(note for note in notes["notes"] if note["title"] == title)


def test_check_passes_until_a_page_is_touched_and_again_when_it_was_written(copy, capsys):
    assert main(["pages", "--check"], copy) == 0
    page = copy / "docs/stages/09.md"
    page.write_text(page.read_text() + "by hand\n")
    capsys.readouterr()
    assert main(["pages", "--check"], copy) == 1
    assert "docs/stages/09.md: does not match its sources" in capsys.readouterr().err
    assert page.read_text().endswith("by hand\n")
    assert main(["pages"], copy) == 0
    assert main(["pages", "--check"], copy) == 0


def test_check_names_the_pages_that_a_changed_script_leaves_behind(copy, capsys):
    path = copy / STAGES[1].path.name
    path.write_text(path.read_text().replace("configuration validated", "configuration checked"))
    assert main(["pages", "--check"], copy) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: docs/stages/09.md: ")


def test_a_page_of_a_stage_that_is_gone_is_named(copy, capsys):
    (copy / "docs/stages/07.md").touch()
    (copy / "docs/stages/notes/07.yaml").touch()
    assert main(["pages", "--check"], copy) == 1
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()] == [
        "docs/stages/07.md",
        "docs/stages/notes/07.yaml",
    ]


def test_a_stage_without_notes_is_named_and_the_others_get_their_pages(copy, capsys):
    (copy / "docs/stages/notes/08.yaml").unlink()
    (copy / "docs/stages/09.md").unlink()
    assert main(["pages"], copy) == 1
    assert "docs/stages/notes/08.yaml: no such file" in capsys.readouterr().err
    assert (copy / "docs/stages/09.md").is_file()


def test_a_note_whose_anchor_is_gone_is_reported(problems):
    def change(notes):
        note_on(notes, "The command line")["anchors"].append("def parse_everything()")

    (problem,) = problems(change)
    assert problem.startswith(
        'note "The command line": the anchor "def parse_everything()" is in no line that 09_'
    )


def test_an_anchor_in_unchanged_lines_fits_nothing(problems):
    def change(notes):
        note_on(notes, "The command line")["anchors"].append("def set_seed(seed: int)")

    (problem,) = problems(change)
    assert '"def set_seed(seed: int)" is in no line' in problem


def test_an_anchor_in_several_hunks_is_reported_with_their_places(problems):
    def change(notes):
        note_on(notes, "The command line")["anchors"] = ["config"]

    several, uncovered = problems(change)
    assert re.search(r'anchor "config" is in \d hunks \(09_train_with_config.py:\d+, docstring; ', several)
    assert "no note covers the hunk at 09_train_with_config.py:" in uncovered


def test_a_hunk_without_a_note_is_reported_with_an_anchor_for_one(problems):
    def change(notes):
        notes["notes"].remove(note_on(notes, "The command line"))

    (problem,) = problems(change)
    assert re.match(r"no note covers the hunk at 09_train_with_config.py:\d+, parse_arguments\(\); ", problem)
    assert problem.endswith('with the anchor "def parse_arguments() -> argparse.Namespace:"')


def test_a_hunk_with_two_notes_is_reported(problems):
    def change(notes):
        note_on(notes, "Read, check, train")["anchors"].append("def validate_config(config: Config)")

    (problem,) = problems(change)
    assert problem.endswith(
        'is covered by "Mistakes are found before anything starts" and "Read, check, train"; keep one of them'
    )


@pytest.mark.parametrize(
    ("test", "complaint"),
    [
        (
            "tests/test_stages.py::test_help_lists_every_kay",
            "no such test; the nearest one is test_help_lists_every_key",
        ),
        ("tests/test_nothing.py::test_help_lists_every_key", "there is no such test file"),
        ("pi0/stages/__main__.py::main", "there is no such test file"),
        ("tests/test_stages.py", "there is no such test"),
        ("tests/test_stages.py::run_script", "there is no such test"),
    ],
)
def test_a_test_that_does_not_exist_is_reported(problems, test, complaint):
    def change(notes):
        note_on(notes, "The command line")["tests"] = [test]

    (problem,) = problems(change)
    assert problem.startswith(f'note "The command line": {test}: ') and complaint in problem


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"test": "x"}, '"test": unknown key; the nearest one is tests'),
        ({"why": ""}, "why is missing; write it, or `minor: true` for a tiny change"),
        ({"tests": []}, "tests is missing; write it, or `minor: true` for a tiny change"),
        ({"tests": "tests/x.py"}, 'tests = "tests/x.py": expected list of str, got str'),
        ({"why": 3}, "why = 3: expected str, got int"),
        ({"minor": "yes"}, 'minor = "yes": expected bool, got str'),
        ({"anchors": []}, "anchors is missing"),
    ],
)
def test_a_note_that_is_written_wrong_is_named_with_the_key(problems, change, complaint):
    (problem,) = problems(lambda notes: note_on(notes, "The command line").update(change))
    assert problem == f"note 3 (The command line): {complaint}"


def test_all_that_is_wrong_is_said_at_once(problems):
    def change(notes):
        notes["adds"] = 3
        notes["remark"] = "x"
        notes["notes"].append("a note")
        del note_on(notes, "The command line")["without"]

    assert problems(change) == [
        '"remark": unknown key; the nearest one is adds',
        "adds = 3: expected str",
        "note 3 (The command line): without is missing; write it, or `minor: true` for a tiny change",
        'note 6: "a note": expected the keys title, anchors, why, without, tests',
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("adds: [", "not valid YAML"),
        ("adds: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- a", "expected the keys adds and notes"),
        ("", "expected the keys adds and notes"),
    ],
)
def test_notes_that_are_no_notes_are_one_clear_error(copy, capsys, text, complaint):
    (copy / "docs/stages/notes/09.yaml").write_text(text)
    assert main(["pages"], copy) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: docs/stages/notes/09.yaml: {complaint}")


# What the first stage's page says of its parts.


@pytest.fixture(scope="module")
def stage_08():
    spec = importlib.util.spec_from_file_location("stage_08", STAGES[0].path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny():
    """An untrained policy of the tiny size."""
    ones = np.ones(8, np.float32)
    stats = [Stats(mean=0 * ones[:n], std=ones[:n], q01=-ones[:n], q99=ones[:n]) for n in (8, 7)]
    torch.manual_seed(0)
    return PI0Policy(Pi0Config.preset("pi0_tiny"), NormStats(state=stats[0], actions=stats[1]))


def pool(task: Task, size: int) -> InitStatePool:
    return InitStatePool(task, "training", [InitState(np.zeros(1), np.zeros((0, 7)))] * size, {})


def collected(*outcomes: tuple[int, bool]) -> Collection:
    """A group of rollouts: (initial state, success) each."""
    episodes = [make_episode(success, [10], 0, index=index) for index, success in outcomes]
    return Collection(groups=[Group(episodes, [0.0] * len(episodes))], tried=episodes)


def test_the_settings_of_the_first_stage_are_valid(stage_08):
    settings = stage_08.AdvancedTrainingConfig()
    validate(Config(**{entry.name: getattr(settings, entry.name) for entry in fields(Config)}))
    assert (REPO_ROOT / settings.policy_path).is_dir()


@pytest.mark.parametrize(
    ("rates", "turns"), [((0.4, 0.9), (60, 10)), ((0.0, 1.0), (100, 10)), ((0.5, 0.5), (7, 7))]
)
def test_tasks_take_turns_in_proportion_to_how_often_they_fail(stage_08, rates, turns):
    tasks = [TASK, Task("libero_spatial", 8, "other", "other", "", "")]
    dataset = stage_08.InitialStateDataset([pool(task, 20) for task in tasks], group_size=2)
    dataset.turns.success_rate = list(rates)
    drawn = Counter(dataset.smart_sample_group()[0][0].task.index for _ in range(sum(turns)))
    assert (drawn[3], drawn[8]) == pytest.approx(turns, abs=1)


def test_a_state_that_keeps_succeeding_is_skipped_for_one_round(stage_08):
    dataset = stage_08.InitialStateDataset([pool(TASK, 4)], group_size=4)

    def next_group():
        return [index for _, index in dataset.smart_sample_group()]

    assert next_group() == [0, 1, 2, 3]
    dataset.record(collected((0, True), (1, True), (2, False), (3, False)))
    assert dataset.turns.success_rate == [0.5]
    assert next_group() == [0, 1, 2, 3]
    dataset.record(collected((0, True), (1, False), (2, True), (3, False)))
    # State 0 was solved twice running: skipped once, then back in the ring.
    assert next_group() == [1, 2, 3, 0]
    assert dataset.take_skipped() == 1


def test_a_seed_decides_all_three_global_random_streams(stage_08):
    def drawn(seed):
        stage_08.set_seed(seed)
        return random.random(), np.random.random(), torch.rand(()).item()

    try:
        first, other, again = drawn(3), drawn(4), drawn(3)
        assert first == again
        assert all(a != b for a, b in zip(first, other, strict=True))
        assert torch.tensor([1e-40]).mul(1.0).item() == 0.0  # a denormal number
    finally:
        torch.set_flush_denormal(False)


def test_a_plain_checkpoint_is_made_ready_for_guidance(stage_08):
    checkpoint = str(REPO_ROOT / stage_08.AdvancedTrainingConfig().policy_path)
    for mode in ("weighted", "guidance"):
        policy = stage_08.load_policy(
            Config(policy_path=checkpoint, device="cpu", algo=AlgoConfig(mode=mode))
        )
        assert policy.config.guidance == (mode == "guidance")
        PI0_CFG_Adapter(policy, mode=mode)


def update(module, policy: PI0Policy, algo: AlgoConfig, weights: float = 1.0) -> tuple[dict, PI0Policy]:
    """Learn from two episodes, seven chunks in all; returns metrics and the averaged policy."""
    adapter = PI0_CFG_Adapter(policy, noise_samples=1)
    batch = adapter.weigh([make_episode(True, [10] * 4, 0), make_episode(True, [10] * 3, 1)], [0.5, 1.0])
    batch.weights *= weights
    optimizer = make_optimizer(policy, algo.lr, OptimizerConfig(type="sgd", beta1=0.0))
    average = AveragedModule(policy, policy.copy().eval(), 0.5)
    learner = Learner(
        adapter,
        optimizer,
        make_schedule(optimizer, 1.0, 1),
        average,
        Replay(1, WeightedChunks.empty(CAMERAS, 64, policy.config.action_horizon)),
        torch.Generator().manual_seed(0),
    )
    return module.update_policy(Config(policy_path="none", algo=algo), learner, batch), average.module


def test_every_epoch_counts_and_so_does_an_incomplete_last_step(stage_08, tiny):
    before = [parameter.detach().clone() for parameter in tiny.parameters()]
    algo = AlgoConfig(num_epochs=2, minibatch_size=3, gradient_accumulation_steps=4)
    metrics, average = update(stage_08, tiny, algo)
    # Seven chunks are three minibatches; two epochs of them are six, in steps of four and two.
    assert metrics["updates"] == 2
    for moved in (tiny, average):
        assert any(not torch.equal(a, b) for a, b in zip(before, moved.parameters(), strict=True))


def test_an_accumulated_step_follows_the_mean_gradient_of_its_minibatches(stage_08, tiny):
    adapter = PI0_CFG_Adapter(tiny, noise_samples=1)
    batch = adapter.weigh([make_episode(True, [10] * 4, 0), make_episode(True, [10] * 3, 1)], [0.5, 1.0])
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in tiny.parameters() if parameter.requires_grad]
    tiny.train()
    gradients = [
        torch.autograd.grad(adapter.minibatch_loss(part, generator), trained, materialize_grads=True)
        for part in adapter.minibatches(batch, 3, generator)
    ]
    mean = torch.cat([sum(each).flatten().double() / 3 for each in zip(*gradients, strict=True)])
    metrics, _ = update(
        stage_08, tiny, AlgoConfig(num_epochs=1, minibatch_size=3, gradient_accumulation_steps=3)
    )
    assert metrics["updates"] == 1
    assert metrics["grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-5)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(stage_08, tiny):
    before = [parameter.detach().clone() for parameter in tiny.parameters()]
    with pytest.raises(FloatingPointError, match=r"lower algo\.lr"):
        update(stage_08, tiny, AlgoConfig(minibatch_size=7), weights=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters(), strict=True))
