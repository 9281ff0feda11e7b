"""Stage 13's iteration on collections made up for it: what is learned, what goes wrong, what is resumed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi0.base.errors import InputError
from pi0.ript.cfg_adapter import OutOfMemory
from pi0.training import checkpoint_store
from pi0.training.interrupts import Interrupted
from tests.support.iteration import Practice
from tests.support.ranks import torchrun


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run of four iterations comes to that nothing disturbs."""
    practice = Practice(tmp_path_factory.mktemp("straight"))
    practice.iterate(4)
    return practice.outcome()


def spoil_gradients(practice: Practice, monkeypatch, count: int) -> None:
    """The next `count` gradients are no numbers."""
    left = [count]
    accumulate = practice.learner.adapter.accumulate_gradient

    def accumulate_spoilt(*arguments, **options) -> float:
        loss = accumulate(*arguments, **options)
        if left[0] > 0:
            left[0] -= 1
            next(p.grad for p in practice.learner.policy.parameters() if p.grad is not None).fill_(torch.nan)
        return loss

    monkeypatch.setattr(practice.learner.adapter, "accumulate_gradient", accumulate_spoilt)


def steps_saved(practice: Practice) -> list[int]:
    return sorted(int(path.name[-6:]) for path in practice.safe.store.folder.glob("step-*"))


def test_an_iteration_learns_from_its_collection_and_says_what_it_did(straight):
    rows = straight["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["updates"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert all((row["bad_updates"], row["rollbacks"], row["passes"]) == (0, 0, 1) for row in rows)
    assert all((row["successes"], row["rollouts"]) == (2, 4) for row in rows)
    assert straight["weights"] != straight["averaged"]


def test_the_same_seed_learns_the_same(straight, tmp_path):
    again = Practice(tmp_path)
    again.iterate(4)
    assert again.outcome() == straight


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_resumed_run_learns_what_one_learns_that_was_not_stopped(straight, tmp_path, done):
    Practice(tmp_path).iterate(done)
    resumed = Practice(tmp_path, resume=True)
    assert resumed.state.step == done
    resumed.iterate(4)
    assert resumed.outcome() == straight


def test_a_run_of_ratios_learns_from_all_its_chunks_and_resumes_to_the_bit(straight, tmp_path):
    straight_ratio = Practice(tmp_path / "straight", algo={"mode": "ratio"})
    straight_ratio.iterate(3)
    outcome = straight_ratio.outcome()
    assert all(row["updates"] > 0 and row["grad_norm"] > 0 for row in outcome["rows"])
    assert outcome["weights"] != straight["weights"]
    parts = [part for part in straight_ratio.learner.replay.parts if part is not None]
    assert any((part.weights < 0).any() for part in parts), "failures are learned from"
    Practice(tmp_path / "resumed", algo={"mode": "ratio"}).iterate(1)
    resumed = Practice(tmp_path / "resumed", resume=True, algo={"mode": "ratio"})
    assert all(part.paths is not None for part in resumed.learner.replay.parts if part is not None)
    resumed.iterate(3)
    assert resumed.outcome() == outcome


def test_work_after_the_last_checkpoint_is_done_again(straight, tmp_path):
    practice = Practice(tmp_path, save_freq=2)
    practice.iterate(3)
    assert steps_saved(practice) == [0, 2]
    resumed = Practice(tmp_path, resume=True, save_freq=2)
    assert resumed.state.step == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    resumed.iterate(4)
    assert resumed.outcome() == straight


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(straight, tmp_path, capsys):
    practice = Practice(tmp_path)
    practice.iterate(2)
    newest = practice.safe.store.folder / "step-000002"
    content = bytearray((newest / "training.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "training.safetensors").write_bytes(content)
    resumed = Practice(tmp_path, resume=True)
    assert f"skipped {newest}: training.safetensors: its checksum differs" in capsys.readouterr().out
    assert resumed.state.step == 1
    resumed.iterate(4)
    assert resumed.outcome() == straight


def test_the_checkpoint_with_the_best_score_stays_when_newer_ones_come(tmp_path):
    practice = Practice(tmp_path, keep_checkpoints=1, save_freq=100)
    for step, rate in enumerate((0.5, 0.75, 0.75, 0.25)):
        practice.state.evaluations.append({"step": step + 1, "success_rate": rate})  # due for its score alone
        practice.iterate(step + 1)
    assert steps_saved(practice) == [3, 4]
    manifest = json.loads((practice.safe.store.folder / "step-000003" / "manifest.json").read_text())
    assert manifest["score"] == 0.75
    assert manifest["facts"]["config"]["algo"]["num_epochs"] == 2


def test_a_single_gradient_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    practice = Practice(tmp_path)
    spoil_gradients(practice, monkeypatch, 1)
    practice.iterate(2)
    assert "1 gradients were not finite and were left out" in capsys.readouterr().out
    assert [row["bad_updates"] for row in practice.state.history] == [1, 0]
    assert practice.state.history[-1]["rollbacks"] == 0
    assert 2 in steps_saved(practice), "what came after it was finite"
    assert all(row["updates"] > 0 for row in practice.state.history)


def test_no_checkpoint_is_made_while_the_last_gradient_was_not_finite(tmp_path, monkeypatch, capsys):
    practice = Practice(tmp_path, max_bad_updates=100)
    spoil_gradients(practice, monkeypatch, 100)
    practice.iterate(1)
    assert "no checkpoint of step 1: the last gradient was not finite" in capsys.readouterr().out
    assert steps_saved(practice) == [0]


def test_after_several_gradients_that_are_not_finite_the_run_goes_back_and_learns_with_other_noise(
    straight, tmp_path, monkeypatch, capsys
):
    practice = Practice(tmp_path)
    practice.iterate(1)
    spoil_gradients(practice, monkeypatch, 2)
    practice.iterate(4)
    said = capsys.readouterr().out
    assert "step 1: 2 gradients in a row are not finite; back to the last good checkpoint" in said
    assert "step-000001, 1 iterations done" in said
    outcome = practice.outcome()
    assert [row["rollbacks"] for row in outcome["rows"]] == [0, 1, 1, 1]
    assert outcome["rows"][0] == straight["rows"][0]
    assert outcome["rows"][1]["loss"] != straight["rows"][1]["loss"], "the same noise would lead there again"
    assert len(practice.state.history) == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0], "what the run returned behind is taken back"


def test_a_second_rollback_takes_an_earlier_checkpoint(tmp_path, monkeypatch, capsys):
    practice = Practice(tmp_path)
    practice.iterate(1)
    # The checkpoint of step 1 is whole and verifies, and its gradients overflow: as of weights that are spoilt.
    with torch.no_grad():
        for parameter in practice.learner.policy.parameters():
            parameter *= 1e12
    practice.stage.save_checkpoint(practice.safe)
    practice.iterate(2)
    said = capsys.readouterr().out
    assert len(re.findall(r"back to the last good checkpoint", said)) == 2
    assert "step-000001, 1 iterations done" in said
    assert "step-000000, 0 iterations done" in said
    assert practice.state.step == 2
    assert practice.safe.recovery.rollbacks == 2


def test_a_run_that_goes_wrong_again_and_again_ends_with_what_to_do(tmp_path, monkeypatch):
    practice = Practice(tmp_path)
    spoil_gradients(practice, monkeypatch, 10_000)
    with pytest.raises(InputError, match=r"step 0: 2 gradients in a row .*lower algo\.lr"):
        practice.iterate(1)
    assert practice.safe.recovery.rollbacks == 3


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path, monkeypatch, capsys):
    practice = Practice(tmp_path)
    step, left = practice.learner.optimizer.step, [4]  # updates of an iteration

    def spoiling_step(*arguments, **options) -> None:
        step(*arguments, **options)
        left[0] -= 1
        if left[0] == 0:  # no later gradient shows it
            next(p for p in practice.learner.policy.parameters() if p.requires_grad).data[0] = torch.inf

    monkeypatch.setattr(practice.learner.optimizer, "step", spoiling_step)
    practice.iterate(2)
    said = capsys.readouterr().out
    assert "step 0: the weights are not finite; back to the last good checkpoint" in said
    assert practice.safe.recovery.rollbacks == 1
    for folder in practice.safe.store.folder.glob("step-*"):
        weights = load_file(folder / "training.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_when_memory_runs_out_where_nothing_can_be_tried_again_a_resumed_run_takes_more_passes(
    tmp_path, monkeypatch
):
    practice = Practice(tmp_path)

    def run_out(*arguments, **options) -> float:
        raise OutOfMemory(4)

    monkeypatch.setattr(practice.learner.adapter, "accumulate_gradient", run_out)
    monkeypatch.setattr(practice.stage.dist, "get_rank", lambda: 0)
    with pytest.raises(
        InputError, match=r"step 0: memory ran out on rank 0; --resume continues .* in 4 passes"
    ):
        practice.learn()
    resumed = Practice(tmp_path, resume=True)
    assert resumed.learner.adapter.passes == 4
    resumed.iterate(1)
    assert resumed.state.history[0]["passes"] == 4
    assert Practice(tmp_path, resume=True).learner.adapter.passes == 4


def test_a_stop_within_an_update_leaves_nothing_to_save_and_says_what_is_to_be_done_again(
    tmp_path, monkeypatch, capsys
):
    practice = Practice(tmp_path, save_freq=100, save_best=False)
    with practice.stage.cleanup_on_exit(practice.safe):
        practice.iterate(1)
        monkeypatch.setattr(practice.safe.interrupts, "_asked_at", 0.0)
        monkeypatch.setattr(practice.safe.interrupts, "_noticed_at", -100.0)  # its patience is over
        practice.iterate(2)
    assert steps_saved(practice) == [0]
    said = capsys.readouterr().out
    assert re.search(r"stopped; --resume .*/step-000000; 1 iterations after it must be repeated", said)


def test_a_stop_between_iterations_saves_what_no_checkpoint_has(straight, tmp_path, capsys):
    practice = Practice(tmp_path, save_freq=100, save_best=False)
    with practice.stage.cleanup_on_exit(practice.safe):
        practice.iterate(1)
        torch.rand(100, generator=practice.learner.generator)  # what was begun since does not count
        practice.states.smart_sample_group()
        raise Interrupted
    assert steps_saved(practice) == [0, 1]
    assert "step-000001" in capsys.readouterr().out
    resumed = Practice(tmp_path, resume=True)
    resumed.iterate(4)
    assert resumed.outcome() == straight


def test_a_disk_that_refuses_costs_the_checkpoint_and_not_the_run(straight, tmp_path, monkeypatch, capsys):
    practice = Practice(tmp_path)
    save = checkpoint_store.torch.save
    full = [True]

    def save_if_there_is_room(*arguments, **options) -> None:
        if full[0]:
            raise OSError(28, os.strerror(28))
        save(*arguments, **options)

    monkeypatch.setattr(checkpoint_store.torch, "save", save_if_there_is_room)
    practice.iterate(2)
    assert steps_saved(practice) == [0]
    assert len(re.findall(r"step [12]: .*No space left on device", capsys.readouterr().out)) == 2
    assert not list(practice.safe.store.folder.glob(".*")), "nothing half-written is left behind"
    full[0] = False
    practice.iterate(4)
    assert practice.outcome() == straight
    assert steps_saved(practice)[-1] == 4


# Ranks -------------------------------------------------------------------------------------------------

# One run after another under torchrun (tests/support/rank_practice.py).
LORA = {"trainable": "lora"}
RATIO = {"mode": "ratio"}
LARGE = {"use_fsdp": True, "use_mixed_precision": True, "gradient_checkpointing": True}
ON_TWO_RANKS = [
    {"name": "copies", "iterations": 2},
    {"name": "copies_resumed", "iterations": 2, "stopped_after": 1},
    {"name": "of_one_process", "iterations": 2, "resume": True},
    {"name": "shards", "iterations": 2, "stopped_after": 1, "training": {"use_fsdp": True}},
    {"name": "lora", "iterations": 2, "training": LORA},
    {"name": "lora_shards", "iterations": 2, "stopped_after": 1, "training": {**LORA, "use_fsdp": True}},
    {"name": "gradient_checkpointing", "iterations": 1, "training": {"gradient_checkpointing": True}},
    {"name": "use_mixed_precision", "iterations": 1, "training": {"use_mixed_precision": True}},
    {"name": "large_with_guidance", "iterations": 1, "algo": {"mode": "guidance"}, "training": LARGE},
    {"name": "ratio", "iterations": 2, "algo": RATIO},
    {
        "name": "ratio_shards",
        "iterations": 2,
        "stopped_after": 1,
        "algo": RATIO,
        "training": {"use_fsdp": True},
    },
    {"name": "spoilt", "iterations": 2, "spoilt": 2},
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """The folder of these runs, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    of_one = Practice(folder / "of_one_process")
    of_one.learner.adapter.passes = 2  # as where memory was once short
    of_one.iterate(1)
    runs = json.dumps(ON_TWO_RANKS)
    process = torchrun(2, "tests/support/rank_practice.py", str(folder), runs)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return folder, output


def outcome_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "outcome.json").read_text())


def trained_in(folder: Path, name: str, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder / name / f"checkpoints/step-{step:06d}/training.safetensors")


@pytest.mark.runs
def test_ranks_that_are_resumed_learn_what_they_learn_without_a_stop(on_two_ranks):
    folder, _ = on_two_ranks
    assert outcome_of(folder, "copies_resumed") == outcome_of(folder, "copies")
    assert len(set(outcome_of(folder, "copies")["digests"])) == 2, "each rank has noise and states of its own"


@pytest.mark.runs
@pytest.mark.parametrize(
    ("shards", "copies"), [("shards", "copies"), ("lora_shards", "lora"), ("ratio_shards", "ratio")]
)
def test_shards_that_are_resumed_learn_what_copies_learn(on_two_ranks, shards, copies):
    folder, _ = on_two_ranks
    ours, theirs = outcome_of(folder, shards)["rows"], outcome_of(folder, copies)["rows"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    trained, expected = trained_in(folder, shards), trained_in(folder, copies)
    assert trained.keys() == expected.keys()
    assert all(torch.allclose(trained[name], expected[name], atol=1e-5) for name in expected)
    before = trained_in(folder, copies, step=1)
    moved = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert ("gemma.layers.0.mlp.up_proj.weight" in moved) == (copies != "lora")
    assert any(name.endswith("lora_b") for name in moved) == (copies == "lora")


@pytest.mark.runs
@pytest.mark.parametrize(
    ("setting", "tolerance"), [("gradient_checkpointing", 0.0), ("use_mixed_precision", 0.02)]
)
def test_what_saves_memory_learns_the_same_on_ranks(on_two_ranks, setting, tolerance):
    folder, _ = on_two_ranks
    mine, other = outcome_of(folder, setting)["rows"][0], outcome_of(folder, "copies")["rows"][0]
    assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance, abs=0)
    assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance, abs=0)
    assert (mine["loss"] == other["loss"]) == (tolerance == 0)


@pytest.mark.runs
def test_all_that_saves_memory_works_together_on_ranks_with_guidance(on_two_ranks):
    folder, _ = on_two_ranks
    (row,) = outcome_of(folder, "large_with_guidance")["rows"]
    assert row["updates"] > 0
    assert row["bad_updates"] == 0


@pytest.mark.runs
def test_ranks_return_together_where_the_gradients_of_one_are_not_finite(on_two_ranks):
    folder, output = on_two_ranks
    assert output.count("step 0: 2 gradients in a row are not finite; back to the last good checkpoint") == 2
    rows = outcome_of(folder, "spoilt")["rows"]
    assert [row["rollbacks"] for row in rows] == [1, 1]
    assert all(row["updates"] > 0 and row["bad_updates"] == 0 for row in rows)
    assert rows[0]["loss"] != outcome_of(folder, "copies")["rows"][0]["loss"]


@pytest.mark.runs
def test_another_number_of_ranks_resumes_and_says_what_is_distributed_again(on_two_ranks, tmp_path, capsys):
    folder, output = on_two_ranks
    assert "1 iterations done; written by 1 processes, read by 2" in output
    assert [row["passes"] for row in outcome_of(folder, "of_one_process")["rows"]] == [2, 2]
    shutil.copytree(folder / "copies", tmp_path / "copies")
    resumed = Practice(tmp_path / "copies", resume=True)
    assert "2 iterations done; written by 2 processes, read by 1" in capsys.readouterr().out
    resumed.iterate(3)
    assert resumed.state.history[-1]["updates"] > 0
