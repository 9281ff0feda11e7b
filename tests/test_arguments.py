"""Command lines: what is typed is not lost."""

import argparse
import ast
import importlib.util
import sys

import pytest

from pi0 import evaluate, norm_stats, warmstart
from pi0.base.arguments import Collect
from pi0.base.paths import REPO_ROOT
from pi0.ript.config import ConfigError, load_config

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
