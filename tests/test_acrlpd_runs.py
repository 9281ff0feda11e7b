"""Whole runs of `pi0.acrlpd` on LIBERO: they end with their results, and resumed ones give the same bits."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pi0 import PI0Policy
from pi0.acrlpd import trainer as trainer_module
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.config import ConfigError, cli, get_config, list_configs, load_rl_config
from pi0.acrlpd.train import main, unified_training_interface
from pi0.base.errors import InputError, OutputError
from pi0.base.paths import REPO_ROOT
from pi0.evaluate import main as evaluate_command
from pi0.libero import outside
from pi0.policy.critics import load_critic

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("signals_as_before")]


def weights(run_dir: Path, step: int = 3) -> dict[str, np.ndarray]:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    return {
        f"{name}/{key}": tensor.reshape(-1).view(torch.uint8).numpy()  # its bytes, of whatever type
        for name in (
            "pi0_params",
            "pi0_ema_params",
            "critic_params",
            "critic_ema_params",
            "target_critic_params",
        )
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def debug(folder: Path, *overrides: str):
    quick = (f"output_dir={folder}", "features.save_video=false")
    return get_config("acrlpd_debug", [*quick, *overrides])


def test_a_run_leaves_policy_critic_results_and_report(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    drawn, refresh = [], ObservationCaches.refresh
    monkeypatch.setattr(
        ObservationCaches, "refresh", lambda caches, *of: (drawn.append(len(of[0])), refresh(caches, *of))
    )
    scored, evaluate = [], trainer_module.evaluate
    monkeypatch.setattr(
        trainer_module,
        "evaluate",
        lambda *of, label, **how: (scored.append(label), evaluate(*of, label=label, **how))[1],
    )
    run = unified_training_interface(debug(tmp_path, "features.save_video=true", "training.score_parts=true"))
    assert {"values.mp4", "before_after.mp4"} <= {path.name for path in run.iterdir()}
    results = json.loads((run / "results.json").read_text())
    ways = ("one sample", "best of 2")
    rows_of_parts = [f"{part}, {way}" for part in ("critics", "offline", "after") for way in ways]
    assert [row[0] for row in results["table"]] == ["", "before", *rows_of_parts]
    assert scored == [
        "score before",
        *(
            f"score {part}"
            for part in (
                "of critics, best of 2",
                "of offline, one sample",
                "of offline, best of 2",
                "after, one sample",
                "after, best of 2",
            )
        ),
    ]  # until the actor learns, one sample has the score from before
    assert results["scores"]["critics, one sample"] == results["before"]
    minutes = list(results["minutes"].values())
    assert minutes == sorted(minutes) and 0 < minutes[0] < minutes[2] < minutes[4]
    assert results["after"]["episodes"] == 2
    found = rows(run)
    assert [row["step"] for row in found] == [0, 1, 2]
    assert [row.get("rollouts") for row in found] == [None, None, 2]
    assert [row["episodes"] for row in found] == [4, 4, 6]
    assert [row["actor_updates"] for row in found] == [0, 3, 3], (
        "in the first iteration only the critics learn"
    )
    assert all(trainer_module.METRICS.undeclared(row) == [] for row in found)
    assert (run / "report.html").stat().st_size > 10_000
    PI0Policy.from_pretrained(run / "policy")
    load_critic(run / "critic")
    evaluate_command(
        [
            "--policy_path",
            str(run / "policy"),
            "--critic_path",
            str(run / "critic"),
            "--samples",
            "2",
            "--tasks",
            "3",
        ]
        + [
            "--episodes",
            "1",
            "--max_episode_length",
            "20",
            "--output",
            str(tmp_path / "score"),
            "--assets",
            "standins",
        ]
    )
    score = json.loads((tmp_path / "score/results.json").read_text())
    assert (score["episodes"], score["protocol"]["samples"]) == (1, 2)
    assert drawn == [24, 36], "the actor has not moved before step 1, so its candidates are kept"
    moved = weights(run), weights(run, 2)
    assert not all(np.array_equal(moved[0][name], moved[1][name]) for name in moved[0])


@pytest.mark.tried(
    "a stop (SIGTERM) in the middle of ACRLPD's updates", "`--resume` gives the same numbers to the bit"
)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(
            ("acrlpd.divergence=0.5", "acrlpd.use_ema=false", "training.optimizer.final_lr_share=0.1"),
            marks=pytest.mark.soak,
        ),
        pytest.param(("dtype=bfloat16", "acrlpd.features=own"), marks=pytest.mark.soak),
    ],
)
def test_a_resumed_run_gives_the_same_bits(tmp_path, monkeypatch, overrides):
    torch.set_num_threads(1)
    whole = unified_training_interface(debug(tmp_path / "whole", *overrides))
    step = trainer_module.ACRLPDTrainer.train_step_wrapper

    def stopped(trainer, actor):
        if trainer.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, actor)

    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", stopped)
    run = unified_training_interface(debug(tmp_path / "part", *overrides))
    assert not (run / "results.json").exists()
    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", step)
    resumed = unified_training_interface(debug(tmp_path / "part", *overrides), str(run))
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []
    keys = ("step", "tasks", "critic_loss", "actor_loss", "windows", "lr", "temperature")
    assert [[row.get(key) for key in keys] for row in rows(whole)] == [
        [row.get(key) for key in keys] for row in rows(resumed)
    ]


@pytest.mark.tried(
    "a stop (SIGTERM) while ACRLPD records",
    "`--resume` records only what no checkpoint holds, and gives the same numbers to the bit; with another simulator it refuses",
)
def test_a_recording_that_is_stopped_goes_on(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    short = ("training.num_train_steps=1", "training.critic_updates=2")
    whole = unified_training_interface(debug(tmp_path / "whole", *short))
    practise, recorded = trainer_module.practise, []

    def stopped(*given):
        recorded.append(len(given[2]))
        if len(recorded) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return practise(*given)

    monkeypatch.setattr(trainer_module, "PORTION", 3)
    monkeypatch.setattr(trainer_module, "practise", stopped)
    run = unified_training_interface(debug(tmp_path / "part", *short))
    assert not (run / "metrics.jsonl").exists() or not rows(run)
    with monkeypatch.context() as patch:
        patch.setattr(outside, "version", lambda name: "0")
        with pytest.raises(OutputError, match="mujoco was .* and is 0"):
            unified_training_interface(debug(tmp_path / "part", *short), str(run))
    resumed = unified_training_interface(debug(tmp_path / "part", *short), str(run))
    assert recorded == [3, 1, 1]
    first, second = weights(whole, 1), weights(resumed, 1)
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


@pytest.mark.tried(
    "critics whose values diverge",
    "the run returns to its last checkpoint, and says so; three times, then it ends",
)
def test_values_that_diverge_lead_back_to_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    step = trainer_module.ACRLPDTrainer.train_step_wrapper
    spoilt = []

    def spoil(trainer, actor):
        if trainer.state.step == 1 and not spoilt:
            spoilt.append(True)
            with torch.no_grad():
                trainer.agent.critic_networks.value.bias += 100.0
        return step(trainer, actor)

    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", spoil)
    run = unified_training_interface(debug(tmp_path / "once"))
    assert "the critics diverge: their mean value is 1" in capsys.readouterr().out
    assert [row["rollbacks"] for row in rows(run)] == [0, 1, 1]
    assert all(abs(row["value"]) < 2 for row in rows(run))

    def always(trainer, actor):
        spoilt.clear()
        return spoil(trainer, actor)

    monkeypatch.setattr(trainer_module.ACRLPDTrainer, "train_step_wrapper", always)
    with pytest.raises(InputError, match="step 1: the critics diverge"):
        unified_training_interface(debug(tmp_path / "always"))


@pytest.mark.runs
@pytest.mark.parametrize(
    ("target", "arguments"),
    [("quickstart-critic", ""), ("resume-critic", " --resume")],
)
def test_make_starts_the_quickstart(target, arguments):
    said = subprocess.run(
        ["make", "-n", target], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"-m pi0.acrlpd.train --config acrlpd_quickstart{arguments}" in said


def test_presets_are_listed_and_a_misspelt_one_is_named(capsys):
    main(["--list"])
    assert capsys.readouterr().out.split() == list_configs()
    with pytest.raises(ConfigError, match="did you mean acrlpd_debug"):
        get_config("acrlpd_debgu")


def test_a_script_of_ones_own_has_the_options_of_a_configuration(monkeypatch, capsys):
    words = ["--override", "acrlpd.critics=4", "exp_name=own"]
    expected = get_config("acrlpd_debug", words[1:])
    assert cli(["--config", "acrlpd_debug", *words]) == expected
    assert cli(["--config_path", "configs/acrlpd_debug.yaml", *words]) == expected
    monkeypatch.setattr("sys.argv", ["own.py", "--config", "acrlpd_debug", *words])
    assert cli() == expected
    with pytest.raises(ConfigError, match="did you mean acrlpd_debug"):
        cli(["--config", "acrlpd_debgu"])
    for wrong in ([], ["--config", "acrlpd_debug", "--config_path", "configs/acrlpd_debug.yaml"]):
        with pytest.raises(SystemExit):
            cli(wrong)
    assert "one of the arguments --config --config_path is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("qchunking.horizon_length=5", "task.replan_steps = 10 must be equal"),
        ("data.rollouts=0", "data.rollouts = 0"),
        ("acrlpd.num_action_samples=0", "acrlpd.num_action_samples = 0"),
        ("acrlpd.discount=1.5", "acrlpd.discount = 1.5"),
        ("acrlpd.chunk_length=5", "chunk_length is qchunking.horizon_length here"),
        ("acrlpd.critics=1", "acrlpd.critics = 1"),
    ],
)
def test_values_that_cannot_be_are_named(override, said):
    with pytest.raises(ConfigError, match=said):
        load_rl_config("configs/acrlpd_debug.yaml", [override])


def test_the_page_describes_every_metric():
    text = (REPO_ROOT / "docs" / "acrlpd.md").read_text(encoding="utf-8")
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert rows == [(each.name, each.unit or "–", each.meaning) for each in trainer_module.METRICS.metrics]
