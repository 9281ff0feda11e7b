"""Checkpoint directories: what is written comes back, and what does not fit says why."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pi0 import PI0Policy
from pi0.model.config import Pi0Config
from pi0.policy.folder import UNUSED, CheckpointError
from pi0.policy.normalization import NormStats, load_norm_stats
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
        (lambda s: s["state"].update(std=[-1.0] * 8), r"norm_stats\.state\.std holds"),
        (lambda s: s["state"].update(mean=["x"] * 8), r"norm_stats\.state\.mean is not a list of numbers"),
    ],
)
def test_unusable_norm_stats_name_file_and_key(checkpoint, change, message):
    change_stats(checkpoint, change)
    with pytest.raises(ValueError, match=message) as error:
        PI0Policy.from_pretrained(checkpoint)
    assert str(checkpoint / "norm_stats.json") in str(error.value)


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
