"""What of a policy is trained: low-rank adaptation, the expert alone, never what no output depends on."""

import dataclasses
import random
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pi0 import PI0Policy
from pi0.base.errors import CheckpointError
from pi0.model.config import GemmaDims, Pi0Config, SiglipDims
from pi0.model.lora import LoRALinear, is_lora
from pi0.model.network import AdaptiveRMSNorm, Pi0Network
from pi0.policy.pi0_policy import _without_start_values
from pi0.training.ema import AveragedModule
from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.random_state import GlobalStreams, OwnStream
from pi0.training.saved_policy import SavedPolicy
from pi0.training.settings import OptimizerConfig
from pi0.training.state import States, TrainingState, Weights
from tests.support.networks import chunks_of, inputs_of


def policy(pi05: bool = False, **changes) -> PI0Policy:
    dims = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = Pi0Config(
        vision=SiglipDims(width=8, depth=1, mlp_dim=12, num_heads=2, patch_size=8, image_size=16),
        gemma=GemmaDims(width=16, mlp_dim=24, **dims),
        action_expert=GemmaDims(width=12, mlp_dim=20, **dims),
        vocab_size=32,
        action_dim=8,
        action_horizon=4,
        prompt_length=6,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        tokenizer="tiny",
        pi05=pi05,
    )
    torch.manual_seed(0)
    made = PI0Policy(dataclasses.replace(config, **changes)).double()
    # In a new pi0.5 all gates are closed; where they are frozen, too, nothing behind them could learn.
    for module in made.modules():
        if isinstance(module, AdaptiveRMSNorm):
            torch.nn.init.normal_(module.dense.weight, std=0.3)
            torch.nn.init.normal_(module.dense.bias, std=0.3)
    return made


def with_lora(pi05: bool = False, learned: bool = True) -> PI0Policy:
    adapted = policy(pi05)
    adapted.enable_lora(gemma_rank=3, expert_rank=5)
    if learned:
        for name, parameter in adapted.network.named_parameters():
            if is_lora(name):
                torch.nn.init.normal_(parameter, std=0.3)
    return adapted


def trained(policy: PI0Policy) -> set[str]:
    return {name for name, parameter in policy.network.named_parameters() if parameter.requires_grad}


def parts(names: set[str]) -> set[str]:
    """First parts of parameter names."""
    return {name.split(".")[0] for name in names}


def seen_by(policy: PI0Policy) -> dict:
    """Inputs of a policy in the type of its flow head."""
    dtype, inputs = policy.network.action_in_proj.weight.dtype, inputs_of(policy)
    images = {name: image.to(dtype) for name, image in inputs["images"].items()}
    return {**inputs, "images": images, "state": inputs["state"].to(dtype)}


def chunks_for(policy: PI0Policy) -> torch.Tensor:
    return chunks_of(policy, 2).to(policy.network.action_in_proj.weight.dtype)


def sampled(policy: PI0Policy) -> torch.Tensor:
    return policy.sample_actions(**seen_by(policy), noise=chunks_for(policy))


def one_loss(policy: torch.nn.Module, of: PI0Policy) -> torch.Tensor:
    # Drawn in float64, so that policies of all types get the same.
    noise, time = of.draw_noise_and_time(chunks_of(of, 2), generator=torch.Generator().manual_seed(0))
    actions = chunks_for(of)
    return policy(**seen_by(of), actions=actions, noise=noise.to(actions), time=time.to(actions)).mean()


PARTS = ["without_vision", "expert", "lora"]


def loaded_in(dtype: torch.dtype, folder: Path, what: str, pi05: bool = False, **changes) -> PI0Policy:
    """A policy from its file, that trains what is asked for."""
    policy(pi05, **changes).float().save_pretrained(folder)
    return PI0Policy.from_pretrained(folder, dtype=dtype, trainable=what)


def types(policy: PI0Policy) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in policy.network.named_parameters()}


def test_low_rank_adaptation_starts_without_effect():
    before = sampled(policy())
    assert torch.equal(sampled(with_lora(learned=False)), before)
    assert not torch.allclose(sampled(with_lora()), before)


def test_low_rank_adaptation_is_a_sum_of_matrices():
    linear = torch.nn.Linear(2, 2, bias=False)
    adapted = LoRALinear(linear, 1)
    with torch.no_grad():
        adapted.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        adapted.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        adapted.lora_b.copy_(torch.tensor([[10.0], [100.0]]))
    assert adapted(torch.tensor([3.0, 5.0])).tolist() == [3 + 10 * -2, 10 + 100 * -2]
    assert adapted.merged().weight.tolist() == [[11.0, -10.0], [100.0, -98.0]]


def test_default_ranks_are_openpis():
    preset = Pi0Config.preset("pi0")
    one_layer = {
        "gemma": dataclasses.replace(preset.gemma, depth=1),
        "action_expert": dataclasses.replace(preset.action_expert, depth=1),
        "vision": dataclasses.replace(preset.vision, depth=1),
    }
    with torch.device("meta"), _without_start_values():
        big = PI0Policy(dataclasses.replace(preset, **one_layer))
        big.enable_lora()
    layer, expert = big.network.gemma.layers[0], big.network.expert.layers[0]
    assert layer.mlp["gate_proj"].lora_a.shape == (16, 2048)
    assert layer.mlp["gate_proj"].lora_b.shape == (16384, 16)
    assert expert.self_attn["q_proj"].lora_a.shape == (32, 1024)
    assert expert.self_attn["q_proj"].lora_b.shape == (2048, 32)
    adapted = {name.rsplit(".", 2)[-2] for name in trained(big) if is_lora(name)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("pi05", [False, True])
def test_low_rank_adaptation_freezes_its_transformers_and_not_the_tower(pi05):
    names = trained(with_lora(pi05))
    assert {n for n in names if n.startswith(("gemma.", "expert."))} == {
        n for n in names if n.startswith(("gemma.", "expert.")) and is_lora(n)
    }
    projections = {"state_proj", "action_time_mlp_in", "action_time_mlp_out"}
    projections = {"time_mlp_in", "time_mlp_out"} if pi05 else projections
    expected = {"vision", "projector", "gemma", "expert", "action_in_proj", "action_out_proj"} | projections
    assert parts(names) == expected


def test_one_transformer_alone_can_be_adapted():
    adapted = policy()
    adapted.enable_lora(gemma_rank=3, expert_rank=0)
    names = trained(adapted)
    assert "expert.layers.0.self_attn.q_proj.weight" in names
    assert "gemma.layers.0.self_attn.q_proj.weight" not in names
    assert "gemma.layers.0.self_attn.q_proj.lora_b" in names


def test_expert_only_trains_no_eye_and_no_reader():
    expert_only = policy(train_expert_only=True)
    assert parts(trained(expert_only)) == {
        "expert", "state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out",
        "action_out_proj",
    }  # fmt: skip
    adapted = policy(train_expert_only=True)
    adapted.enable_lora(gemma_rank=0, expert_rank=2)
    assert not [n for n in trained(adapted) if n.startswith("expert.") and not is_lora(n)]


def test_vision_encoder_can_be_frozen():
    names = trained(policy(freeze_vision_encoder=True))
    assert not [name for name in names if name.startswith("vision.")]
    assert {"projector", "gemma", "token_embedding"} <= parts(names)


def test_what_is_trained_can_be_chosen_later_and_goes_into_the_checkpoint(tmp_path):
    later = policy().float()
    everything = trained(later)
    later.freeze(all_but_expert=True)
    assert trained(later) == trained(policy(train_expert_only=True))
    later.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path)
    assert trained(loaded) == trained(later)
    loaded.freeze(vision_encoder=True)
    assert trained(loaded) == trained(policy(freeze_vision_encoder=True))
    loaded.freeze()
    assert trained(loaded) == everything


@pytest.mark.parametrize("before", ["all", "expert", "lora"])
def test_what_is_trained_is_chosen_by_name_whatever_it_was_before(before):
    chosen = policy()
    chosen.choose_trained(before)
    names = trained(chosen)
    chosen.choose_trained("as_saved")
    assert trained(chosen) == names
    chosen.choose_trained("without_vision")
    assert trained(chosen) == trained(policy(freeze_vision_encoder=True))
    chosen.choose_trained("expert")
    assert trained(chosen) == trained(policy(train_expert_only=True))
    chosen.choose_trained("lora")
    assert trained(chosen) == trained(with_lora())
    chosen.choose_trained("all")
    assert trained(chosen) == trained(policy())


def test_copies_share_what_is_not_trained():
    original = policy()
    original.choose_trained("lora")
    other = original.copy()
    pairs = zip(original.named_parameters(), other.parameters(), strict=True)
    own = {name.removeprefix("network.") for (name, ours), theirs in pairs if ours is not theirs}
    assert own == trained(original)
    assert trained(other) == trained(original)
    assert torch.equal(sampled(other), sampled(original))


def test_average_follows_what_is_trained_and_leaves_the_rest():
    follower = policy()
    follower.choose_trained("lora")
    average = AveragedModule(follower, follower.copy(), decay=0.75)
    before = {name: p.clone() for name, p in follower.named_parameters()}
    with torch.no_grad():
        for parameter in follower.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    average.update()
    for name, parameter in average.module.named_parameters():
        moved = 0.25 if name.removeprefix("network.") in trained(follower) else 0.0
        torch.testing.assert_close(parameter, before[name] + moved, rtol=0, atol=1e-12)


@dataclasses.dataclass
class Run:
    """A run with low-rank adaptation that has learned something, and its state."""

    policy: PI0Policy
    average: PI0Policy
    generator: torch.Generator
    state: TrainingState

    def write(self, folder: Path) -> None:
        self.state.begin()
        self.state.write(folder, 0, 1)

    def read(self, folder: Path) -> None:
        self.state.read(folder, 0, 1)


def run_of(learner: PI0Policy, seed: int) -> Run:
    learner.choose_trained("lora")
    torch.manual_seed(seed)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    optimizer = make_optimizer(learner, 1e-3, OptimizerConfig())
    schedule = make_schedule(optimizer, 1.0, 2)
    run = Run(learner, learner.copy(), torch.Generator(), TrainingState())
    run.state.shared = {
        "policy": SavedPolicy(run.average, run.policy),
        "training": Weights(learner.network, "resume with the same training.trainable"),
        "optimizer": States(optimizer=optimizer, schedule=schedule),
    }
    run.state.own = {"generator": OwnStream(run.generator, seed), "random": GlobalStreams()}
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_of_a_run_holds_what_is_trained_alone(tmp_path, dtype):
    written, read = (run_of(loaded_in(dtype, tmp_path / "start", "as_saved"), seed) for seed in (1, 2))
    written.write(tmp_path)
    assert load_file(tmp_path / "training.safetensors").keys() == trained(written.policy)
    read.read(tmp_path)
    assert types(read.policy) == types(read.average) == types(written.policy)
    assert save(read.policy.network.state_dict()) == save(written.policy.network.state_dict())
    assert save(read.average.network.state_dict()) == save(written.policy.network.state_dict())
    read.policy.choose_trained("all")
    with pytest.raises(CheckpointError, match=r"training\.trainable"):
        read.read(tmp_path)


def test_a_resumed_run_continues_with_the_random_numbers_that_come_next(tmp_path):
    run = run_of(loaded_in(torch.float32, tmp_path / "start", "as_saved"), 1)

    def draw() -> tuple:
        own = torch.rand(3, generator=run.generator).tolist()
        return random.random(), np.random.random(), torch.rand(3).tolist(), own

    run.write(tmp_path)
    expected = draw()
    assert draw() != expected
    run.read(tmp_path)
    assert draw() == expected


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that meanwhile takes memory of its own."""

    size = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if result.untyped_storage().data_ptr() not in storages:
                self.size = max(self.size, result.nbytes)
        return result


def test_a_run_is_read_without_another_policy_beside_it(tmp_path):
    # Nearly all of this policy is its token embedding, which is frozen.
    run = run_of(loaded_in(torch.bfloat16, tmp_path / "start", "as_saved", vocab_size=5000), 1)
    run.write(tmp_path)
    with LargestTensor() as largest:
        run.read(tmp_path)
    assert largest.size < run.policy.network.token_embedding.weight.nbytes / 10


@pytest.mark.runs
@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler and Python's headers (apt-get install g++ python3.11-dev)",
)
def test_compiled_policy_does_the_same_with_adaptation_and_checkpointed_gradients_too():
    eager = with_lora()
    compiled = eager.copy()
    compiled.compiled = True
    torch.testing.assert_close(sampled(compiled), sampled(eager), rtol=0, atol=1e-6)
    compiled.network.checkpoint_gradients()
    gradients = []
    for each in (eager, compiled.copy()):
        one_loss(each, each).mean().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_contradicting_choices_are_refused():
    with pytest.raises(ValueError, match="choose one"):
        policy(train_expert_only=True).enable_lora()


def test_adaptation_is_not_put_on_adaptation():
    adapted = with_lora()
    with pytest.raises(ValueError, match="already"):
        adapted.enable_lora()
    adapted.merge_lora()
    adapted.enable_lora(gemma_rank=2, expert_rank=2)
    assert adapted.network.expert.layers[0].mlp["up_proj"].lora_a.shape == (2, 12)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("way", ["full", "lora", "expert", "no_vision"])
def test_ddp_trains_every_parameter_that_asks_for_it(one_rank, way, pi05):
    # DDP fails at the second pass if a parameter that asks for a gradient got none in the first.
    flags = {"expert": {"train_expert_only": True}, "no_vision": {"freeze_vision_encoder": True}}
    trainee = with_lora(pi05) if way == "lora" else policy(pi05, **flags.get(way, {}))
    wrapped = DistributedDataParallel(trainee)
    optimizer = make_optimizer(trainee, 1e-3, OptimizerConfig())
    before = {name: p.clone() for name, p in trainee.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        one_loss(wrapped, trainee).backward()
        optimizer.step()
    moved = {name for name, p in trainee.named_parameters() if not torch.equal(p, before[name])}
    asked = {name for name, p in trainee.named_parameters() if p.requires_grad}
    assert moved <= asked
    # A bias of attention's keys shifts all scores alike, and rows of the embedding that no prompt holds stay.
    assert asked - moved <= {n for n in asked if n.endswith("k_proj.bias")}


def test_frozen_prefix_keeps_nothing_for_a_backward_pass():
    expert_only = policy(train_expert_only=True)
    inputs = inputs_of(expert_only)
    prefix = expert_only.network.encode_prefix(
        inputs["images"], inputs["image_masks"], inputs["tokenized_prompt"], inputs["tokenized_prompt_mask"]
    )
    assert not any(key.requires_grad for key in prefix.keys)


@pytest.mark.parametrize("pi05", [False, True])
def test_merged_policy_acts_the_same_and_has_the_published_tensors(pi05):
    adapted = with_lora(pi05)
    expected = sampled(adapted)
    adapted.merge_lora()
    torch.testing.assert_close(sampled(adapted), expected, rtol=0, atol=1e-12)
    plain = policy(pi05)
    assert list(adapted.network.state_dict()) == list(plain.network.state_dict())
    assert trained(adapted) == trained(plain)
    assert adapted.config == plain.config


def test_adapted_policy_comes_back_from_its_checkpoint(tmp_path):
    adapted = with_lora().float()
    adapted.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path)
    assert loaded.config == adapted.config
    assert save(loaded.network.state_dict()) == save(adapted.network.state_dict())
    assert trained(loaded) == trained(adapted)
    names = load_file(tmp_path / "model.safetensors")
    assert "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.lora_a" in names


def test_frozen_weights_in_bfloat16_are_adapted_in_float32(tmp_path):
    with_lora().float().save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    q = loaded.network.expert.layers[0].self_attn["q_proj"]
    assert (q.weight.dtype, q.lora_a.dtype, q.lora_b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(sampled(loaded), sampled(with_lora()).float(), rtol=0, atol=0.2)


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("what", PARTS)
def test_what_is_trained_is_float32_beside_frozen_bfloat16(tmp_path, what, pi05):
    whole = loaded_in(torch.bfloat16, tmp_path, "all", pi05)
    low = {name for name, dtype in types(whole).items() if dtype == torch.bfloat16}
    assert parts(low) == {"vision", "projector", "token_embedding", "gemma", "expert"}
    chosen = loaded_in(torch.bfloat16, tmp_path, what, pi05)
    expected = {
        name: torch.bfloat16 if name in low - trained(chosen) else torch.float32 for name in types(chosen)
    }
    assert types(chosen) == expected
    assert torch.bfloat16 in expected.values()
    assert types(chosen.copy()) == expected
    chosen.choose_trained("all")
    assert types(chosen) == types(whole)


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("what", PARTS)
def test_what_is_trained_starts_from_what_the_file_holds(tmp_path, what, pi05):
    policy(pi05).float().save_pretrained(tmp_path)
    file = dict(PI0Policy.from_pretrained(tmp_path).network.named_parameters())
    chosen = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16, trainable=what)
    for name in trained(chosen) & file.keys():
        assert torch.equal(chosen.network.get_parameter(name), file[name])
    later = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    later.choose_trained(what)
    assert types(later) == types(chosen)
    assert trained(later) == trained(chosen)


def test_where_nothing_is_trained_nothing_is_kept_in_float32_for_it(tmp_path):
    whole = loaded_in(torch.bfloat16, tmp_path, "all", train_expert_only=True)
    still = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16, trainable="none")
    assert types(still) == types(whole)
    assert not trained(still)
    assert still.config.train_expert_only


@pytest.mark.parametrize("what", ["none", "all", "expert", "as_saved"])
def test_memory_of_the_weights_is_known_before_they_are_loaded(tmp_path, what):
    loaded = loaded_in(torch.bfloat16, tmp_path, what, train_expert_only=True)
    expected = sum(parameter.nbytes for parameter in loaded.network.parameters())
    assert PI0Policy.bytes_of_weights(tmp_path, torch.bfloat16, trainable=what) == expected


def test_an_unknown_part_to_train_is_refused(tmp_path):
    policy().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trainable cannot be 'expret'; choose one of all, .*expert"):
        PI0Policy.from_pretrained(tmp_path, trainable="expret")


@pytest.mark.parametrize("what", PARTS)
def test_partly_trained_policy_comes_back_with_its_types_and_bits(tmp_path, what):
    chosen = loaded_in(torch.bfloat16, tmp_path / "before", what)
    for parameter in chosen.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-5 * torch.randn_like(parameter)
    chosen.save_pretrained(tmp_path / "after")
    for again in (what, "as_saved"):
        loaded = PI0Policy.from_pretrained(tmp_path / "after", dtype=torch.bfloat16, trainable=again)
        assert trained(loaded) == trained(chosen)
        assert save(loaded.network.state_dict()) == save(chosen.network.state_dict())


@pytest.mark.parametrize("what", PARTS)
def test_small_steps_reach_what_is_trained_and_its_average(tmp_path, what):
    learner = loaded_in(torch.bfloat16, tmp_path, what)
    weights = {
        "lora": learner.network.vision.encoder["layers"][0].mlp["fc1"].weight,
        "expert": learner.network.expert.layers[0].mlp["up_proj"].weight,
        "without_vision": learner.network.projector.weight,
    }[what]
    with torch.no_grad():
        weights.copy_(0.1 * weights.sign())
    average = AveragedModule(learner, learner.copy(), decay=0.99)
    before, name = weights.clone(), {id(p): name for name, p in learner.named_parameters()}[id(weights)]
    one_loss(learner, learner).backward()
    make_optimizer(learner, 5e-5, OptimizerConfig(weight_decay=0.0)).step()
    average.update()
    step = (weights - before).abs()
    torch.testing.assert_close(step, torch.full_like(step, 5e-5), rtol=0.05, atol=0)  # Adam's first is lr
    averaged = (average.module.get_parameter(name) - before).abs()
    torch.testing.assert_close(averaged, 0.01 * step, rtol=0.05, atol=0)


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("what", [*PARTS, "all"])
def test_loss_and_gradients_in_mixed_types_stay_near_those_in_float32(tmp_path, what, pi05):
    exact, mixed = (
        loaded_in(dtype, tmp_path / str(dtype), what, pi05) for dtype in (torch.float32, torch.bfloat16)
    )
    losses = [one_loss(each, each) for each in (exact, mixed)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    for loss in losses:
        loss.backward()
    gradients = [
        torch.cat([p.grad.flatten().float() for p in each.parameters() if p.requires_grad])
        for each in (exact, mixed)
    ]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):  # training.use_mixed_precision
        assert one_loss(mixed, mixed).item() == pytest.approx(losses[0].item(), rel=0.02)


@pytest.mark.parametrize("pi05", [False, True])
def test_autocast_leaves_in_float32_what_openpi_computes_so(pi05):
    learner = policy(pi05).float()
    seen = {}
    for name, module in learner.network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        one_loss(learner, learner)
    exact = {name for name, dtype in seen.items() if dtype == torch.float32}
    flow = (
        ["time_mlp_in", "time_mlp_out"]
        if pi05
        else ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
    )
    norms = {name for name in seen if name.startswith("expert") and name.endswith(".dense")}
    assert exact == {"vision.embeddings.patch_embedding", "action_in_proj", "action_out_proj", *flow} | norms
    assert bool(norms) == pi05
    assert torch.bfloat16 in seen.values()


@pytest.mark.parametrize("what", PARTS)
def test_prefix_of_a_single_layer_meets_an_expert_of_another_type(tmp_path, what):
    # Of the prefix's only layer no more than keys and values are used, and trained.
    one_layer = {
        part: dataclasses.replace(getattr(policy().config, part), depth=1)
        for part in ("gemma", "action_expert")
    }
    exact, mixed = (
        loaded_in(dtype, tmp_path / str(dtype), what, **one_layer)
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(sampled(mixed), sampled(exact), rtol=0, atol=0.2)


def test_one_adapted_transformer_meets_another_that_is_trained_whole(tmp_path):
    policy().float().save_pretrained(tmp_path)
    for ranks in ((3, 0), (0, 5)):
        mixed = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
        mixed.enable_lora(*ranks)
        torch.testing.assert_close(sampled(mixed), sampled(policy()).float(), rtol=0, atol=0.2)


def test_what_low_rank_additions_have_learned_is_not_rounded_where_it_is_trained_on(tmp_path):
    with_lora().float().save_pretrained(tmp_path)
    adapted = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    linear = adapted.network.expert.layers[0].mlp["up_proj"]
    expected = linear.weight.float() + linear.lora_b @ linear.lora_a
    projector = adapted.network.projector.weight.clone()
    adapted.choose_trained("without_vision")
    assert torch.equal(adapted.network.expert.layers[0].mlp["up_proj"].weight, expected)
    assert torch.equal(adapted.network.projector.weight, projector)


def test_plain_network_has_no_trace_of_adaptation():
    assert not [
        name for name, _ in Pi0Network(Pi0Config.preset("pi0_tiny")).named_parameters() if is_lora(name)
    ]
