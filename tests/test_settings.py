"""The task section: what commands make of their options, and what they refuse as the YAML schema does."""

import argparse
import re

import pytest

from pi0 import evaluate, norm_stats, warmstart
from pi0.libero.settings import ScoreConfig, TaskConfig, range_of, task_conflicts, task_of_command

EVALUATE = ["--policy_path", "a"]
OUTPUT = ["--output", "a"]


def test_options_of_a_command_become_the_task_section():
    options = evaluate.parse_arguments(
        [
            *EVALUATE, "--suite", "libero_goal", "--tasks", "1", "turn_on_the_stove", "--assets", "standins",
            "--fixtures", "pinned", "--render", "exact", "--image_size", "48", "--max_episode_length", "77",
            "--settle_steps", "2", "--workers", "3",
        ]
    )  # fmt: skip
    assert task_of_command(options, replan_steps=4) == TaskConfig(
        benchmark_name="libero_goal", task_names_to_use=["1", "turn_on_the_stove"], assets="standins",
        fixtures="pinned", render="exact", image_size=48, max_episode_length=77, settle_steps=2,
        num_parallel_envs=3, replan_steps=4,
    )  # fmt: skip


def test_what_a_command_has_no_option_for_is_as_in_the_section():
    for options in (
        evaluate.parse_arguments([*EVALUATE, "--tasks", "3", "--assets", "standins"]),
        warmstart.parse_arguments([*OUTPUT, "--tasks", "3"]),
        norm_stats.parse_arguments([*OUTPUT, "--tasks", "3"]),
    ):
        expected = TaskConfig(task_names_to_use=["3"], assets="standins")
        assert task_of_command(options, replan_steps=10) == expected


def test_what_the_command_decides_wins_over_its_options():
    options = argparse.Namespace(image_size=48, workers=None)
    assert task_of_command(options, image_size=64) == TaskConfig(image_size=64)


@pytest.mark.parametrize(
    ("parse", "arguments", "option", "refused"),
    [
        (evaluate.parse_arguments, EVALUATE, "--episodes", "0: must be 1 or more"),
        (evaluate.parse_arguments, EVALUATE, "--seed", "-1: must be 0 or more"),
        (evaluate.parse_arguments, EVALUATE, "--image_size", "0: must be 16 or more"),
        (evaluate.parse_arguments, EVALUATE, "--replan_steps", "0: must be 1 or more"),
        (evaluate.parse_arguments, EVALUATE, "--max_episode_length", "0: must be 1 or more"),
        (evaluate.parse_arguments, EVALUATE, "--settle_steps", "-5: must be 0 or more"),
        (evaluate.parse_arguments, EVALUATE, "--workers", "-1: must be 1 or more"),
        (warmstart.parse_arguments, OUTPUT, "--image-size", "8: must be 16 or more"),
        (warmstart.parse_arguments, OUTPUT, "--workers", "0: must be 1 or more"),
        (norm_stats.parse_arguments, OUTPUT, "--workers", "0: must be 1 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_options_name(capsys, parse, arguments, option, refused):
    with pytest.raises(SystemExit) as ended:
        parse([*arguments, option, refused.partition(":")[0]])
    assert ended.value.code == 2
    assert re.search(
        rf"^python -m pi0\.\w+: error: argument {option}: {refused}$", capsys.readouterr().err, re.MULTILINE
    )


def test_a_number_in_range_is_taken_and_a_word_is_no_number(capsys):
    assert range_of(TaskConfig, "settle_steps")("0") == 0
    assert range_of(ScoreConfig, "seed")(str(2**31 - 1)) == 2**31 - 1
    with pytest.raises(SystemExit):
        evaluate.parse_arguments([*EVALUATE, "--workers", "all"])
    assert "argument --workers: invalid int value: 'all'" in capsys.readouterr().err


def test_keys_that_contradict_each_other_are_named_with_their_values():
    assert task_conflicts(TaskConfig()) == []
    named, small = task_conflicts(TaskConfig(task_name=3, task_names_to_use=[4], max_open_tasks=2))
    assert "task.task_name = 3 and task.task_names_to_use = [4] are both given" in named
    assert "task.max_open_tasks = 2 is less than task.rollouts_per_env = 4" in small
