"""Command lines: what is typed is not lost."""

import argparse
import ast
import importlib.util
import sys

import pytest

from pi0 import evaluate, norm_stats, warmstart
from pi0.base.arguments import Collect, ranged
from pi0.base.paths import REPO_ROOT
from pi0.libero.suites import RepeatedTaskError, UnknownTaskError, find_tasks, suite_tasks
from pi0.ript.config import ConfigError, load_config

TASK_3 = suite_tasks("libero_spatial")[3].name
SCRIPTS = sorted(REPO_ROOT.glob("[01]*_train_*.py"))
SOURCES = [
    *SCRIPTS,
    *(path for folder in ("pi0", "benchmarks", "tools") for path in (REPO_ROOT / folder).rglob("*.py")),
]


def options_with_several_values() -> list[tuple[str, dict[str, ast.expr]]]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(keywords.get("nargs", ast.Constant(None))) in ("'+'", "'*'"):
                found.append((f"{path.relative_to(REPO_ROOT)} {ast.unparse(node.args[0])}", keywords))
    return found


def test_every_option_with_several_values_may_be_given_several_times():
    options = options_with_several_values()
    assert len(options) > 20
    assert [name for name, keywords in options if "--" in name and "action" not in keywords] == []


@pytest.mark.parametrize("default", [None, [], ["3", "8"]])
@pytest.mark.tried("`--override a=1 --override b=2`, `--tasks 3 --tasks 8`", "All values count")
def test_values_of_an_option_that_is_repeated_all_count(default):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", action=Collect, nargs="*", default=default)
    assert parser.parse_args([]).tasks == default
    assert parser.parse_args(["--tasks", "1", "--tasks", "2", "4", "--tasks"]).tasks == ["1", "2", "4"]
    assert parser.parse_args(["--tasks"]).tasks == []
    assert parser.parse_args([]).tasks == default, "the default is as before"


@pytest.mark.parametrize(
    "command, before",
    [
        (evaluate, ["--policy_path", "x"]),
        (warmstart, ["--output", "x"]),
        (norm_stats, ["--output", "x"]),
    ],
)
def test_commands_take_all_tasks(command, before):
    assert command.parse_arguments([*before, "--tasks", "1", "--tasks", "2"]).tasks == ["1", "2"]


@pytest.mark.parametrize("path", SCRIPTS[1:], ids=lambda path: path.name[:2])
def test_stages_take_all_overrides(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"stage_{path.name[:2]}", path)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    typed = "--config_path x --override algo.lr=1e-3 --override training.seed=3 algo.num_epochs=1"
    monkeypatch.setattr(sys, "argv", [path.name, *typed.split()])
    assert stage.parse_arguments().override == ["algo.lr=1e-3", "training.seed=3", "algo.num_epochs=1"]


def test_a_name_of_a_run_that_is_a_path_is_refused():
    with pytest.raises(ConfigError, match='exp_name = "team/exp" names the run.s folder in output_dir'):
        load_config(REPO_ROOT / "configs/minimal_test.yaml", ["exp_name=team/exp"])


def test_a_number_out_of_its_range_is_refused_with_the_range(capsys):
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--batch", type=ranged(int, low=1))
    parser.add_argument("--lr", type=ranged(float, above=0, high=1))
    assert vars(parser.parse_args(["--batch", "1", "--lr", "1"])) == {"batch": 1, "lr": 1.0}
    for given, said in {
        "--batch 0": "argument --batch: 0: must be 1 or more",
        "--batch 1.5": "argument --batch: invalid int value: '1.5'",
        "--lr 0": "argument --lr: 0: must be above 0",
        "--lr 2": "argument --lr: 2: must be 1 or less",
        "--lr nan": "argument --lr: nan: expected a finite number",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(given.split())
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_no_number_of_a_command_line_is_without_a_range():
    plain = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if keywords.get("type") in ("int", "float") and "choices" not in keywords:
                    plain.append(f"{path.relative_to(REPO_ROOT)} {ast.unparse(node.args[0])}")
    assert plain == []


@pytest.mark.parametrize(
    "command, before, given",
    [
        (evaluate, ["--policy_path", "x"], "--episodes 0"),
        (evaluate, ["--policy_path", "x"], "--workers -1"),
        (evaluate, ["--policy_path", "x"], "--seed -1"),
        (evaluate, ["--policy_path", "x"], "--max_episode_length 0"),
        (evaluate, ["--policy_path", "x"], "--replan_steps 0"),
        (evaluate, ["--policy_path", "x"], "--settle_steps -5"),
        (evaluate, ["--policy_path", "x"], "--image_size 1000000"),
        (evaluate, ["--policy_path", "x"], "--videos -1"),
        (warmstart, ["--output", "x"], "--score-episodes 0"),
        (warmstart, ["--output", "x"], "--batch-size -64"),
        (warmstart, ["--output", "x"], "--max-updates 0"),
        (warmstart, ["--output", "x"], "--seed -1"),
        (norm_stats, ["--output", "x"], "--frame-every 0"),
    ],
)
@pytest.mark.tried(
    "`--episodes 0`, `--workers -1`, `--settle_steps -5` and the like", "An error with the range"
)
def test_commands_refuse_numbers_that_make_no_sense(command, before, given, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse_arguments([*before, *given.split()])
    assert ended.value.code == 2
    option, number = given.split()
    assert f"argument {option}: {number}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[3, 8, 3], [3, TASK_3], ["3", 3], [TASK_3, TASK_3]])
@pytest.mark.tried("A task is named twice", "An error: its episodes would count twice")
def test_a_task_that_is_named_twice_is_refused(names):
    with pytest.raises(
        RepeatedTaskError, match=f"task 3 of libero_spatial .{TASK_3}. is named twice.*name it once"
    ):
        find_tasks("libero_spatial", names)


def test_a_task_below_0_is_refused():
    with pytest.raises(UnknownTaskError, match="libero_spatial has tasks 0 to 9, not -1"):
        find_tasks("libero_spatial", [-1])
