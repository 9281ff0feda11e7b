"""Checkpoint directories: what is written comes back, and what does not fit says why."""

import json
import math
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pi0 import PI0Policy
from pi0.checkpoint import inspect_checkpoint
from pi0.model.config import Pi0Config
from pi0.policy.folder import UNUSED, CheckpointError
from pi0.policy.normalization import NormStats, load_norm_stats, normalize
from tests.support.networks import REFERENCE, random_actions, random_inputs, small_config


def stats() -> NormStats:
    rng = np.random.default_rng(0)
    return NormStats.of(rng.normal(size=(50, 8)), rng.normal(size=(50, 7)))


@pytest.fixture
def checkpoint(tmp_path):
    """A saved tiny policy with guidance."""
    torch.manual_seed(0)
    PI0Policy(Pi0Config.preset("pi0_tiny", guidance=True), stats()).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "config", [small_config(guidance=True), Pi0Config.preset("pi0_tiny")], ids=["siglip", "conv"]
)
def test_saved_policy_acts_the_same(tmp_path, config):
    torch.manual_seed(0)
    policy = PI0Policy(config, stats()).eval()
    policy.save_pretrained(tmp_path / "new" / "folder")
    loaded = PI0Policy.from_pretrained(tmp_path / "new" / "folder")
    inputs, noise = random_inputs(config, 2), random_actions(config, 2)["noise"]
    assert torch.equal(
        loaded.sample_actions(**inputs, noise=noise), policy.sample_actions(**inputs, noise=noise)
    )
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.norm_stats.actions.q99, policy.norm_stats.actions.q99)


def test_loaded_policy_trains_like_a_new_one(checkpoint):
    loaded = PI0Policy.from_pretrained(checkpoint)
    fresh = PI0Policy(loaded.config)
    asks = [{n: p.requires_grad for n, p in policy.named_parameters()} for policy in (loaded, fresh)]
    assert asks[0] == asks[1]
    assert not loaded.training


def test_published_checkpoint_is_written_back_as_it_was(tmp_path):
    if not REFERENCE.is_dir():
        pytest.skip(f"reference outputs are not at {REFERENCE}")
    PI0Policy.from_pretrained(REFERENCE).save_pretrained(tmp_path)
    before, after = load_file(REFERENCE / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for key in before.keys() - {UNUSED}:
        assert torch.equal(after[key], before[key]), key
    assert after[UNUSED].shape == before[UNUSED].shape


def test_embedding_is_found_under_either_of_its_names(tmp_path):
    config = small_config()
    PI0Policy(config).save_pretrained(tmp_path)
    before = PI0Policy.from_pretrained(tmp_path).network.token_embedding.weight

    def rename(tensors):
        embedding = tensors.pop("paligemma_with_expert.paligemma.lm_head.weight")
        tensors["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = embedding

    change_tensors(tmp_path, rename)
    assert torch.equal(PI0Policy.from_pretrained(tmp_path).network.token_embedding.weight, before)


def test_half_precision_keeps_norms_and_flow_head_exact(tmp_path):
    config = small_config()
    torch.manual_seed(0)
    policy = PI0Policy(config).eval()
    policy.save_pretrained(tmp_path)
    half = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.network.named_parameters()}
    assert dtypes["expert.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["expert.layers.0.input_layernorm.weight"] == torch.float32
    assert dtypes["action_out_proj.weight"] == torch.float32
    inputs, noise = random_inputs(config, 2), random_actions(config, 2)["noise"]
    exact = policy.sample_actions(**inputs, noise=noise)
    torch.testing.assert_close(half.sample_actions(**inputs, noise=noise), exact, rtol=0, atol=0.1)


def test_all_tensors_that_do_not_fit_are_listed(checkpoint):
    def spoil(tensors):
        del tensors["state_proj.bias"]
        tensors["something.else"] = torch.zeros(1)
        tensors["action_in_proj.weight"] = torch.zeros(128, 32)

    change_tensors(checkpoint, spoil)
    with pytest.raises(CheckpointError) as error:
        PI0Policy.from_pretrained(checkpoint)
    message = str(error.value)
    assert str(checkpoint / "model.safetensors") in message
    assert "1 missing:\n    state_proj.bias" in message
    assert "1 surplus:\n    something.else" in message
    assert "action_in_proj.weight [128, 32], expected [128, 8]" in message
    assert "a convolutional tower" in message
    assert "actions of 32 features" in message


def test_another_layout_is_described(checkpoint):
    tensors = {
        f"policy.model.{key}": value for key, value in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="no pi0 policy in openpi's layout: its tensors begin with policy.model"
    ):
        PI0Policy.from_pretrained(checkpoint)


@pytest.mark.tried("model.safetensors is cut off", "An error with the file and its size")
def test_truncated_weights_name_the_file(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(100000 bytes\) is truncated"):
        PI0Policy.from_pretrained(checkpoint)


def test_missing_pieces_are_named(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="nowhere not found"):
        PI0Policy.from_pretrained(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").rename(checkpoint / "model.pt")
    with pytest.raises(
        FileNotFoundError, match=r"no model\.safetensors; it holds .*model\.pt.*never pickles"
    ):
        PI0Policy.from_pretrained(checkpoint)
    (checkpoint / "model.pt").rename(checkpoint / "model.safetensors")
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        PI0Policy.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"gemma": {}}', "exactly one vision tower"),
        ('{"conv": {}, "gemma": {}}', r"gemma: missing width, depth"),
        ('{"conv": {"tokens": "8"}}', "tokens must be int, not '8'"),
    ],
)
def test_broken_config_names_the_file(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        PI0Policy.from_pretrained(checkpoint)
    assert str(checkpoint / "config.json") in str(error.value)


@pytest.mark.tried("The disk refuses while a policy is saved", "The old policy stays whole")
def test_failed_save_leaves_the_old_checkpoint(checkpoint):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    torch.manual_seed(1)
    policy = PI0Policy(Pi0Config.preset("pi0_tiny"), stats())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # as a full disk: files end at 1 MB
    try:
        with pytest.raises(Exception, match="File too large"):
            policy.save_pretrained(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_tiny_checkpoint_is_small(checkpoint):
    assert (checkpoint / "model.safetensors").stat().st_size < 12e6


# Normalisation statistics


def change_stats(path, change) -> None:
    content = json.loads((path / "norm_stats.json").read_text())
    change(content["norm_stats"])
    (path / "norm_stats.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"].pop("std"), r"missing norm_stats\.state\.std"),
        (lambda s: s.pop("actions"), r"missing norm_stats\.actions"),
        (
            lambda s: s["actions"].update(mean=[0.0] * 6),
            r"norm_stats\.actions\.mean has shape \[6\]; the robot has 7",
        ),
        (lambda s: s["state"].update(mean=[[0.0] * 8]), r"norm_stats\.state\.mean has shape \[1, 8\]"),
        (lambda s: s["state"].update(std=[-1.0] * 8), r"norm_stats\.state\.std, feature 0: .*not below zero"),
        (
            lambda s: s["state"]["mean"].__setitem__(4, 1e30),
            r"norm_stats\.state\.mean, feature 4: .*beyond 1e\+06",
        ),
        (
            lambda s: s["state"]["mean"].__setitem__(4, math.nan),
            r"norm_stats\.state\.mean, feature 4: .*not finite",
        ),
        (
            lambda s: s["actions"]["q01"].__setitem__(2, 3.0),
            r"norm_stats\.actions\.q01, feature 2: q01 is above q99",
        ),
        (
            lambda s: s["state"]["std"].__setitem__(1, 0.0),
            r"norm_stats\.state\.std, feature 1: a deviation of 0, but q01 is not q99 .*std 0, q01 -?\d.*pi0\.norm_stats",
        ),
        (lambda s: s["state"].update(mean=["x"] * 8), r"norm_stats\.state\.mean is not a list of numbers"),
    ],
)
@pytest.mark.tried(
    "Statistics with q01 above q99, a mean of 1e30, a negative deviation, or a deviation of 0 where the values move",
    "An error that names file, key and feature",
)
def test_unusable_norm_stats_name_file_and_key(checkpoint, change, message):
    change_stats(checkpoint, change)
    with pytest.raises(ValueError, match=message) as error:
        PI0Policy.from_pretrained(checkpoint)
    assert str(checkpoint / "norm_stats.json") in str(error.value)


def make_constant(part, feature, value):
    """A change of statistics: a feature of the data that never moved."""

    def change(stats):
        for name, number in (("mean", value), ("std", 0.0), ("q01", value), ("q99", value)):
            stats[part][name][feature] = number

    return change


@pytest.mark.parametrize(
    ("quantiles", "constant", "normal"),
    [(False, 0.0, 0.5), (True, -1.0, -0.5)],
    ids=["deviation", "quantiles"],
)
@pytest.mark.tried(
    "A feature that never changed in the training data",
    "Its divisor is raised to 0.02; a line says so, `inspect` and the doctor show it, norm_stats.json lists it",
)
def test_a_constant_feature_gets_a_floor_that_is_said_and_saved(
    checkpoint, capsys, quantiles, constant, normal
):
    config = json.loads((checkpoint / "config.json").read_text()) | {"use_quantile_norm": quantiles}
    (checkpoint / "config.json").write_text(json.dumps(config))
    change_stats(checkpoint, make_constant("state", 5, 0.3))
    policy = PI0Policy.from_pretrained(checkpoint)
    (line,) = policy.norm_stats.floors
    assert line == "state feature 5: " + (
        "q01 and q99 are both 0.3, q99 raised to 0.34" if quantiles else "deviation 0 raised to 0.02"
    )
    assert f"{checkpoint / 'norm_stats.json'}: {line}" in capsys.readouterr().out
    # A value as in training is what openpi makes of it; a change of 1 cm is half a unit, not ten thousand.
    states = torch.full((2, 8), 0.3)
    states[1, 5] += 0.01
    normalized = normalize(states, policy.norm_stats.state, quantiles)[:, 5]
    assert normalized.tolist() == pytest.approx([constant, normal], abs=1e-3)
    policy.save_pretrained(checkpoint)
    capsys.readouterr()
    again = PI0Policy.from_pretrained(checkpoint).norm_stats
    assert again.floors == (line,) and capsys.readouterr().out == ""
    assert normalize(states, again.state, quantiles)[:, 5].tolist() == normalized.tolist()
    assert line in dict(inspect_checkpoint(checkpoint))["statistics"]


def test_divisors_that_the_policy_does_not_use_are_left_alone(checkpoint, capsys):
    def change(stats):
        stats["actions"]["q99"][3] = stats["actions"]["q01"][3]

    change_stats(checkpoint, change)
    assert PI0Policy.from_pretrained(checkpoint).norm_stats.floors == ()
    assert capsys.readouterr().out == ""


def test_computed_statistics_of_constant_features_have_a_floor():
    states = np.zeros((50, 8))
    states[:, 0] = np.linspace(0, 1, 50)
    states[:, 1] = 0.25
    stats = NormStats.of(states, states[:, :7]).with_floors("std", "quantiles")
    assert stats.state.std[1:].tolist() == pytest.approx([0.02] * 7)
    assert (stats.state.q01[1], stats.state.q99[1]) == pytest.approx((0.25, 0.29))
    assert (stats.state.std[0], stats.state.q99[0]) == pytest.approx((states[:, 0].std(), 0.99), abs=1e-6)
    assert len(stats.floors) == 2 * (7 + 6)
    assert json.loads(json.dumps(stats.to_dict()))["floors"] == list(stats.floors)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.tried(
    "A NaN or infinity in the weights of a policy",
    "Every command, `inspect` and the doctor refuse it, with file and tensor",
)
def test_weights_that_are_not_finite_name_file_and_tensor(checkpoint, value):
    file, key = checkpoint / "model.safetensors", "action_out_proj.weight"
    change_tensors(checkpoint, lambda tensors: tensors[key][2].__setitem__(1, value))
    message = f"{file}: {key} holds 1 values that are not finite"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        PI0Policy.from_pretrained(checkpoint)
    label, text = list(inspect_checkpoint(checkpoint))[-1]
    assert label == "STOP" and message in text


@pytest.mark.tried(
    "Training makes weights that are not finite", "No policy is written; the earlier one stays"
)
def test_weights_that_are_not_finite_are_not_written(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    policy = PI0Policy.from_pretrained(checkpoint)
    with torch.no_grad():
        policy.network.action_out_proj.weight[0, 0] = math.inf
    with pytest.raises(
        CheckpointError, match=r"action_out_proj\.weight holds 1 values that are not finite, so no"
    ):
        policy.save_pretrained(checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_padded_norm_stats_are_cut_to_the_robot(checkpoint):
    change_stats(checkpoint, lambda s: s["actions"].update(mean=[0.5] * 7 + [0.0] * 25, std=[1.0] * 32))
    loaded = load_norm_stats(checkpoint / "norm_stats.json", 8, 7)
    assert loaded.actions.mean.tolist() == [0.5] * 7


def test_quantiles_may_be_absent(checkpoint):
    change_stats(
        checkpoint, lambda s: [s[part].pop(q) for part in ("state", "actions") for q in ("q01", "q99")]
    )
    assert PI0Policy.from_pretrained(checkpoint).norm_stats.state.q01 is None


def test_policy_without_norm_stats_loads(checkpoint):
    (checkpoint / "norm_stats.json").unlink()
    assert PI0Policy.from_pretrained(checkpoint).norm_stats is None


def test_norm_stats_of_an_earlier_policy_do_not_stay(checkpoint):
    policy = PI0Policy(Pi0Config.preset("pi0_tiny", guidance=True))
    policy.save_pretrained(checkpoint)
    assert PI0Policy.from_pretrained(checkpoint).norm_stats is None


def test_copied_checkpoint_needs_nothing_else(checkpoint, tmp_path_factory):
    target = tmp_path_factory.mktemp("copy") / "policy"
    shutil.copytree(checkpoint, target)
    shutil.rmtree(checkpoint)
    assert PI0Policy.from_pretrained(target).config.guidance
