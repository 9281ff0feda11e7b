"""Run under torchrun by test_acrlpd_ranks.py: do several ranks of ACRLPD learn what one process learns?

Usage: rank_acrlpd.py windows COUNT,COUNT,...            parts of a batch of the small actor, of each rank
       rank_acrlpd.py shards CHECKPOINT FSDP_SIZE        the same batch on each rank, the actor sharded
       rank_acrlpd.py sketches CHECKPOINT FSDP_SIZE      the user's sketches: shard, step, save, load, step
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pi0 import PI0Policy
from pi0.acrlpd.acrlpd_pi0_agent import (
    ACRLPDPi0Agent,
    LossSettings,
    create_acrlpd_pi0_agent_from_rl_config,
)
from pi0.acrlpd.checkpointing import (
    load_acrlpd_checkpoint,
    save_acrlpd_checkpoint,
    save_openpi_pi0_checkpoint,
)
from pi0.acrlpd.config import RLTrainConfig, get_config
from pi0.acrlpd.fsdp_support import (
    create_fsdp_mesh,
    create_fsdp_train_step_fn,
    create_global_optimizers,
    init_fsdp_train_state,
    validate_fsdp_sharding,
)
from pi0.policy.critics import CriticNetworks
from pi0.ranks.collectives import gather
from pi0.ranks.sharding import whole
from tests.support.rank_end import leave_together
from tests.support.small_actor import ACTION_DIM, CHUNK, REAL, STATE, SmallActor, StateFeatures

STEPS, DRAWS, CANDIDATES = 4, 3, 5


class GivenNoise(SmallActor):
    """Noise and times are part of the observations, so that they do not depend on how a batch is divided."""

    def flow_loss(self, observations, actions, valid, generator, samples):
        noise, t = (
            observations["noise"],
            observations["time"][..., None, None],
        )  # [B, DRAWS, CHUNK, ACTION_DIM]
        losses = []
        for chunk, there in zip(actions, valid, strict=True):
            held = chunk[:, None]
            state = observations["state"][:, None].expand(-1, DRAWS, -1)
            velocity = self.velocity(state, t * noise + (1 - t) * held, observations["time"])
            errors = (velocity - (noise - held)).square()[..., :REAL].mean((1, 3))
            losses.append((errors * there).sum(1) / there.sum(1).clamp(min=1))
        return torch.stack(losses)


def small_agent() -> ACRLPDPi0Agent:
    torch.manual_seed(0)
    actor = GivenNoise()
    critics = CriticNetworks(STATE, STATE, CHUNK, REAL, critics=3, hidden=16, layers=2)
    agent = ACRLPDPi0Agent(
        actor, critics, StateFeatures(), CANDIDATES, CHUNK, REAL,
        pi0_opt_state=torch.optim.SGD(actor.parameters(), 0.05, momentum=0.9),
        critic_opt_state=torch.optim.SGD(critics.parameters(), 0.05, momentum=0.9),
        pi0_ema_decay=0.9, settings=LossSettings(divergence=0.3, temperature=0.02),
    )  # fmt: skip
    agent.temp_opt_state = torch.optim.SGD([agent.log_temperature], 0.1)
    return agent


def small_batch(count: int, seed: int) -> dict:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    steps = torch.randint(1, CHUNK + 1, (count,), generator=random)
    valid = (torch.arange(CHUNK)[None] < steps[:, None]).float()
    ended = torch.rand(count, generator=random) < 0.4
    return {
        "observations": {
            "state": normal(count, STATE),
            "noise": normal(count, DRAWS, CHUNK, ACTION_DIM),
            "time": torch.rand(count, DRAWS, generator=random),
        },
        "next_observations": {"state": normal(count, STATE)},
        "actions": normal(count, CHUNK, ACTION_DIM),
        "rewards": normal(count, CHUNK) * valid,
        "masks": 1 - (ended[:, None] & (torch.arange(CHUNK)[None] >= steps[:, None] - 1)).float(),
        "valid": valid,
        "sequence_mask": torch.rand(count, generator=random) < 0.6,
        "success": torch.rand(count, generator=random) < 0.3,
        "candidates": normal(CANDIDATES, count, CHUNK, ACTION_DIM),
        "next_candidates": normal(CANDIDATES, count, CHUNK, ACTION_DIM),
    }


def rows(batch: dict, begin: int, end: int) -> dict:
    """A part of a batch."""
    return {
        name: rows(value, begin, end)
        if isinstance(value, dict)
        else value[:, begin:end]
        if name.endswith("candidates")
        else value[begin:end]
        for name, value in batch.items()
    }


def state_of(agent: ACRLPDPi0Agent) -> dict[str, torch.Tensor]:
    modules = ("pi0_model", "critic_networks", "target_critic", "pi0_ema", "critic_ema")
    found = {
        f"{name}.{key}": whole(tensor).detach().clone()
        for name in modules
        for key, tensor in getattr(agent, name).state_dict().items()
    }
    return found | {"log_temperature": agent.log_temperature.detach().clone()}


def learn(agent: ACRLPDPi0Agent, batches: list[dict], step=None) -> tuple[dict, list[dict]]:
    step = step or agent.train_step
    infos = [agent.critic_step(batches[0])] + [step(batch)[1] for batch in batches]
    return state_of(agent), infos


def worst(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def compare(
    alone: tuple[dict, list[dict]], together: tuple[dict, list[dict]], more: dict, but: tuple[str, ...] = ()
) -> None:
    """Write how far the ranks are from one process, in weights and in what each step says, `but` for these names."""
    said = gather(together[1])
    assert all(infos == said[0] for infos in said), "ranks say different things of the same step"
    off = max(
        abs(info[name] - expected[name]) / max(1.0, abs(expected[name]))
        for info, expected in zip(together[1], alone[1], strict=True)
        for name in expected
        if name not in but
    )
    assert all(info.keys() == expected.keys() for info, expected in zip(together[1], alone[1], strict=True))
    found = gather({"weights": worst(together[0], alone[0]), "infos": off, **more})
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(found))


def windows(counts: list[int]) -> None:
    batches = [small_batch(sum(counts), seed) for seed in range(STEPS)]
    alone = learn(small_agent(), batches)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    begin = sum(counts[:rank])
    together = learn(small_agent(), [rows(batch, begin, begin + counts[rank]) for batch in batches])
    moved = worst(state_of(small_agent()), alone[0])
    compare(alone, together, {"moved": moved})


# The user's sketches of what a trainer calls, in their PyTorch form.


def fsdp_integration_interface(config: RLTrainConfig) -> tuple[ACRLPDPi0Agent, DeviceMesh]:
    """A sharded agent and its mesh: shards first, then optimizers of them."""
    policy = PI0Policy.from_pretrained(config.policy_path)
    agent = create_acrlpd_pi0_agent_from_rl_config(config, policy)
    mesh = create_fsdp_mesh(config.training.fsdp_size, policy.device)
    init_fsdp_train_state(agent, mesh)
    create_global_optimizers(agent, config)
    return agent, mesh


def fsdp_train_step(agent: ACRLPDPi0Agent, mesh: DeviceMesh, batch: dict) -> tuple[ACRLPDPi0Agent, dict]:
    """A step of all ranks; the agent is its own state."""
    return create_fsdp_train_step_fn(agent, mesh)(batch)


def save_checkpoint_interface(agent: ACRLPDPi0Agent, folder: Path, step: int) -> tuple[Path, Path]:
    """The whole state, and what acts in the layout of openpi."""
    whole_state = save_acrlpd_checkpoint(folder / "checkpoints", agent, step=step)
    return whole_state, save_openpi_pi0_checkpoint(agent.pi0_ema.policy, folder, step)


def config_of(checkpoint: str, *overrides: str) -> RLTrainConfig:
    return get_config("acrlpd_debug", [f"policy_path={checkpoint}", *overrides])


def pi0_batch(agent: ACRLPDPi0Agent, count: int, seed: int) -> dict:
    """Made-up windows of the policy's sizes."""
    config = agent.pi0_model.policy.config
    random = torch.Generator().manual_seed(seed)
    batch = small_batch(count, seed)
    size, horizon = config.image_size, agent.horizon_length
    valid = torch.ones(count, horizon)

    def observations() -> dict:
        return {
            "image": {
                camera: torch.randint(0, 256, (count, size, size, 3), generator=random, dtype=torch.uint8)
                for camera in config.cameras
            },
            "image_mask": {camera: torch.ones(count, dtype=torch.bool) for camera in config.cameras},
            "state": torch.randn(count, config.action_dim, generator=random),
            "raw_state": torch.randn(count, config.robot_state_dim, generator=random),
            "tokenized_prompt": torch.randint(
                0, config.vocab_size, (count, config.prompt_length), generator=random
            ),
            "tokenized_prompt_mask": torch.ones(count, config.prompt_length, dtype=torch.bool),
        }

    shape = (count, config.action_horizon, config.action_dim)
    return {
        **batch,
        "observations": observations(),
        "next_observations": observations(),
        "actions": torch.randn(count, horizon, config.action_dim, generator=random),
        "rewards": torch.rand(count, horizon, generator=random) * valid,
        "masks": valid,
        "valid": valid,
        "candidates": torch.randn(agent.num_action_samples, *shape, generator=random),
        "next_candidates": torch.randn(agent.num_action_samples, *shape, generator=random),
    }


def shards(checkpoint: str, fsdp_size: int) -> None:
    """Each rank has the same batch and the same noise, so a step of all is that of one process."""
    plain = ["training.optimizer.type=sgd", "acrlpd.actor_lr=0.01"]
    config = config_of(checkpoint, *plain)
    agent = create_acrlpd_pi0_agent_from_rl_config(config, PI0Policy.from_pretrained(checkpoint))
    create_global_optimizers(agent, config)
    batches = [pi0_batch(agent, 4, seed) for seed in range(2)]
    before = state_of(agent)
    alone = learn(agent, batches)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    sharded = f"training.fsdp_size={fsdp_size}"
    agent, mesh = fsdp_integration_interface(config_of(checkpoint, sharded, *plain))
    together = learn(agent, batches, create_fsdp_train_step_fn(agent, mesh))
    agent, mesh = fsdp_integration_interface(config_of(checkpoint, sharded))
    agent.train_step(batches[0])
    more = {"moved": worst(before, alone[0]), "bytes": validate_fsdp_sharding(agent, mesh)}
    # With the batch of each rank there are more windows.
    compare(alone, together, more, but=("sample_size", "advantage_spread"))


def sketches(checkpoint: str, fsdp_size: int) -> None:
    """An agent that is saved, and another into which it is loaded, take the same next step."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    config = config_of(checkpoint, f"training.fsdp_size={fsdp_size}")
    agent, mesh = fsdp_integration_interface(config)
    batches = [pi0_batch(agent, 2, 10 * seed + dist.get_rank()) for seed in range(2)]
    start = state_of(agent)
    fsdp_train_step(agent, mesh, batches[0])
    folder = Path(sys.argv[-1]).parent
    path, published = save_checkpoint_interface(agent, folder, step=1)
    written = PI0Policy.from_pretrained(published).network.state_dict()
    acts = agent.pi0_ema.policy.network.state_dict()
    of_what_acts = worst(acts, written)
    _, said = fsdp_train_step(agent, mesh, batches[1])
    other, others_mesh = fsdp_integration_interface(config)
    metadata = load_acrlpd_checkpoint(path, other)
    _, same = fsdp_train_step(other, others_mesh, batches[1])
    found = {
        "step": metadata["step"],
        "moved": worst(start, state_of(other)),
        "weights": worst(state_of(agent), state_of(other)),
        "infos": said == same,
        "published": of_what_acts,
    }
    found = gather(found)
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(found))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "windows":
        windows([int(count) for count in sys.argv[2].split(",")])
    else:
        {"shards": shards, "sketches": sketches}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    leave_together()


if __name__ == "__main__":
    main()
