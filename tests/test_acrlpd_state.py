"""The state of an ACRLPD agent: its checkpoints, what of it is found to be wrong, its memory, its actor for openpi."""

import copy
import gc
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from pi0 import PI0Policy
from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader
from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent
from pi0.acrlpd.actor import Pi0Actor
from pi0.acrlpd.checkpointing import (
    check_agent,
    create_checkpoint_metadata,
    load_acrlpd_checkpoint,
    load_pi0_weights_from_openpi,
    save_acrlpd_checkpoint,
    save_openpi_pi0_checkpoint,
    validate_checkpoint_compatibility,
)
from pi0.acrlpd.config import get_config
from pi0.acrlpd.critic_networks import CriticNetworks, ObservationFeatures
from pi0.acrlpd.episodes import of_demonstration
from pi0.acrlpd.memory_monitor import GPUMemoryMonitor, enable_memory_monitoring, log_memory_usage
from pi0.acrlpd.pytree_checker import (
    NOTE,
    check_optimizer_consistency,
    check_pytree_leaf_dtypes,
    compare_pytree_structures,
    diagnose_pytree_structure,
    leaves,
    require_sound,
    validate_fsdp_compatibility,
)
from pi0.acrlpd.train import unified_training_interface
from pi0.acrlpd.trainer import ACRLPDTrainer
from pi0.base.errors import CheckpointError
from pi0.base.paths import REPO_ROOT
from pi0.checkpoint import FITS, inspect_checkpoint
from pi0.evaluate import main as evaluate_command
from pi0.training.checkpoint_store import CheckpointStore, load_state, save_state
from pi0.training.interrupts import Interrupts
from pi0.training.memory import bytes_held
from pi0.training.optimizer import make_optimizer
from pi0.training.settings import OptimizerConfig
from tests.support.networks import random_actions, random_inputs
from tests.support.published_files import weights as published_weights
from tests.support.published_files import write_lerobot, write_openpi
from tests.support.recordings import make_demonstration
from tests.support.small_actor import CHUNK, REAL, STATE, SmallActor, StateFeatures, made_batch, make_agent

TINY = REPO_ROOT / "checkpoints/pi0_tiny_libero_spatial"
HORIZON = 10


class LearnedFeatures(nn.Module):
    """Features that are trained with the critics."""

    width = STATE

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(STATE, STATE)

    def forward(self, observations):
        return self.layer(observations["state"])


def agent_of(policy: PI0Policy, seed: int = 0) -> ACRLPDPi0Agent:
    """Small critics over the features of a pi0, with a learned temperature."""
    torch.manual_seed(seed)
    actor = Pi0Actor(policy)
    features = ObservationFeatures(actor)
    critics = CriticNetworks(features.width, policy.config.action_dim, HORIZON, 7, hidden=16, layers=2)
    log_temperature = nn.Parameter(torch.tensor(0.1).log())
    return ACRLPDPi0Agent(
        actor,
        critics,
        features,
        2,
        HORIZON,
        7,
        pi0_opt_state=make_optimizer(policy, 1e-4, OptimizerConfig()),
        critic_opt_state=torch.optim.Adam(critics.parameters(), 1e-3),
        temp_opt_state=torch.optim.Adam([log_temperature], 1e-2),
        log_temperature=log_temperature,
        seed=seed,
    )


def loader_of(agent: ACRLPDPi0Agent, seeds: range = range(3), seed: int = 3) -> ACRLPDDataLoader:
    loader = ACRLPDDataLoader(agent.pi0_model.policy, agent.features.network, 100, seed)
    loader.add([of_demonstration(make_demonstration(24, each), HORIZON, "made") for each in seeds])
    return loader


def state_of(agent: ACRLPDPi0Agent) -> dict:
    """All that an agent's next step depends on, as leaves by path."""
    tree = {
        "actor": agent.pi0_model.state_dict(),
        "actor_average": agent.pi0_ema.state_dict(),
        "critics": agent.critic_networks.state_dict(),
        "critics_average": agent.critic_ema.state_dict(),
        "targets": agent.target_critic.state_dict(),
        "features": agent.features.state_dict(),
        "temperature": agent.log_temperature,
        "noise": agent.generator.get_state(),
        "optimizers": [
            each.state_dict()
            for each in (agent.pi0_opt_state, agent.critic_opt_state, agent.temp_opt_state)
            if each is not None
        ],
    }
    return dict(leaves(tree))


def assert_same_state(first: ACRLPDPi0Agent, second: ACRLPDPi0Agent) -> None:
    one, other = state_of(first), state_of(second)
    assert one.keys() == other.keys()
    assert [path for path in one if not equal(one[path], other[path])] == []


def equal(first, second) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def altered(checkpoint: Path, folder: Path, change) -> Path:
    """A checkpoint with other files that verifies."""
    store = CheckpointStore(folder, keep=1)
    written = store.begin(3)
    for file in checkpoint.iterdir():
        (written / file.name).write_bytes(file.read_bytes())
    change(written)
    return store.seal(3, facts=CheckpointStore(checkpoint.parent, keep=1).facts(checkpoint))


# Checkpoints


@pytest.mark.parametrize("learned", [False, True])
def test_a_loaded_agent_goes_on_to_the_bit(tmp_path, learned):
    agent = make_agent(learned_temperature=learned)
    for seed in range(3):
        agent.train_step(made_batch(seed))
    path = save_acrlpd_checkpoint(tmp_path, agent, step=3, epoch=1)
    loaded = make_agent(seed=9, learned_temperature=learned)
    metadata = load_acrlpd_checkpoint(path, loaded)
    assert (path.name, metadata["step"], metadata["epoch"]) == ("step-000003", 3, 1)
    assert_same_state(agent, loaded)
    for seed in range(3, 5):
        assert agent.train_step(made_batch(seed))[1] == loaded.train_step(made_batch(seed))[1]
    assert_same_state(agent, loaded)


def test_an_agent_of_pi0_and_its_data_go_on_to_the_bit(tmp_path):
    torch.set_num_threads(1)
    agent = agent_of(PI0Policy.from_pretrained(TINY, trainable="all"))
    loader = loader_of(agent)
    loader.caches.refresh(loader.replay, agent.sample)
    agent.critic_step(loader.sample_batch(4, images=False))
    agent.train_step(loader.sample_batch(4))
    path = save_acrlpd_checkpoint(tmp_path, agent, loader, step=1)
    other = agent_of(PI0Policy.from_pretrained(TINY, trainable="all"), seed=9)
    others_loader = loader_of(other, range(4, 6), seed=8)
    load_acrlpd_checkpoint(path, other, others_loader)
    assert torch.equal(loader.caches.candidates, others_loader.caches.candidates)
    for images in (False, True):
        batches = [each.sample_batch(4, images) for each in (loader, others_loader)]
        one, same = (dict(leaves(batch)) for batch in batches)
        assert one.keys() == same.keys() and all(equal(one[name], same[name]) for name in one)
        steps = [
            each.train_step(batch)[1] if images else each.critic_step(batch)
            for each, batch in zip((agent, other), batches, strict=True)
        ]
        assert steps[0] == steps[1]
    assert_same_state(agent, other)


def test_features_that_are_trained_are_saved_with_their_moments(tmp_path):
    agents = []
    for seed in range(2):
        agent = make_agent(seed=seed)
        agent.features = LearnedFeatures()
        weights = [*agent.critic_networks.parameters(), *agent.features.parameters()]
        agent.critic_opt_state = torch.optim.Adam(weights, 1e-3)
        agents.append(agent)
    agents[0].train_step(made_batch())
    load_acrlpd_checkpoint(save_acrlpd_checkpoint(tmp_path, agents[0]), agents[1])
    assert_same_state(*agents)


def other_critics() -> ACRLPDPi0Agent:
    agent = make_agent()
    critics = CriticNetworks(STATE, STATE, CHUNK, REAL, critics=2, hidden=16, layers=2)
    optimizers = [agent.pi0_opt_state, torch.optim.Adam(critics.parameters(), 1e-3)]
    return ACRLPDPi0Agent(
        agent.pi0_model, critics, StateFeatures(), 5, CHUNK, REAL,
        pi0_opt_state=optimizers[0], critic_opt_state=optimizers[1],
    )  # fmt: skip


def without_average() -> ACRLPDPi0Agent:
    agent = make_agent()
    return ACRLPDPi0Agent(
        agent.pi0_model, agent.critic_networks, StateFeatures(), 5, CHUNK, REAL, use_ema=False,
        pi0_opt_state=agent.pi0_opt_state, critic_opt_state=agent.critic_opt_state,
    )  # fmt: skip


def shorter_chunks() -> ACRLPDPi0Agent:
    agent = make_agent()
    critics = CriticNetworks(STATE, STATE, 2, REAL, critics=3, hidden=16, layers=2)
    optimizer = torch.optim.Adam(critics.parameters(), 1e-3)
    return ACRLPDPi0Agent(
        agent.pi0_model, critics, StateFeatures(), 5, 2, REAL,
        pi0_opt_state=agent.pi0_opt_state, critic_opt_state=optimizer,
    )  # fmt: skip


def other_features() -> ACRLPDPi0Agent:
    agent = make_agent()
    agent.features = LearnedFeatures().requires_grad_(False)
    return agent


def other_optimizer() -> ACRLPDPi0Agent:
    agent = make_agent()
    agent.pi0_opt_state = torch.optim.SGD(agent.pi0_model.parameters(), 1e-3)
    return agent


@pytest.mark.tried(
    "a checkpoint of ACRLPD is loaded into an agent with other critics, chunks, features or optimizers",
    "An error with the key, both values and the mend; nothing is loaded",
)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_critics, "critics.critics was 3 and is 2; it is a checkpoint of other critics"),
        (without_average, "use_ema was True and is False; make the agent with this use_ema"),
        (
            shorter_chunks,
            r"horizon_length was 4 and is 2 \(and 1 more\); it is a checkpoint of critics of other",
        ),
        (other_features, r"features was '\w+' and is '\w+'; its critics see features of another policy"),
        (other_optimizer, "optimizers.pi0_opt_state was 'Adam' and is 'SGD'; make the same optimizers"),
        (lambda: make_agent(learned_temperature=True), "learned_temperature was False and is True"),
    ],
)
def test_a_checkpoint_of_another_agent_is_refused_before_anything_is_loaded(tmp_path, make, said):
    path = save_acrlpd_checkpoint(tmp_path, make_agent(seed=1))
    agent = make()
    before = copy.deepcopy(state_of(agent))
    with pytest.raises(CheckpointError, match=said):
        load_acrlpd_checkpoint(path, agent)
    after = state_of(agent)
    assert all(equal(before[name], after[name]) for name in before)


def test_metadata_of_another_format_or_policy_is_refused():
    agent = make_agent(learned_temperature=True)
    metadata = create_checkpoint_metadata(agent)
    validate_checkpoint_compatibility({**metadata, "step": 7, "epoch": 2, "data": True}, agent)
    with pytest.raises(CheckpointError, match=r"x: format was 2 and is 1; another version .* wrote it"):
        validate_checkpoint_compatibility({**metadata, "format": 2}, agent, "x")
    with pytest.raises(CheckpointError, match=r"actor.type was 'SmallActor' and is 'Pi0Actor' \(and "):
        validate_checkpoint_compatibility(metadata, agent_of(PI0Policy.from_pretrained(TINY)))


def drop_a_weight(folder: Path) -> None:
    file = folder / "critic_params.safetensors"
    tensors = load_file(file)
    del tensors["value.bias"]
    save_file(tensors, file)


def turn_a_weight(folder: Path) -> None:
    file = folder / "pi0_params.safetensors"
    tensors = load_file(file)
    tensors["layers.0.weight"] = tensors["layers.0.weight"].T.contiguous()
    save_file(tensors, file)


def change_moments(change):
    def changed(folder: Path) -> None:
        states = load_state(folder / "pi0_opt_state.pt")
        change(states["optimizer"])
        save_state(folder / "pi0_opt_state.pt", states)

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_a_weight, "critic_params.value.bias is missing"),
        (turn_a_weight, r"pi0_params.layers.0.weight has the shape \[15, 32\], expected \[32, 15\]"),
        (
            change_moments(lambda state: state["state"][1].update(exp_avg=torch.zeros(3))),
            r"pi0_opt_state.state.1.exp_avg has the shape \[3\], layers.0.bias has \[32\]",
        ),
        (
            change_moments(lambda state: state["state"].update({9: {"step": torch.tensor(1.0)}})),
            "pi0_opt_state.state.9 is of a parameter that no group holds",
        ),
        (
            change_moments(lambda state: state["param_groups"][0]["params"].append(0)),
            r"pi0_opt_state.param_groups holds \[5\] parameters, expected \[4\] \(and 1 more\)",
        ),
        (change_moments(lambda state: state.pop("param_groups")), "pi0_opt_state.param_groups is missing"),
        (lambda folder: (folder / "critic_params.safetensors").unlink(), "critic_params.* is missing"),
    ],
)
def test_files_that_do_not_fit_the_agent_are_refused_before_anything_is_loaded(tmp_path, change, said):
    agent = make_agent()
    agent.train_step(made_batch())
    path = altered(save_acrlpd_checkpoint(tmp_path / "a", agent), tmp_path / "b", change)
    other = make_agent(seed=5)
    before = copy.deepcopy(state_of(other))
    with pytest.raises(CheckpointError, match=said):
        load_acrlpd_checkpoint(path, other)
    after = state_of(other)
    assert before.keys() == after.keys() and all(equal(before[name], after[name]) for name in before)


def test_a_damaged_folder_and_missing_episodes_are_named(tmp_path):
    agent = agent_of(PI0Policy.from_pretrained(TINY))
    path = save_acrlpd_checkpoint(tmp_path, agent)
    with pytest.raises(CheckpointError, match="holds no episodes; load it without a data loader"):
        load_acrlpd_checkpoint(path, agent, loader_of(agent))
    file = path / "critic_params.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"critic_params.safetensors has \d+ bytes, .*use an older"):
        load_acrlpd_checkpoint(path, agent)
    store = CheckpointStore(tmp_path / "foreign", keep=1)
    store.begin(0)
    with pytest.raises(CheckpointError, match="is no checkpoint of ACRLPD"):
        load_acrlpd_checkpoint(store.seal(0), agent)
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        load_acrlpd_checkpoint(tmp_path / "nowhere", agent)


# The actor for openpi


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_published_actor_that_nobody_has_trained_is_written_byte_by_byte(tmp_path, stored):
    tensors = {name: tensor.to(stored) for name, tensor in published_weights().items()}
    published = write_openpi(tmp_path / "published", tensors)
    policy = load_pi0_weights_from_openpi(published)
    actor = Pi0Actor(policy)
    features = ObservationFeatures(actor)
    horizon, robot = policy.config.action_horizon, policy.config.robot_action_dim
    critics = CriticNetworks(features.width, policy.config.action_dim, horizon, robot, hidden=8)
    agent = ACRLPDPi0Agent(actor, critics, features, 2, horizon, robot)
    path = save_openpi_pi0_checkpoint(agent.pi0_ema.policy, tmp_path, 7)
    assert path == tmp_path / "pi0_openpi_step_7"
    before, after = (folder / "model.safetensors" for folder in (published, path))
    assert before.read_bytes() == after.read_bytes()
    assert [label for label, _ in inspect_checkpoint(path)][-1] == FITS
    again = save_openpi_pi0_checkpoint(load_pi0_weights_from_openpi(path), tmp_path, 8)
    assert (again / "model.safetensors").read_bytes() == before.read_bytes()


def test_the_average_is_what_is_written(tmp_path):
    agent = agent_of(PI0Policy.from_pretrained(TINY, trainable="all"))
    agent.train_step(loader_of(agent).sample_batch(2))
    written = load_pi0_weights_from_openpi(save_openpi_pi0_checkpoint(agent.pi0_ema.policy, tmp_path, 1))
    average, trained = agent.pi0_ema.policy.parameters(), agent.pi0_model.policy.parameters()
    assert all(torch.equal(one, other) for one, other in zip(written.parameters(), average, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(written.parameters(), trained, strict=True))


def test_low_rank_additions_are_merged_into_a_copy(tmp_path):
    policy = PI0Policy.from_pretrained(TINY, trainable="lora")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_b" in name:
                nn.init.normal_(weight, std=0.1)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    inputs = random_inputs(policy.config, 2)
    noise = random_actions(policy.config, 2)["noise"]
    expected = policy.sample_actions(**inputs, noise=noise)
    written = load_pi0_weights_from_openpi(save_openpi_pi0_checkpoint(policy, tmp_path, 1))
    assert not any("lora" in name for name, _ in written.named_parameters())
    assert torch.allclose(written.sample_actions(**inputs, noise=noise), expected, atol=1e-4)
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_openpi_has_no_place_for_is_refused(tmp_path):
    policy = PI0Policy.from_pretrained(TINY)
    policy.enable_guidance()
    with pytest.raises(CheckpointError, match="optimality condition .* openpi has no place"):
        save_openpi_pi0_checkpoint(policy, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"layout lerobot, not openpi's: .*pi0\.checkpoint convert"):
        load_pi0_weights_from_openpi(write_lerobot(tmp_path / "lerobot", published_weights()))


# Checks


def test_an_untouched_agent_has_no_finding():
    agent = make_agent(learned_temperature=True)
    assert check_agent(agent) == []
    agent.train_step(made_batch())
    assert check_agent(agent) == []
    assert check_agent(without_average()) == []
    assert check_agent(agent_of(PI0Policy.from_pretrained(TINY, trainable="all"))) == []
    assert check_agent(agent_of(PI0Policy.from_pretrained(TINY, trainable="expert"))) == []


def alias_an_average(agent):
    agent.critic_ema.value.bias = agent.critic_networks.value.bias


def spoil_a_weight(agent):
    agent.critic_networks.value.bias.data[0] = float("nan")


def coarse_average(agent):
    agent.critic_ema.bfloat16()


def wide_weight(agent):
    agent.pi0_model.layers[0].double()


def average_of_other_sizes(agent):
    agent.pi0_ema = SmallActor(hidden=16)


def optimizer_of_other_weights(agent):
    agent.pi0_opt_state = torch.optim.Adam(SmallActor().parameters())


def forgotten_weight(agent):
    agent.critic_opt_state.param_groups[0]["params"].pop()


def foreign_moments(agent):
    agent.pi0_opt_state.state[torch.zeros(4)] = {"step": torch.tensor(1.0)}


def second_group(agent):
    weight = agent.pi0_opt_state.param_groups[0]["params"][0]
    agent.pi0_opt_state.param_groups.append({"params": [weight]})


def moment(agent, name="exp_avg"):
    """The moments of a weight of 32 numbers, `layers.0.bias`."""
    return agent.pi0_opt_state.state[agent.pi0_model.layers[0].bias]


def another_step(agent):
    moment(agent)["step"] += 2


def moment_of_other_shape(agent):
    moment(agent)["exp_avg"] = torch.zeros(5)


def moment_of_other_type(agent):
    moment(agent)["exp_avg_sq"] = torch.zeros(32, dtype=torch.bfloat16)


def moment_not_finite(agent):
    moment(agent)["exp_avg"][3] = float("inf")


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (alias_an_average, "critic_params.value.bias and critic_ema_params.value.bias share their memory"),
        (spoil_a_weight, "critic_params.value.bias holds 1 values that are not finite"),
        (
            coarse_average,
            "critic_ema_params.value.bias is bfloat16: an average that keeps 0.99 stands still unless the weight "
            + "differs by 39% of its size; keep it in float32",
        ),
        (wide_weight, "pi0_params.layers.0.bias is float64; weights are float32, bfloat16 or float16"),
        (average_of_other_sizes, "pi0_ema_params.layers.0.bias has the shape [16], expected [32]"),
        (optimizer_of_other_weights, "pi0_opt_state does not train layers.0.bias"),
        (
            optimizer_of_other_weights,
            "pi0_opt_state.param_groups.0 trains a tensor of shape [32], none of its weights",
        ),
        (forgotten_weight, "critic_opt_state does not train value.bias"),
        (
            foreign_moments,
            "pi0_opt_state.state holds moments of a tensor of shape [4], which no group holds",
        ),
        (second_group, "pi0_opt_state.param_groups.1 holds layers.0.weight a second time"),
        (another_step, "pi0_opt_state.state.1.step is 3, others are 1"),
        (moment_of_other_shape, "pi0_opt_state.state.1.exp_avg has the shape [5], layers.0.bias has [32]"),
        (moment_of_other_type, "pi0_opt_state.state.1.exp_avg_sq is bfloat16, layers.0.bias is float32"),
        (moment_not_finite, "pi0_opt_state.state.1.exp_avg holds 1 values that are not finite"),
    ],
)
def test_a_fault_that_is_planted_in_an_agent_is_found(plant, finding):
    agent = make_agent()
    agent.train_step(made_batch())
    plant(agent)
    assert finding in check_agent(agent)


TREE = {"a": {"x": torch.ones(2, 3), "y": [torch.ones(4), 1]}, "b": (2.0, None, {})}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda tree: tree["a"].pop("x"), "t.a.x is missing"),
        (lambda tree: tree["a"].update(z=1), "t.a.z is surplus"),
        (lambda tree: tree["a"].update(x=torch.ones(3, 2)), "t.a.x has the shape [3, 2], expected [2, 3]"),
        (lambda tree: tree["a"].update(x=torch.ones(2, 3).half()), "t.a.x is float16, expected float32"),
        (lambda tree: tree["a"]["y"].__setitem__(1, torch.ones(())), "t.a.y.1 is a Tensor, expected a int"),
        (lambda tree: tree["a"]["y"].__setitem__(1, "one"), "t.a.y.1 is a str, expected a int"),
        (lambda tree: tree.update(b=(2.0, None, [])), "t.b.2 is a list, expected a dict"),
    ],
)
def test_a_tree_that_differs_is_told_by_its_leaf(change, finding):
    assert compare_pytree_structures(TREE, copy.deepcopy(TREE), "t") == []
    other = copy.deepcopy(TREE)
    change(other)
    assert compare_pytree_structures(TREE, other, "t") == [finding]


def test_a_tree_is_diagnosed_by_itself():
    tied = torch.ones(6)
    assert diagnose_pytree_structure({"a": [tied, tied[:2]], "b": [torch.ones(2), 3, "x", None]}) == []
    halves = diagnose_pytree_structure({"a": tied[:4], "b": tied[3:], "c": torch.ones(2)})
    assert halves == ["b and a share their memory"]
    assert diagnose_pytree_structure({"a": tied[:3], "b": tied[3:]}) == []
    assert diagnose_pytree_structure({"a": [1.0, float("nan")]}) == ["a.1 is nan"]
    assert diagnose_pytree_structure({"a": {"f": print}}) == [
        "a.f is a builtin_function_or_method; a checkpoint holds tensors and plain values"
    ]


@pytest.mark.parametrize(
    ("dtype", "decay", "moves"),
    [
        (torch.float32, 0.999, True),
        (torch.bfloat16, 0.999, False),
        (torch.float16, 0.99, False),
        (torch.bfloat16, 0.5, True),
    ],
)
def test_a_type_is_too_coarse_where_an_average_of_it_really_stands_still(dtype, decay, moves):
    weight, average = torch.full((1,), 1.02, dtype=dtype), torch.ones(1, dtype=dtype)
    average.lerp_(weight, 1 - decay)
    assert (average != 1).item() == moves
    found = check_pytree_leaf_dtypes({"average": {"w": average}}, {"average": decay})
    assert (found == []) == moves


def test_an_optimizers_own_state_dict_fits_it():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [{"params": list(part.parameters())} for part in module]
    optimizer = torch.optim.AdamW(groups)
    named = dict(module.named_parameters())
    module(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    assert check_optimizer_consistency(optimizer, named, "o", optimizer.state_dict()) == []
    one_group = torch.optim.AdamW(module.parameters())
    (found,) = check_optimizer_consistency(one_group, named, "o", optimizer.state_dict())
    assert found == "o.param_groups holds [2, 2] parameters, expected [4]"


def test_findings_raise_one_line_and_notes_are_printed(capsys):
    require_sound([], "it", "mend")
    require_sound([NOTE + "x has 1 row"], "it", "mend")
    assert capsys.readouterr().out == "it: x has 1 row\n"
    with pytest.raises(CheckpointError, match=r"^it: a is missing \(and 1 more\); mend it$"):
        require_sound(["a is missing", NOTE + "n", "b is missing"], "it", "mend it")


# FSDP


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Scaled(nn.Module):
    """A layer with a weight that FSDP2 may not like."""

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(scale)

    def forward(self, x):
        return self.layer(x) * self.scale.float().sum()


@pytest.mark.parametrize(
    ("scale", "finding", "refusal"),
    [
        (
            torch.tensor(1.0),
            "scale is a single number, which FSDP2 refuses; give it one dimension",
            ValueError,
        ),
        (torch.ones(4, 3).T, "scale is not contiguous, which FSDP2 refuses", NotImplementedError),
        (
            torch.ones(4, dtype=torch.bfloat16),
            "the rest trains weights of bfloat16 and float32 in one shard group, which FSDP2 refuses",
            AssertionError,
        ),
    ],
)
def test_what_is_said_of_shards_is_what_fsdp_refuses(one_rank, scale, finding, refusal):
    assert validate_fsdp_compatibility(Scaled(scale)) == [finding]
    with pytest.raises(refusal):
        fully_shard(Scaled(scale), mesh=one_rank)(torch.ones(1, 4))


def test_frozen_and_trained_weights_of_several_types_may_be_one_group(one_rank):
    module = Scaled(torch.ones(4, dtype=torch.bfloat16))
    module.scale.requires_grad_(False)
    assert validate_fsdp_compatibility(module) == []
    fully_shard(module, mesh=one_rank)(torch.ones(1, 4)).sum().backward()
    module = Scaled(torch.ones(4, dtype=torch.bfloat16))
    assert validate_fsdp_compatibility(module, [module.layer]) == [], "each type has its group"
    fully_shard(module.layer, mesh=one_rank)
    fully_shard(module, mesh=one_rank)(torch.ones(1, 4)).sum().backward()


def test_what_is_whole_among_shards_is_found(one_rank):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    fully_shard(module[0], mesh=one_rank)
    module[1].bias.requires_grad_(False)
    assert validate_fsdp_compatibility(module) == [
        "1.weight is trained, but whole on each rank, while other weights are shards",
        "1.bias is frozen and whole on each rank, while other weights are shards",
    ]
    assert validate_fsdp_compatibility(fully_shard(module, mesh=one_rank)) == []
    agent = make_agent()
    fully_shard(agent.pi0_model.layers[0], mesh=one_rank)
    assert (
        "layers.2.weight is trained, but whole on each rank, while other weights are shards"
        in check_agent(agent)
    )


def test_few_rows_are_noted_and_lists_of_blocks_and_integers_found():
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 3)])})
    found = validate_fsdp_compatibility(module, [module["blocks"]], ranks=4)
    assert "blocks is a ModuleList, which FSDP2 refuses; shard its members" in found
    assert f"{NOTE}blocks.0.bias has 3 rows for 4 ranks, so some hold nothing of it" in found
    module.register_parameter("table", nn.Parameter(torch.ones(4, dtype=torch.int64), requires_grad=False))
    assert "table is int64; FSDP2 shards floats" in validate_fsdp_compatibility(module)
    policy = PI0Policy.from_pretrained(TINY)
    assert validate_fsdp_compatibility(policy, policy.network.blocks(), ranks=2) == []


# Memory


def sizes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_bytes_of_each_part_are_those_of_its_tensors():
    agent = agent_of(PI0Policy.from_pretrained(TINY, trainable="all"))
    loader, monitor = loader_of(agent), GPUMemoryMonitor("cpu")
    assert monitor.analyze_train_state_memory(agent)["moments"] == 0
    loader.caches.refresh(loader.replay, agent.sample)
    agent.train_step(loader.sample_batch(2))
    agent.compute_loss(loader.sample_batch(2))[0].backward()
    found = monitor.analyze_train_state_memory(agent, loader)
    trained = [*agent.pi0_model.parameters(), *agent.critic_networks.parameters()]
    inputs = [leaf for _, leaf in leaves(loader.caches.inputs)]
    windows, episodes = vars(loader.replay.windows).values(), loader.replay.episodes
    moments = [
        moment
        for optimizer in (agent.pi0_opt_state, agent.critic_opt_state, agent.temp_opt_state)
        for state in optimizer.state.values()
        for moment in state.values()
    ]
    assert found == {
        "weights": sizes(trained) + 4,  # the temperature
        "averages": sizes(weight for weight in trained if weight.requires_grad),
        "target": sizes(agent.target_critic.parameters()),
        "features": sizes(agent.features.parameters()),
        "gradients": sizes(weight.grad for weight in trained if weight.grad is not None),
        "moments": sizes(moments),
        "buffer": sum(each.nbytes for each in episodes) + sizes([*windows, loader.replay.states]),
        "caches": sizes([*inputs, loader.caches.features, loader.caches.candidates]),
    }
    assert found["gradients"] > 0
    assert "buffer " in monitor.get_memory_report()


def test_memory_that_parts_share_counts_once():
    agent = agent_of(PI0Policy.from_pretrained(TINY, trainable="expert"))
    found = GPUMemoryMonitor("cpu").analyze_train_state_memory(agent)
    frozen = sizes(weight for weight in agent.pi0_model.parameters() if not weight.requires_grad)
    critics = sizes(agent.critic_networks.parameters())
    assert frozen > 0
    assert found["weights"] - 4 - found["averages"] == frozen
    assert found["averages"] > critics
    assert GPUMemoryMonitor("cpu").analyze_train_state_memory(without_average())["averages"] == 0


def test_of_a_shard_only_what_lies_on_this_rank_counts(one_rank):
    local = torch.ones(2, 3)
    whole = {"shape": torch.Size((4, 3)), "stride": (3, 1)}
    shard = DTensor.from_local(local, one_rank, [Shard(0)], run_check=False, **whole)
    assert bytes_held([shard, local], set()) == 24


def test_memory_that_grows_between_two_moments_is_seen(capsys):
    assert log_memory_usage("alone").resident > 0
    assert capsys.readouterr().out.startswith("memory, alone: ")
    monitor = enable_memory_monitoring(make_agent(), device="cpu")
    kept = []
    log_memory_usage("before", monitor)
    for _ in range(3):
        kept.append(torch.ones(10_000_000))  # 40 MB: more than malloc keeps in reserve
    now = log_memory_usage("after", monitor)
    before, after = (memory.resident for _, memory in monitor.moments[-2:])
    assert 115 < after - before < 130
    assert now.peak > after - 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("state on this rank: weights 0.0 MB") and lines[1].endswith(" MB")
    assert f"{after - before:+.1f} MB since before" in lines[-1]
    table = monitor.get_memory_report().splitlines()
    assert [row.split()[0] for row in table[1:4]] == ["start", "before", "after"]
    assert f"{after - before:+.1f} MB" in table[3]
    kept.clear()
    gc.collect()
    assert monitor.checkpoint_memory("freed").resident < before + 20


# Runs


SHORT = [
    "training.num_train_steps=2",
    "training.offline_iterations=1",
    "task.max_episode_length=20",
    "evaluation.episodes=1",
    "data.rollouts=2",
    "training.critic_updates=2",
    "training.updates=1",
]


@pytest.mark.engine
@pytest.mark.usefixtures("signals_as_before")
def test_a_run_says_what_its_state_takes_writes_its_actor_for_openpi_and_refuses_other_critics(
    tmp_path, capsys
):
    torch.set_num_threads(1)
    given = [f"output_dir={tmp_path}", "training.save_openpi_freq=1", *SHORT]
    run = unified_training_interface(get_config("acrlpd_debug", given))
    said = capsys.readouterr().out
    assert "state on this rank: weights " in said and "memory, end of training: " in said
    assert sorted(path.name for path in run.glob("pi0_openpi_*")) == [
        "pi0_openpi_step_1",
        "pi0_openpi_step_2",
    ]
    last = (run / "pi0_openpi_step_2/model.safetensors").read_bytes()
    assert last == (run / "policy/model.safetensors").read_bytes()
    assert last != (run / "pi0_openpi_step_1/model.safetensors").read_bytes()
    score = tmp_path / "score"
    options = ["--tasks", "3", "--episodes", "1", "--max_episode_length", "20", "--assets", "standins"]
    evaluate_command(["--policy_path", str(run / "pi0_openpi_step_2"), "--output", str(score), *options])
    assert json.loads((score / "results.json").read_text())["episodes"] == 1
    others = ACRLPDTrainer(get_config("acrlpd_debug", [*given, "acrlpd.critics=3"]), run, Interrupts())
    try:
        with pytest.raises(
            CheckpointError, match="step-000002: critics.critics was 2 and is 3; it is a check"
        ):
            others.load_checkpoint(True)
    finally:
        others.environments.close()


def outcome(run: Path) -> dict:
    """What a finished run has learned, kept and measured; times left out."""
    timed = ("seconds", "phases", "memory")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    newest = max((run / "checkpoints").glob("step-*"))
    found = {
        "rows": [{name: value for name, value in row.items() if name not in timed} for row in rows],
        "scores": results["table"],
        "step": newest.name,
        "own": load_state(newest / "rank0.pt"),  # buffer, candidates, random streams
    }
    for file in sorted(newest.glob("*.safetensors")):
        found[file.stem] = load_file(file)
    for name in ("pi0_opt_state", "critic_opt_state"):
        found[name] = load_state(newest / f"{name}.pt")
    return dict(leaves(found))


def kill_run(folder: Path, moments: list[tuple[int, bool]], seed: int, *overrides: str) -> None:
    """Kill a run again and again, and compare what comes of it with a run that nobody touched.

    Args:
        folder: for both.
        moments: for each kill the step whose checkpoint is waited for, -1 for none; and whether the kill then waits
            until a checkpoint is being written. Otherwise it comes within a second and a half.
        seed: of the moments.
        overrides: of the debugging preset.
    """
    draw = random.Random(seed)
    command = [sys.executable, "-m", "pi0.acrlpd.train", "--config", "acrlpd_debug"]

    def launch(name: str, *more: str) -> subprocess.Popen:
        given = ["--override", f"output_dir={folder / name}", *overrides]
        return subprocess.Popen(
            [*command, *given, *more],
            cwd=REPO_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = launch("whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output[-4000:]
    checkpoints = None
    for step, saving in moments:
        process = launch("killed", *(["--resume"] if checkpoints else []))
        limit = time.monotonic() + 300
        while True:
            checkpoints = next(iter((folder / "killed").glob("*/checkpoints")), None)
            done = (
                max((int(path.name[-6:]) for path in checkpoints.glob("step-*")), default=-1)
                if checkpoints
                else -2
            )
            writes = checkpoints is not None and any(checkpoints.glob(".step-*.tmp"))
            if done >= step and (writes or not saving):
                break
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < limit, f"no checkpoint of step {step}"
            time.sleep(0.001)
        if not saving:
            time.sleep(draw.uniform(0, 1.5))
        assert process.poll() is None, "it has ended before it was killed"
        process.kill()
        process.communicate()
    last = launch("killed", "--resume")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output[-4000:]
    runs = [next(iter((folder / name).iterdir())) for name in ("whole", "killed")]
    straight, killed = map(outcome, runs)
    assert straight.keys() == killed.keys()
    assert [path for path in straight if not equal(straight[path], killed[path])] == []


@pytest.mark.runs
@pytest.mark.tried(
    "a run of ACRLPD is killed (SIGKILL) while it learns and while it saves",
    "`--resume` ends with the same weights, buffer, candidates and metrics to the bit",
)
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    kill_run(tmp_path, [(0, False), (0, True)], 0, *SHORT, "training.num_train_steps=3")


@pytest.mark.soak
@pytest.mark.usefixtures("fresh_python")
def test_a_run_that_is_killed_ten_times_offline_online_and_saving_ends_with_the_same_bits(tmp_path):
    """Recording, three iterations offline, five online."""
    moments = [
        (-1, False),
        (0, False),
        (0, True),
        (1, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
        (5, False),
    ]
    kill_run(
        tmp_path,
        [*moments, (6, False)],
        1,
        "training.num_train_steps=8",
        "training.offline_iterations=3",
        "training.updates=10",
    )
