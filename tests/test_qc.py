"""The side of `pi0.acrlpd` in benchmarks/qc.py: its windows, and that its agent learns from them."""

import numpy as np
import torch

from benchmarks.qc import Windows, make_agent

SETTINGS = {
    "hidden": 16, "layers": 2, "samples": 3, "horizon": 5, "discount": 0.99, "lr": 1e-3, "target_update_rate": 0.005,
}  # fmt: skip


def made_data(steps: int = 60) -> dict[str, np.ndarray]:
    """Two episodes; the number of a step is its observation and its action."""
    number = np.arange(steps, dtype=np.float32)
    placed = np.isin(number, (7, 8, 22, 31, 58))
    return {
        "observations": number[:, None],
        "actions": np.stack([number, -number], 1),
        "next_observations": number[:, None] + 1000,
        "terminals": np.isin(number, (29, 59)).astype(np.float32),
        "rewards": placed.astype(np.float32) - 1,
        "masks": 1 - placed.astype(np.float32),
    }


def test_a_window_ends_where_the_cube_is_in_its_place_or_the_episode_ends():
    data = made_data()
    batch = Windows(data, 5).draw(400, torch.Generator().manual_seed(0))
    seen = set()
    for row, start in enumerate(batch["observations"]["state"][:, 0].int().tolist()):
        steps = 0
        for step in range(start, start + 5):
            steps += 1
            if data["masks"][step] == 0 or data["terminals"][step]:
                break
        placed = data["masks"][start + steps - 1] == 0
        seen.add((steps, bool(placed)))
        assert batch["valid"][row].tolist() == [1.0] * steps + [0.0] * (5 - steps)
        rewards = data["rewards"][start : start + steps].tolist()
        assert batch["rewards"][row].tolist() == rewards + [0.0] * (5 - steps)
        assert batch["masks"][row, steps - 1].item() == (not placed)
        assert batch["next_terminal"][row].item() == placed
        assert batch["next_observations"]["state"][row].item() == start + steps - 1 + 1000
        assert batch["actions"][row, :, 0].tolist() == list(range(start, start + 5))
    assert {(5, False), (5, True), (1, True), (1, False), (3, True)} <= seen


def test_the_agent_clones_the_chunks():
    random = np.random.default_rng(0)
    state = random.uniform(-1, 1, (500, 2)).astype(np.float32)
    data = {
        "observations": state,
        "actions": np.full((500, 2), 0.5, np.float32),
        "next_observations": state,
        "terminals": np.zeros(500, np.float32),
        "rewards": -np.ones(500, np.float32),
        "masks": np.ones(500, np.float32),
    }
    agent = make_agent(2, 2, 0, SETTINGS)
    windows, order = Windows(data, 5), torch.Generator().manual_seed(0)
    losses = [agent.train_step(windows.draw(64, order))[1]["bc_loss"] for _ in range(300)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    chunks = agent.pi0_model.sample({"state": torch.zeros(1, 2)}, torch.randn(50, 1, 5, 2))
    assert abs(chunks.mean().item() - 0.5) < 0.2
