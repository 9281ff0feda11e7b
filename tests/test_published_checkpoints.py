"""openpi's and LeRobot's checkpoints: read as they are, written back as they were, refused where they do not fit."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.checkpoint import inspect_checkpoint, main
from pi0.model.config import Pi0Config
from pi0.model.lora import is_lora
from pi0.policy.folder import CheckpointError
from pi0.policy.lerobot_files import lerobot_config
from tests.support.networks import random_actions, random_inputs
from tests.support.published_files import (
    EMBED_TOKENS,
    EXPERT_HEAD,
    HORIZON,
    LEROBOT_CONFIG,
    LM_HEAD,
    NORM_MAP,
    STATS,
    shapes,
    weights,
    write_json,
    write_lerobot,
    write_lerobot_converted,
    write_lerobot_early,
    write_lerobot_summer,
    write_openpi,
)
from tests.support.stage_13_runs import SHORT, finish, run_of, start

ROOT = Path(__file__).resolve().parents[1]
WRITERS = {
    "openpi": write_openpi,
    "lerobot": write_lerobot,
    "lerobot_converted": write_lerobot_converted,
    "lerobot_summer": write_lerobot_summer,
    "lerobot_early": write_lerobot_early,
}


def sampled(policy: PI0Policy) -> torch.Tensor:
    inputs = random_inputs(policy.config, 2)
    return policy.sample_actions(**inputs, noise=random_actions(policy.config, 2)["noise"], num_steps=2)


def edit_config(path: Path, **changes) -> None:
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | changes)


# Reading


@pytest.mark.parametrize("name", WRITERS)
def test_published_directory_gives_network_and_statistics(tmp_path, name):
    tensors = weights()
    policy = PI0Policy.from_pretrained(WRITERS[name](tmp_path / "checkpoint", tensors))
    assert policy.config.action_horizon == HORIZON
    assert policy.config.prompt_length == 48
    assert policy.config.gemma.num_heads == 8
    assert policy.config.vision.num_heads == 1  # 72 features each
    assert policy.config.image_size == 28
    assert (policy.config.robot_state_dim, policy.config.robot_action_dim) == (8, 7)
    assert policy.norm_stats.state.std.tolist() == STATS["state"]["std"]
    assert policy.norm_stats.actions.mean.tolist() == STATS["actions"]["mean"]
    assert torch.equal(policy.network.token_embedding.weight, tensors[LM_HEAD])
    assert torch.equal(policy.network.state_proj.bias, tensors["state_proj.bias"])


def test_all_layouts_of_one_model_act_alike(tmp_path):
    tensors = weights()
    policies = [PI0Policy.from_pretrained(write(tmp_path / name, tensors)) for name, write in WRITERS.items()]
    config = policies[0].config  # with a third camera, which is masked here and absent in the others
    inputs, noise = random_inputs(config, 2), random_actions(config, 2)["noise"]
    inputs["image_masks"]["right_wrist_0_rgb"] = torch.zeros(2, dtype=torch.bool)
    openpi, *others = (policy.sample_actions(**inputs, noise=noise, num_steps=2) for policy in policies)
    for actions in others:
        assert torch.equal(actions, others[0])
        torch.testing.assert_close(actions, openpi, rtol=0, atol=1e-5)


def test_statistics_normalise_as_by_hand(tmp_path):
    policy = PI0Policy.from_pretrained(write_lerobot(tmp_path / "checkpoint", weights()))
    assert policy.normalize_actions(torch.full((1, 7), 0.75))[0, 0].item() == pytest.approx(1.0, abs=1e-5)
    assert policy.unnormalize_actions(torch.full((1, 32), 2.0))[0, 0].item() == pytest.approx(1.25, abs=1e-5)


def test_named_statistics_come_before_those_of_the_checkpoint(tmp_path):
    other = STATS | {"state": STATS["state"] | {"mean": [9.0] * 8}}
    write_json(tmp_path / "norm_stats.json", {"norm_stats": other})
    directory = write_openpi(tmp_path / "checkpoint", weights())
    policy = PI0Policy.from_pretrained(directory, norm_stats_path=tmp_path / "norm_stats.json")
    assert policy.norm_stats.state.mean.tolist() == [9.0] * 8


def test_buffers_that_nobody_has_set_are_no_statistics(tmp_path):
    directory = write_lerobot_early(tmp_path / "checkpoint", weights())
    tensors = load_file(directory / "model.safetensors")
    infinite = {k: torch.full_like(v, torch.inf) for k, v in tensors.items() if ".buffer_" in k}
    save_file(tensors | infinite, directory / "model.safetensors")
    assert PI0Policy.from_pretrained(directory).norm_stats is None


def test_directory_of_openpis_training_needs_its_horizon(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape('write {"action_horizon": 50} there')):
        PI0Policy.from_pretrained(directory)
    write_json(directory / "config.json", {"action_horizon": 9, "num_steps": 3})
    config = PI0Policy.from_pretrained(directory).config
    assert (config.action_horizon, config.num_steps, config.action_dim) == (9, 3, 32)


@pytest.mark.parametrize(
    ("features", "cameras"),
    [
        (["images.image", "images.image2"], ("base_0_rgb", "left_wrist_0_rgb")),
        (["images.wrist_image", "images.image"], ("left_wrist_0_rgb", "base_0_rgb")),
        (["images.left_wrist_0_rgb", "images.top"], ("left_wrist_0_rgb", "base_0_rgb")),
        (["images.wrist", "images.front"], ("left_wrist_0_rgb", "base_0_rgb")),
        (["images.robot0_eye_in_hand", "images.agentview"], ("left_wrist_0_rgb", "base_0_rgb")),
        (["images.wrist_image_left", "images.exterior_image_1_left"], ("left_wrist_0_rgb", "base_0_rgb")),
        (["images.gripperCam", "images.thirdPerson"], ("left_wrist_0_rgb", "base_0_rgb")),
        (
            ["images.cam_right_wrist", "images.cam_left_wrist", "images.cam_top"],
            ("right_wrist_0_rgb", "left_wrist_0_rgb", "base_0_rgb"),
        ),
        (["images.laptop", "images.wrist"], ("base_0_rgb", "left_wrist_0_rgb")),
        (["images.image", "images.image2", "images.empty_camera_0"], ("base_0_rgb", "left_wrist_0_rgb")),
        ([], ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")),
    ],
)
@pytest.mark.tried(
    "A checkpoint with cameras `wrist, front`, or with robosuite's, DROID's or ALOHA's names",
    "The words of the names decide, not the order",
)
def test_cameras_are_told_by_name_then_by_order(tmp_path, features, cameras):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    image = {"type": "VISUAL", "shape": [3, 224, 224]}
    edit_config(directory, input_features={f"observation.{name}": image for name in features})
    assert PI0Policy.from_pretrained(directory).config.cameras == cameras


def with_images(tmp_path, *names):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    image = {"type": "VISUAL", "shape": [3, 224, 224]}
    edit_config(directory, input_features={f"observation.images.{name}": image for name in names})
    return directory


@pytest.mark.tried(
    "A camera whose name tells nothing",
    "A line says that the order decided, and how to state it; `inspect` shows image, camera and reason",
)
def test_what_decided_a_camera_is_shown_and_order_alone_warns(tmp_path, capsys):
    directory = with_images(tmp_path, "wrist", "phone")
    PI0Policy.from_pretrained(directory)
    said = "image phone is base_0_rgb, by its order only; if that is wrong, state the cameras"
    assert said in capsys.readouterr().out
    wrist, phone = dict(inspect_checkpoint(directory))["cameras"].split("\n")
    assert wrist == "wrist is left_wrist_0_rgb, by the words of its name"
    assert phone == "phone is base_0_rgb, by its order only; if that is wrong, state the cameras: --cameras"
    PI0Policy.from_pretrained(with_images(tmp_path / "told", "wrist", "front"))
    assert "order" not in capsys.readouterr().out


def test_stated_cameras_come_first_and_the_converted_folder_names_them(tmp_path, capsys):
    directory = with_images(tmp_path, "phone", "laptop")
    stated = ["--cameras", "left_wrist_0_rgb=phone", "base_0_rgb=laptop"]
    main(["convert", str(directory), str(tmp_path / "out"), *stated])
    capsys.readouterr()
    assert PI0Policy.from_pretrained(tmp_path / "out").config.cameras == ("left_wrist_0_rgb", "base_0_rgb")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="names its cameras itself"):
        main(["convert", str(tmp_path / "out"), str(tmp_path / "again"), *stated])
    openpis = write_openpi(tmp_path / "openpi", weights())
    with pytest.raises(ValueError, match="names its cameras itself"):
        main(["convert", str(openpis), str(tmp_path / "again"), *stated])
    with pytest.raises(ValueError, match="there is no tablet; images are phone, laptop"):
        main(["convert", str(directory), str(tmp_path / "other"), "--cameras", "base_0_rgb=tablet"])


@pytest.mark.parametrize("names", [("front", "top"), ("hand", "gripper"), ("a", "b", "c", "d")])
@pytest.mark.tried("Two images that could be the same camera", "An error with the option that states them")
def test_cameras_that_names_do_not_tell_apart_have_to_be_stated(tmp_path, names):
    directory = with_images(tmp_path, *names)
    with pytest.raises(ValueError, match=r"cannot be assigned .*pi0\.checkpoint convert .* --cameras"):
        PI0Policy.from_pretrained(directory)
    label, text = list(inspect_checkpoint(directory))[-1]
    assert label == "STOP" and "--cameras" in text


def test_base_models_padded_features_are_no_robots(tmp_path):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    edit_config(
        directory,
        input_features={"observation.state": {"type": "STATE", "shape": [32]}},
        output_features={"action": {"type": "ACTION", "shape": [32]}},
    )
    config = PI0Policy.from_pretrained(directory).config
    assert (config.robot_state_dim, config.robot_action_dim) == (8, 7)


def test_statistics_give_a_base_models_features_their_width(tmp_path):
    # LeRobot normalises a vector of the feature's width by the statistics' vectors.
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    for processor in directory.glob("policy_p*"):
        processor.unlink()
    padded = {
        "input_features": {"observation.state": {"type": "STATE", "shape": [32]}},
        "output_features": {"action": {"type": "ACTION", "shape": [32]}},
    }
    edit_config(directory, **padded)
    PI0Policy.from_pretrained(directory).save_pretrained(tmp_path / "base", layout="lerobot")
    content = json.loads((tmp_path / "base" / "config.json").read_text())
    assert {part: content[part] for part in padded} == padded
    write_json(tmp_path / "norm_stats.json", {"norm_stats": STATS})
    policy = PI0Policy.from_pretrained(directory, norm_stats_path=tmp_path / "norm_stats.json")
    policy.save_pretrained(tmp_path / "out", layout="lerobot")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["input_features"]["observation.state"] == {"type": "STATE", "shape": [8]}
    assert content["output_features"]["action"] == {"type": "ACTION", "shape": [7]}
    for name in ("policy_preprocessor", "policy_postprocessor"):
        for step in json.loads((tmp_path / "out" / f"{name}.json").read_text())["steps"]:
            if "norm_map" in step["config"]:
                stored = load_file(tmp_path / "out" / step["state_file"])
                for feature, described in step["config"]["features"].items():
                    assert list(stored[f"{feature}.mean"].shape) == described["shape"]


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        ({"freeze_vision_encoder": True, "train_expert_only": False}, {"projector", "gemma", "expert"}),
        ({"freeze_vision_encoder": False, "train_expert_only": True}, {"expert"}),
        ({"freeze_vision_encoder": False}, {"vision", "projector", "gemma", "expert"}),
    ],
)
def test_what_lerobot_freezes_is_frozen_and_written(tmp_path, frozen, trained):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    edit_config(directory, **frozen)
    policy = PI0Policy.from_pretrained(directory)
    policy.choose_trained("as_saved")
    asked = {name.split(".")[0] for name, p in policy.network.named_parameters() if p.requires_grad}
    assert asked & {"vision", "projector", "gemma", "expert"} == trained
    policy.save_pretrained(tmp_path / "again", layout="lerobot")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == LEROBOT_CONFIG | frozen


def test_what_a_policy_freezes_is_written_for_lerobot():
    config = Pi0Config.preset("pi0", freeze_vision_encoder=True)
    assert lerobot_config(config)["freeze_vision_encoder"] is True
    # Not all of LeRobot's releases know these keys, and its parser refuses what it does not know.
    assert "train_expert_only" not in lerobot_config(config)


@pytest.mark.parametrize("pi05", [False, True])
def test_lerobots_default_normalisation_of_pi05_is_by_quantiles(tmp_path, pi05):
    directory = write_lerobot(tmp_path / "checkpoint", weights(pi05=pi05))
    content = LEROBOT_CONFIG | {"type": "pi05" if pi05 else "pi0"}
    del content["normalization_mapping"]
    write_json(directory / "config.json", content)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        file = directory / f"{name}.json"
        file.write_text(file.read_text().replace("MEAN_STD", "QUANTILES" if pi05 else "MEAN_STD"))
    assert PI0Policy.from_pretrained(directory).config.use_quantile_norm is pi05


# Refusing


def test_misfits_are_listed_under_the_files_own_names(tmp_path):
    directory = write_lerobot_early(tmp_path / "checkpoint", weights())
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.paligemma_with_expert.paligemma.language_model.model."
    del tensors[prefix + "layers.1.self_attn.q_proj.weight"]
    tensors[prefix + "layers.1.self_attn.q_norm.weight"] = torch.zeros(4)
    tensors["model.state_proj.bias"] = torch.zeros(5)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        PI0Policy.from_pretrained(directory)
    message = str(error.value)
    assert f"1 missing:\n    {prefix}layers.1.self_attn.q_proj.weight" in message
    assert f"1 surplus:\n    {prefix}layers.1.self_attn.q_norm.weight" in message
    assert "1 of another shape:\n    model.state_proj.bias [5], expected [32]" in message
    assert "SigLIP tower (2 layers, width 72)" in message
    assert "LeRobot of the first half of 2025" in message


def test_tensor_that_is_there_under_two_names_is_refused(tmp_path):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"state_proj.bias": torch.zeros(32)}, directory / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.state_proj\.bias and state_proj\.bias are names of the same"
    ):
        PI0Policy.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "act"}, "type is 'act', but the tensors are of pi0"),
        ({"use_relative_actions": True}, "action_feature_names None is not supported"),
        (
            {"use_relative_actions": True, "action_feature_names": [f"motor_{n}" for n in range(7)]},
            "motor_6'. is not supported",
        ),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True"),
        ({"use_visual_memory": True}, "use_visual_memory is True"),
        ({"max_state_dim": 24}, "max_state_dim 24 is not max_action_dim 32"),
        ({"normalization_mapping": NORM_MAP | {"STATE": "MIN_MAX"}}, "normalises by .*MIN_MAX"),
        ({"normalization_mapping": NORM_MAP | {"VISUAL": "MEAN_STD"}}, "needs IDENTITY for VISUAL"),
        ({"normalization_mapping": {"STATE": "MEAN_STD"}}, "MEAN_STD or QUANTILES for both STATE and ACTION"),
        ({"paligemma_variant": "gemma_7b"}, "paligemma_variant is 'gemma_7b'"),
        ({"chunk_size": "6"}, "action_horizon must be int"),
    ],
)
def test_what_lerobot_computes_otherwise_is_refused(tmp_path, change, message):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    edit_config(directory, **change)
    with pytest.raises(CheckpointError, match=message) as error:
        PI0Policy.from_pretrained(directory)
    assert str(directory / "config.json") in str(error.value)


def test_unknown_key_beside_openpis_is_refused(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    edit_config(directory, action_horizont=50)
    with pytest.raises(CheckpointError, match="unknown key 'action_horizont'"):
        PI0Policy.from_pretrained(directory)


@pytest.mark.parametrize(
    ("key", "variant"), [("paligemma_variant", "gemma_2b_lora"), ("action_expert_variant", "gemma_1b")]
)
def test_openpis_unknown_variant_is_refused(tmp_path, key, variant):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    edit_config(directory, **{key: variant})
    with pytest.raises(
        CheckpointError, match=f"{key} is '{variant}'; known are gemma_2b and gemma_300m"
    ) as error:
        PI0Policy.from_pretrained(directory)
    assert str(directory / "config.json") in str(error.value)


def test_several_statistics_are_not_chosen_from(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    (directory / "assets" / "droid").mkdir()
    write_json(directory / "assets" / "droid" / "norm_stats.json", {"norm_stats": STATS})
    with pytest.raises(InputError, match=r"assets/droid/norm_stats\.json, assets/physical.*norm_stats_path"):
        PI0Policy.from_pretrained(directory)


def test_processors_that_contradict_the_configuration_are_refused(tmp_path):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    file = directory / "policy_preprocessor.json"
    file.write_text(file.read_text().replace("MEAN_STD", "QUANTILES"))
    with pytest.raises(InputError, match=r"policy_preprocessor\.json: normalises by .*contradicts config"):
        PI0Policy.from_pretrained(directory)


def test_processors_without_their_statistics_are_refused(tmp_path):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    (directory / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"policy_postprocessor\.json names policy_postprocessor_step_0"
    ):
        PI0Policy.from_pretrained(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("params/_METADATA", "openpi's JAX checkpoint: convert it"),
        ("model.safetensors.index.json", "split into shards"),
        ("adapter_model.safetensors", "holds an adapter only"),
        ("pretrained_model/model.safetensors", "The policy folder is .*pretrained_model"),
        ("pytorch_model.bin", "never pickles"),
    ],
)
def test_directories_without_weights_are_told_apart(tmp_path, content, message):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        main(["inspect", str(tmp_path)])


# Writing


def assert_same_weights(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16), (torch.float16, None)],
)
def test_openpis_weights_are_written_back_byte_by_byte(tmp_path, stored, loaded):
    tensors = {name: tensor.to(stored) for name, tensor in weights().items()}
    directory = write_openpi(tmp_path / "checkpoint", tensors)
    PI0Policy.from_pretrained(directory, dtype=loaded).save_pretrained(tmp_path / "again")
    assert_same_weights(tmp_path / "again", directory)
    PI0Policy.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "thrice")
    assert_same_weights(tmp_path / "thrice", directory)


def test_lerobots_weights_are_written_back_byte_by_byte(tmp_path):
    tensors = weights()  # of mixed types, as LeRobot keeps them
    tensors |= {k: v.bfloat16() for k, v in tensors.items() if "layers" in k and "norm" not in k}
    directory = write_lerobot(tmp_path / "checkpoint", tensors)
    PI0Policy.from_pretrained(directory).save_pretrained(tmp_path / "again", layout="lerobot")
    assert_same_weights(tmp_path / "again", directory)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == LEROBOT_CONFIG


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_embedding_goes_back_under_the_one_name_it_had(tmp_path, layout):
    tensors = weights()
    directory = WRITERS[layout](tmp_path / "checkpoint", tensors)
    tensors[EMBED_TOKENS] = tensors.pop(LM_HEAD)
    prefix = "model." if layout == "lerobot" else ""
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    PI0Policy.from_pretrained(directory).save_pretrained(tmp_path / "again", layout)
    assert_same_weights(tmp_path / "again", directory)
    policy = PI0Policy.from_pretrained(tmp_path / "again")
    assert torch.equal(policy.network.token_embedding.weight, tensors[EMBED_TOKENS])


def test_for_lerobot_an_openpi_file_gets_the_embedding_under_both_names(tmp_path, monkeypatch):
    # LeRobot 0.4.4 loads nothing from a file that lacks one.
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    tensors = weights()
    policy = PI0Policy.from_pretrained(write_openpi(tmp_path / "checkpoint", tensors))
    policy.save_pretrained(tmp_path / "out", layout="lerobot")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model." + EMBED_TOKENS], tensors[LM_HEAD])
    assert torch.equal(stored["model." + LM_HEAD], tensors[LM_HEAD])


def test_copy_is_written_after_the_file_is_gone(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    before = (directory / "model.safetensors").read_bytes()
    policy = copy.deepcopy(PI0Policy.from_pretrained(directory))
    (directory / "model.safetensors").unlink()
    policy.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before


def test_trained_weights_lose_nothing_to_the_stored_type(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", {k: v.bfloat16() for k, v in weights().items()})
    policy = PI0Policy.from_pretrained(directory)
    with torch.no_grad():
        policy.network.state_proj.bias += 1e-6
    policy.save_pretrained(tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert torch.equal(stored["state_proj.bias"], policy.network.state_proj.bias)
    assert stored["state_proj.weight"].dtype == torch.bfloat16


class Tree(nn.Module):
    """Modules nested as the names of their parameters say."""

    def __init__(self, named: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in named.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.zeros_like(tensor), requires_grad=False))


def load_as_openpi(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that openpi has after it loaded this directory's, of a model of the usual test sizes."""
    tensors = weights()
    model = Tree(tensors | {EMBED_TOKENS: tensors[LM_HEAD]})
    paligemma = model.paligemma_with_expert.paligemma
    paligemma.lm_head.weight = paligemma.model.language_model.embed_tokens.weight  # as transformers ties them
    # openpi: src/openpi/models/model.py load_pytorch; strict is the default
    safetensors.torch.load_model(model, directory / "model.safetensors")
    return model.state_dict()


@pytest.mark.parametrize("source", WRITERS)
def test_written_weights_load_as_openpi_loads_them(tmp_path, source):
    tensors = weights()
    PI0Policy.from_pretrained(WRITERS[source](tmp_path / "in", tensors)).save_pretrained(tmp_path / "out")
    loaded = load_as_openpi(tmp_path / "out")
    assert torch.equal(loaded[EMBED_TOKENS], tensors[LM_HEAD])
    assert torch.equal(loaded["action_time_mlp_in.weight"], tensors["action_time_mlp_in.weight"])


def load_as_lerobot(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that LeRobot has after it loaded this directory's, of a model of the usual test sizes."""
    # LeRobot: policies/pi0/modeling_pi0.py, _fix_pytorch_state_dict_keys and from_pretrained
    fixed = {}
    for key, value in load_file(directory / "model.safetensors").items():
        if key in ("model." + LM_HEAD, LM_HEAD):
            fixed["model." + EMBED_TOKENS] = value.clone()
        fixed[key] = value
    prefixed = {key if key.startswith("model.") else "model." + key: value for key, value in fixed.items()}
    tensors = weights()
    model = Tree({"model." + k: v for k, v in (tensors | {EMBED_TOKENS: tensors[LM_HEAD]}).items()})
    model.load_state_dict(prefixed, strict=True)
    return {key.removeprefix("model."): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
@pytest.mark.parametrize("source", WRITERS)
def test_written_weights_load_as_lerobot_loads_them(tmp_path, monkeypatch, source, layout):
    monkeypatch.setattr(
        "pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b"
    )  # sizes that it does not build
    tensors = weights()
    PI0Policy.from_pretrained(WRITERS[source](tmp_path / "in", tensors)).save_pretrained(
        tmp_path / "out", layout
    )
    assert torch.equal(load_as_lerobot(tmp_path / "out")[EMBED_TOKENS], tensors[LM_HEAD])


@pytest.mark.parametrize("source", ["openpi", "lerobot_early"])
def test_lerobots_directory_is_complete(tmp_path, monkeypatch, source):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    policy = PI0Policy.from_pretrained(WRITERS[source](tmp_path / "checkpoint", weights()))
    policy.save_pretrained(tmp_path / "out", layout="lerobot")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    known = set(LEROBOT_CONFIG) | {"dtype", "image_resolution"}  # its parser refuses any other key
    assert set(config) == known
    for name in ("policy_preprocessor", "policy_postprocessor"):
        for step in json.loads((tmp_path / "out" / f"{name}.json").read_text())["steps"]:
            if "norm_map" in step["config"]:
                stored = load_file(tmp_path / "out" / step["state_file"])
                assert stored["action.std"].tolist() == STATS["actions"]["std"]
    again = PI0Policy.from_pretrained(tmp_path / "out")
    assert again.config == policy.config
    assert again.norm_stats.state.mean.tolist() == STATS["state"]["mean"]
    assert torch.equal(sampled(again), sampled(policy))


def test_lerobots_directory_of_pi05_spells_the_normalised_state(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    policy = PI0Policy.from_pretrained(write_openpi(tmp_path / "checkpoint", weights(pi05=True)))
    policy.save_pretrained(tmp_path / "out", layout="lerobot")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["type"] == "pi05"
    assert config["normalization_mapping"] == {
        "VISUAL": "IDENTITY",
        "STATE": "QUANTILES",
        "ACTION": "QUANTILES",
    }
    steps = json.loads((tmp_path / "out" / "policy_preprocessor.json").read_text())["steps"]
    # LeRobot: policies/pi05/processor_pi05.py
    assert [step["registry_name"] for step in steps] == [
        "rename_observations_processor", "to_batch_processor", "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor", "device_processor",
    ]  # fmt: skip
    assert (
        load_file(tmp_path / "out" / steps[2]["state_file"])["action.q99"].tolist() == STATS["actions"]["q99"]
    )
    again = PI0Policy.from_pretrained(tmp_path / "out")
    assert again.config == policy.config
    assert torch.equal(sampled(again), sampled(policy))


NAMES = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"]


@pytest.mark.parametrize("pi05", [False, True])
def test_lerobots_relative_actions_are_read_and_written(tmp_path, monkeypatch, pi05):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    directory = write_lerobot(tmp_path / "checkpoint", weights(pi05=pi05))
    edit_config(
        directory,
        type="pi05" if pi05 else "pi0",
        use_relative_actions=True,  # relative_exclude_joints is left at LeRobot's default, the gripper
        action_feature_names=NAMES,
    )
    policy = PI0Policy.from_pretrained(directory)
    assert policy.delta_actions
    plain = PI0Policy.from_pretrained(write_lerobot(tmp_path / "plain", weights()))
    assert not plain.delta_actions
    policy.save_pretrained(tmp_path / "out", layout="lerobot")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["use_relative_actions"], written["action_feature_names"]) == (True, NAMES)
    before, after = (
        json.loads((tmp_path / "out" / f"policy_{name}processor.json").read_text())["steps"]
        for name in ("pre", "post")
    )
    # LeRobot, policies/pi0/processor_pi0.py: the state is subtracted before, and added after, normalisation.
    names = [step["registry_name"] for step in before]
    relative = names.index("relative_actions_processor")
    assert names[relative + 1] == "normalizer_processor"
    assert before[relative]["config"] == {
        "enabled": True,
        "exclude_joints": ["gripper"],
        "action_names": NAMES,
    }
    assert [step["registry_name"] for step in after] == [
        "unnormalizer_processor",
        "absolute_actions_processor",
        "device_processor",
    ]
    assert after[1]["config"] == {"enabled": True}
    again = PI0Policy.from_pretrained(tmp_path / "out")
    assert again.config == policy.config
    assert torch.equal(sampled(again), sampled(policy))


def test_openpis_actions_less_the_state_are_lerobots_relative_actions(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    directory = write_openpi(tmp_path / "checkpoint", weights())
    edit_config(directory, delta_actions=True)
    PI0Policy.from_pretrained(directory).save_pretrained(tmp_path / "out", layout="lerobot")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["use_relative_actions"]
    assert written["relative_exclude_joints"] == ["gripper"]
    assert [name == "gripper" for name in written["action_feature_names"]] == [False] * 6 + [True]
    assert PI0Policy.from_pretrained(tmp_path / "out").delta_actions


def test_actions_found_to_be_less_the_state_are_written_down_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    directory = write_openpi(tmp_path / "checkpoint", weights())
    assert "delta_actions" not in json.loads((directory / "config.json").read_text())
    relative = {
        "state": STATS["state"] | {"mean": [3.0] * 8},
        "actions": STATS["actions"] | {"mean": [-3.0] * 6 + [0.25]},
    }
    write_json(directory / "norm_stats.json", {"norm_stats": relative})
    policy = PI0Policy.from_pretrained(directory)
    assert policy.delta_actions
    states, chunk = torch.full((1, 8), 2.5), torch.ones(1, HORIZON, 32)
    for layout in ("openpi", "lerobot"):
        policy.save_pretrained(tmp_path / layout, layout)
        again = PI0Policy.from_pretrained(tmp_path / layout)
        assert again.delta_actions
        assert torch.equal(
            again.unnormalize_actions(chunk, states), policy.unnormalize_actions(chunk, states)
        )
    # Also for readers that do not look at the statistics.
    content = {
        name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("openpi", "lerobot")
    }
    assert content["openpi"]["delta_actions"] is True
    assert content["lerobot"]["use_relative_actions"] is True
    steps = json.loads((tmp_path / "lerobot" / "policy_preprocessor.json").read_text())["steps"]
    assert "relative_actions_processor" in [step["registry_name"] for step in steps]


ADAPTED = Pi0Config.preset("pi0", gemma=dataclasses.replace(Pi0Config.preset("pi0").gemma, lora_rank=16))


def test_published_sizes_have_lerobots_names():
    config = lerobot_config(Pi0Config.preset("pi0"))
    assert (config["paligemma_variant"], config["action_expert_variant"]) == ("gemma_2b", "gemma_300m")
    assert (config["chunk_size"], config["max_action_dim"], config["tokenizer_max_length"]) == (50, 32, 48)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Pi0Config.preset("pi0_tiny"), "LeRobot cannot hold a convolutional tower"),
        (Pi0Config.preset("pi0", guidance=True), "LeRobot cannot hold an optimality condition"),
        (ADAPTED, "LeRobot cannot hold low-rank additions; .*convert. merges them"),
        (Pi0Config.preset("pi05", discrete_state_input=False), "whose prompt does not spell the state"),
        (Pi0Config.preset("pi05", pad_discrete_state=True), "spells the state's padding"),
        (Pi0Config.preset("pi0", gemma=Pi0Config.preset("pi0").action_expert, tokenizer="tiny"), "'tiny'"),
    ],
)
def test_what_lerobot_has_no_place_for_is_not_written(config, message):
    with pytest.raises(CheckpointError, match=message):
        lerobot_config(config)


@pytest.mark.parametrize("layout", ["jax", "lerobot_early"])
def test_layout_that_is_not_written_is_refused(tmp_path, layout):
    policy = PI0Policy(Pi0Config.preset("pi0_tiny"))
    with pytest.raises(
        CheckpointError, match=f"layout is openpi or lerobot, not '{layout}'; .*not written: choose lerobot"
    ):
        policy.save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_layouts_are_not_mixed_in_one_directory(tmp_path):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    policy = PI0Policy.from_pretrained(directory)
    with pytest.raises(CheckpointError, match="holds a policy of another layout; choose another folder"):
        policy.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    policy.save_pretrained(directory, layout="lerobot")
    assert (directory / "model.safetensors").read_bytes() == before["model.safetensors"]


# Memory

MEASURE = """
import sys, torch
from pi0 import PI0Policy

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

PI0Policy.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # everything is imported
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = status("VmRSS")
policy = PI0Policy.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
weights = sum(p.numel() * p.element_size() for p in policy.network.parameters())
print((status("VmHWM") - before) / weights, weights / 1e6)
"""


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_loading_takes_a_tenth_more_memory_than_the_weights(tmp_path):
    small = write_openpi(tmp_path / "small", weights())
    large = write_openpi(tmp_path / "large", weights(width=768, mlp=6144, vocab=20_000))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ratio, megabytes = map(float, run.stdout.split())
    assert 80 < megabytes < 100  # half of it in float32
    assert 0.95 < ratio < 1.1


# inspect and convert


def inspected(directory: Path, capsys, *options: str) -> tuple[int, str]:
    status = main(["inspect", str(directory), *options])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("openpi", ["openpi PyTorch", "assets/physical-intelligence/libero/norm_stats.json"]),
        ("lerobot", ["LeRobot: names like model.", "processor files", LM_HEAD]),
        ("lerobot_early", ["LeRobot of the first half of 2025", "without quantiles; found: buffers"]),
    ],
)
def test_inspect_says_what_a_checkpoint_is(tmp_path, capsys, name, says):
    status, text = inspected(WRITERS[name](tmp_path / "checkpoint", weights()), capsys)
    assert status == 0
    for part in (
        *says,
        "pi0: a model with a SigLIP tower (2 layers, width 72)",
        EXPERT_HEAD,
        "chunks of 6 actions",
    ):
        assert part in text
    assert re.search(r"^fits +all \d+ tensors", text, re.MULTILINE)


def test_inspect_takes_the_file_too(tmp_path, capsys):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    assert inspected(directory / "model.safetensors", capsys) == inspected(directory, capsys)


def test_inspect_and_convert_take_other_statistics(tmp_path, capsys):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    (directory / "assets" / "droid").mkdir()
    write_json(directory / "assets" / "droid" / "norm_stats.json", {"norm_stats": STATS})
    status, text = inspected(directory, capsys)
    assert status == 1
    assert "name one as norm_stats_path" in text
    named = directory / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    options = ["--norm_stats_path", str(named)]
    status, text = inspected(directory, capsys, *options)
    assert status == 0
    assert f"with quantiles; found: {named}" in text
    assert main(["convert", str(directory), str(tmp_path / "out"), *options]) == 0
    assert json.loads((tmp_path / "out" / "norm_stats.json").read_text()) == {"norm_stats": STATS}


def test_inspect_lists_what_is_missing(tmp_path, capsys):
    tensors = weights()
    del tensors["action_out_proj.bias"]
    status, text = inspected(write_openpi(tmp_path / "checkpoint", tensors), capsys)
    assert status == 1
    assert re.search(r"^STOP .*does not fit.*\n +1 missing:\n +action_out_proj\.bias$", text, re.MULTILINE)


def test_inspect_recognises_pi05(tmp_path, capsys):
    _, text = inspected(write_openpi(tmp_path / "checkpoint", weights(pi05=True)), capsys)
    assert "pi0.5: a model with a SigLIP tower" in text
    assert "an action expert (2 layers, width 32)" in text
    assert "adaptive norms and time embedding of pi0.5" in text
    assert f"{len(shapes(pi05=True))} tensors" in text


@pytest.mark.runs
@pytest.mark.tried("Files that are no policy, or broken ones", "`inspect` says what they are; exit status 1")
def test_inspect_says_what_a_broken_file_is(tmp_path):
    directory = write_openpi(tmp_path / "checkpoint", weights())
    (directory / "model.safetensors").write_bytes(b"no weights at all")
    run = subprocess.run(
        [sys.executable, "-m", "pi0.checkpoint", "inspect", directory],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "model.safetensors (17 bytes) is truncated or not a safetensors file" in run.stderr
    assert "Traceback" not in run.stderr


def test_convert_writes_another_layout(tmp_path, capsys):
    directory = write_lerobot(tmp_path / "checkpoint", weights())
    assert main(["convert", str(directory), str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert LM_HEAD in file.keys()  # noqa: SIM118
    assert torch.equal(
        sampled(PI0Policy.from_pretrained(tmp_path / "out")), sampled(PI0Policy.from_pretrained(directory))
    )
    with pytest.raises(InputError, match="already holds a model.safetensors"):
        main(["convert", str(directory), str(tmp_path / "out")])


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_convert_merges_low_rank_additions(tmp_path, monkeypatch, capsys, layout):
    monkeypatch.setattr("pi0.policy.lerobot_files._variant", lambda dims, name: "gemma_2b")
    adapted = PI0Policy.from_pretrained(write_openpi(tmp_path / "published", weights()))
    plain = sampled(adapted)
    adapted.choose_trained("lora")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.network.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.3, generator=g)
    adapted.save_pretrained(tmp_path / "policy")
    # A run continues from its policy folder, so the additions stay apart there.
    assert any(name.endswith("lora_b") for name in load_file(tmp_path / "policy" / "model.safetensors"))

    assert main(["convert", str(tmp_path / "policy"), str(tmp_path / "out"), "--layout", layout]) == 0
    assert "low-rank additions (rank 16 and 32) are merged into the weights" in capsys.readouterr().out
    loaded = (load_as_openpi if layout == "openpi" else load_as_lerobot)(tmp_path / "out")
    changed = {name for name, tensor in weights().items() if not torch.equal(loaded[name], tensor)}
    assert changed
    assert all(".layers." in name and name.endswith("_proj.weight") for name in changed)
    converted = PI0Policy.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(sampled(converted), sampled(adapted), rtol=0, atol=1e-4)
    assert (sampled(adapted) - plain).abs().max() > 0.01
    assert converted.config.gemma.lora_rank == 0


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_convert_refuses_guidance(tmp_path, layout):
    policy = PI0Policy.from_pretrained(write_openpi(tmp_path / "published", weights()))
    policy.enable_guidance()
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="guidance is true; openpi and LeRobot have no place") as error:
        main(["convert", str(tmp_path / "policy"), str(tmp_path / "out"), "--layout", layout])
    assert str(tmp_path / "policy" / "config.json") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_convert_says_what_openpi_does_not_load(tmp_path, capsys):
    PI0Policy(Pi0Config.preset("pi0_tiny")).save_pretrained(tmp_path / "policy")
    assert main(["convert", str(tmp_path / "policy"), str(tmp_path / "out")]) == 0
    assert "convolutional tower has no place in openpi's model" in capsys.readouterr().out


# Practice


@pytest.mark.runs
def test_stage_13_practises_with_a_published_checkpoint_and_saves_it_in_its_own_layout(tmp_path):
    """Random weights solve nothing, so nothing is learned here; that the loss has the right gradient is shown elsewhere."""
    directory = write_openpi(tmp_path / "checkpoint", weights(vocab=384))
    edit_config(directory, tokenizer="tiny", prompt_length=32)  # PaliGemma's tokenizer cannot be had here
    overrides = [
        f"policy_path={directory}", "training.num_train_steps=1", "training.trainable=lora", "dtype=bfloat16",
        "task.replan_steps=5", "evaluation.periodic_episodes=0",
    ]  # fmt: skip
    output = finish(start(tmp_path / "runs", *SHORT, *overrides))
    assert "0 of 4 solved, nothing to learn from" in output
    saved = PI0Policy.from_pretrained(run_of(tmp_path / "runs") / "policy")
    original = PI0Policy.from_pretrained(directory, dtype=torch.bfloat16, trainable="lora")
    ours, theirs = saved.network.state_dict(), original.network.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert is_lora(name) or torch.equal(ours[name], theirs[name]), name
    assert saved.norm_stats.actions.mean.tolist() == STATS["actions"]["mean"]
