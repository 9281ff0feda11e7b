"""Episodes, caches and batches of `pi0.acrlpd`, with the tiny policy."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pi0 import PI0Policy
from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader, exchanged
from pi0.acrlpd.actor import Pi0Actor, network_inputs
from pi0.acrlpd.critic_networks import ObservationFeatures
from pi0.acrlpd.episodes import (
    RecordedEpisode,
    ended_at_horizon,
    of_demonstration,
    of_rollout,
    shuffled_outcomes,
    with_outcome,
)
from pi0.acrlpd.practice import choose_rollouts
from pi0.acrlpd.replay import windows_of
from pi0.base.paths import REPO_ROOT
from pi0.data.chunks import Chunks
from pi0.data.demonstrations import DataError, Demonstration
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode, Observation
from pi0.libero.init_states import InitStatePool
from pi0.libero.stepping import InitState
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy
from pi0.policy.critics import (
    BestOfPolicy,
    CriticNetworks,
    OwnFeatures,
    PolicyFeatures,
    load_critic,
    save_critic,
)
from pi0.training.checkpoint_store import load_state, save_state
from pi0.training.flow_loss import flow_loss

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
HORIZON = 10


@pytest.fixture(scope="module")
def policy() -> PI0Policy:
    return PI0Policy.from_pretrained(REPO_ROOT / "checkpoints/pi0_tiny_libero_spatial", trainable="all")


def made_episode(looks: int, seed: int, success: bool = True, last: bool = True) -> RecordedEpisode:
    random = np.random.default_rng(seed)
    executed = np.full(looks, HORIZON)
    executed[-1] = random.integers(1, HORIZON + 1)
    rewards = np.zeros((looks, HORIZON), np.float32)
    if success:
        rewards[-1, executed[-1] - 1] = 1
    seen = looks + last
    return RecordedEpisode(
        prompt=f"pick up the bowl {seed % 3}",
        images={camera: random.integers(0, 256, (seen, 64, 64, 3), np.uint8) for camera in CAMERAS},
        states=random.normal(size=(seen, 8)).astype(np.float32) * 0.1,
        actions=random.uniform(-1, 1, (looks, HORIZON, 7)).astype(np.float32),
        executed=executed,
        rewards=rewards,
        terminated=success,
        success=success,
    )


def make_loader(policy: PI0Policy, episodes: list[RecordedEpisode], capacity: int = 1000) -> ACRLPDDataLoader:
    loader = ACRLPDDataLoader(policy, PolicyFeatures(policy.config, policy.network), capacity, seed=3)
    loader.add(episodes)
    return loader


def test_a_batch_is_what_the_policy_makes_of_the_episodes(policy):
    episodes = [made_episode(3, 0), made_episode(4, 1, success=False, last=False), made_episode(2, 2)]
    loader = make_loader(policy, episodes)
    batch = loader.batch(torch.arange(9))
    rows = [(episode, look) for episode in episodes for look in range(len(episode))]
    for name, ahead in (("observations", 0), ("next_observations", 1)):
        found = network_inputs(policy, batch[name])
        for row, (episode, look) in enumerate(rows):
            at = min(look + ahead, len(episode.states) - 1)
            expected = policy.prepare(
                {
                    "images": {camera: frames[[at]] for camera, frames in episode.images.items()},
                    "state": episode.states[[at]],
                    "prompt": [episode.prompt],
                }
            )
            for camera in CAMERAS:
                assert torch.equal(found["images"][camera][row], expected["images"][camera][0])
                assert found["image_masks"][camera][row]
            for key in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
                assert torch.equal(found[key][row], expected[key][0])
    for row, (episode, look) in enumerate(rows):
        final = look == len(episode) - 1
        assert torch.allclose(
            policy.unnormalize_actions(batch["actions"][row], episode.states[look]),
            torch.from_numpy(episode.actions[look]),
            atol=1e-5,
        )
        assert batch["rewards"][row].tolist() == episode.rewards[look].tolist()
        assert batch["valid"][row].sum() == episode.executed[look]
        assert bool(batch["next_terminal"][row]) == (final and episode.success)
        assert bool(batch["sequence_mask"][row]) == (not final or episode.success or episode.has_last)
        assert bool(batch["masks"][row].min() == 0) == (final and episode.success)
        assert bool(batch["terminals"][row].any()) == final
        assert bool(batch["success"][row]) == episode.success


def test_the_control_of_windows_exchanges_all_that_followed_and_nothing_else(policy):
    episodes = [made_episode(3, 0), made_episode(4, 1, success=False), made_episode(2, 2)]
    loader = make_loader(policy, episodes)
    loader.refresh_candidates(lambda seen: torch.rand(2, len(seen["state"]), HORIZON, 32))
    batch = loader.batch(torch.arange(9))
    control = exchanged(batch, torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert order.tolist() != list(range(9))
    for name in ("actions", "success", "features", "candidates"):
        assert torch.equal(control[name], batch[name])
    for name in ("rewards", "masks", "valid", "terminals", "next_terminal", "sequence_mask", "next_features"):
        assert torch.equal(control[name], batch[name][order])
    assert torch.equal(control["next_candidates"], batch["next_candidates"][:, order])
    for name, changed in (("observations", False), ("next_observations", True)):
        now, then = batch[name], control[name]
        assert torch.equal(then["state"], now["state"][order] if changed else now["state"])


def test_caches_follow_episodes_that_come_and_go(policy):
    episodes = [made_episode(looks, seed, last=seed % 2 == 0) for seed, looks in enumerate((3, 4, 2, 5, 3))]
    grown = make_loader(policy, episodes[:2], capacity=11)
    for episode in episodes[2:]:
        grown.add([episode])
    left = grown.replay.episodes
    assert sum(map(len, left)) <= 11 and left[-1] is episodes[-1]
    whole = make_loader(policy, left)
    assert torch.allclose(grown.caches.features, whole.caches.features, atol=1e-5)
    for name in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
        assert torch.equal(grown.caches.inputs[name], whole.caches.inputs[name])


def test_candidates_are_those_of_their_observations(policy):
    loader = make_loader(policy, [made_episode(3, 0), made_episode(2, 1)])
    asked = []

    def sample(observations):
        asked.append(len(observations["state"]))
        return observations["state"][None, :, None, :].expand(4, -1, HORIZON, -1)

    loader.caches.refresh(loader.replay, sample)
    assert sum(asked) == 7
    batch = loader.sample_batch(20, images=False)
    assert "image" not in batch["observations"]
    for name, observations in (("candidates", "observations"), ("next_candidates", "next_observations")):
        assert batch[name].shape == (4, 20, HORIZON, 8)
        assert torch.equal(batch[name][2, :, 5], batch[observations]["state"])


def test_the_same_seed_gives_the_same_batches_and_a_restored_loader_goes_on(policy, tmp_path):
    episodes = [made_episode(3, 0), made_episode(4, 1, success=False)]
    first, second = make_loader(policy, episodes), make_loader(policy, episodes)
    for loader in (first, second):
        loader.caches.candidates = torch.randn(9, 2, HORIZON, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert torch.equal(first.sample_batch(8)["actions"], second.sample_batch(8)["actions"])
    save_state(tmp_path / "data.pt", {"data": first.state_dict()})
    restored = make_loader(policy, [made_episode(2, 5)])
    restored.load_state_dict(load_state(tmp_path / "data.pt")["data"])
    one, other = first.sample_batch(8), restored.sample_batch(8)
    for name in ("features", "candidates", "next_candidates"):
        assert torch.equal(one[name], other[name])
    assert all(
        torch.equal(one["observations"]["image"][c], other["observations"]["image"][c]) for c in CAMERAS
    )


def test_a_rollout_becomes_an_episode():
    looks, executed = 3, np.array([10, 10, 4])
    random = np.random.default_rng(0)
    images = {camera: random.integers(0, 256, (looks, 8, 8, 3), np.uint8) for camera in CAMERAS}
    last = Observation(
        {camera: np.full((8, 8, 3), 7, np.uint8) for camera in CAMERAS}, np.ones(8, np.float32)
    )
    made = {"images": images, "states": np.zeros((looks, 8), np.float32), "executed": executed}
    made |= {"actions": random.uniform(-1, 1, (looks, 10, 7)).astype(np.float32), "last": last}

    class Prompted:
        class task:
            prompt = "push"

    found = of_rollout(Episode(Prompted(), **made, success=True), 10)
    assert (found.success, found.terminated, found.has_last, len(found)) == (True, True, True, 3)
    assert np.argwhere(found.rewards).tolist() == [[2, 3]]
    assert (found.images["base_0_rgb"][-1] == 7).all()
    failed = of_rollout(Episode(Prompted(), **{**made, "last": None}, success=False), 10)
    assert (failed.success, failed.terminated, failed.has_last, failed.rewards.sum()) == (
        False,
        False,
        False,
        0,
    )
    with pytest.raises(DataError, match="10 actions of a chunk, more than 5"):
        of_rollout(Episode(Prompted(), **made, success=True), 5)
    with pytest.raises(DataError, match="teaches nothing"):
        of_rollout(Episode(Prompted(), **made, success=False, failure="broke"), 10)


def demonstration(steps: int, **more) -> Demonstration:
    given = {
        "prompt": "push",
        "states": np.arange(steps * 8, dtype=np.float32).reshape(steps, 8),
        "actions": np.zeros((steps, 7), np.float32),
        "image_steps": np.arange(0, steps, 10),
        "images": {"base_0_rgb": np.zeros((len(range(0, steps, 10)), 8, 8, 3), np.uint8)},
        "executed": np.arange(steps * 7, dtype=np.float32).reshape(steps, 7),
        "rewards": np.eye(steps, dtype=np.float32)[-1],
        "dones": np.eye(steps, dtype=bool)[-1],
    }
    return Demonstration(**given | more)


def test_a_demonstration_is_cut_where_the_policy_would_look():
    found = of_demonstration(demonstration(24), 10, "episode 0")
    assert found.executed.tolist() == [10, 10, 4]
    assert (found.success, found.terminated, found.has_last) == (True, True, False)
    assert np.argwhere(found.rewards).tolist() == [[2, 3]]
    assert np.array_equal(found.states[:, 0], [0, 80, 160])
    assert np.array_equal(found.actions[2, :, 0], [140, 147, 154, 161, *[161] * 6]), (
        "as executed; the last is held"
    )
    failure = of_demonstration(demonstration(20, rewards=np.zeros(20, np.float32)), 10, "episode 0")
    assert (failure.success, failure.terminated) == (False, False)


def test_a_demonstration_without_rewards_or_images_is_refused():
    with pytest.raises(DataError, match="episode 3 holds neither rewards nor successes"):
        of_demonstration(demonstration(20, rewards=None), 10, "episode 3")
    with pytest.raises(DataError, match="no images at every 7th step"):
        of_demonstration(demonstration(20), 7, "episode 3")


def test_the_flow_loss_is_the_shared_one_and_actions_are_clipped_as_they_are_carried_out(policy):
    episodes = [made_episode(3, 0), made_episode(2, 1, success=False)]
    batch = make_loader(policy, episodes).batch(torch.arange(5))
    actor = Pi0Actor(policy)
    now = batch["observations"]
    given = (now, batch["actions"][None], batch["valid"][None])
    (found,) = actor.flow_loss(*given, torch.Generator().manual_seed(3), 2)
    chunks = Chunks(
        {camera: now["image"][camera] for camera in CAMERAS},
        now["raw_state"],
        [episode.prompt for episode in episodes for _ in range(len(episode))],
        torch.from_numpy(np.concatenate([episode.actions for episode in episodes])),
        batch["valid"].bool(),
    )
    shared = flow_loss(policy, chunks, samples=2, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found, shared, atol=1e-5)
    beyond = policy.normalize_actions(3 * torch.ones(5, HORIZON, 7), now["raw_state"])
    whole = policy.normalize_actions(torch.ones(5, HORIZON, 7), now["raw_state"])[..., :7]
    assert torch.allclose(actor.carried_out(beyond, now), whole, atol=1e-5)


def test_two_chunks_of_an_observation_have_the_losses_that_each_has_alone(policy):
    batch = make_loader(policy, [made_episode(3, 0), made_episode(2, 1)]).batch(torch.arange(5))
    now, actor, samples = batch["observations"], Pi0Actor(policy), 3
    chunks = torch.stack([batch["actions"], torch.randn_like(batch["actions"])])
    valid = torch.ones(2, 5, HORIZON)
    found = actor.flow_loss(now, chunks, valid, torch.Generator().manual_seed(3), samples)
    drawn = policy.draw_noise_and_time(chunks.flatten(0, 1), samples, torch.Generator().manual_seed(3))
    noise, time = (each.unflatten(1, (2, 5)) for each in drawn)
    for kind in range(2):
        alone = policy(
            **network_inputs(policy, now), actions=chunks[kind], noise=noise[:, kind], time=time[:, kind]
        )
        expected = alone[..., :7].mean((0, 2, 3))
        assert torch.allclose(found[kind], expected, atol=1e-5)


def test_rollouts_go_through_all_states_of_each_task_before_one_comes_again():
    tasks = find_tasks("libero_spatial", [3, 8])
    states = [InitState(np.full(3, number, float), np.zeros(0)) for number in range(5)]
    pools = [InitStatePool(task, "training", list(states), {}) for task in tasks]
    protocol = SimpleNamespace(max_episode_length=20, settle_steps=0)
    environments = SimpleNamespace(rollout=partial(Environments.rollout, protocol))
    first, again, other = (choose_rollouts(environments, pools, 14, 0, step) for step in (1, 1, 2))
    for task in tasks:
        visits = [rollout.init_index for rollout in first if rollout.task == task]
        assert len(visits) == 7
        assert sorted(visits[:5]) == list(range(5)) and len(set(visits[5:])) == 2
    assert len({rollout.noise_key for rollout in [*first, *other]}) == 28
    assert [rollout.noise_key for rollout in first] == [rollout.noise_key for rollout in again]
    assert all(rollout.keep_last for rollout in first)


# Critics and acting ---------------------------------------------------------------------------------------


def made_critics(features: PolicyFeatures) -> CriticNetworks:
    torch.manual_seed(0)
    critics = CriticNetworks(features.width, 8, HORIZON, 7, hidden=16)
    for parameter in critics.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return critics


def observations(count: int = 4) -> tuple:
    episode = made_episode(count, 9, last=False)
    return dict(episode.images), episode.states, [episode.prompt] * count


def test_the_best_of_one_chunk_is_what_the_policy_does(policy):
    features = PolicyFeatures(policy.config, policy.network)
    plain, best = ActingPolicy(policy), BestOfPolicy(policy, made_critics(features), features, 1)
    keys = [(0, 1, number) for number in range(4)]
    seen = observations()
    one = plain.act(*seen, np.stack([plain.noise(key) for key in keys]))
    assert np.array_equal(one, best.act(*seen, np.stack([best.noise(key) for key in keys])))


def test_the_best_of_eight_chunks_is_the_one_of_highest_value(policy):
    features = PolicyFeatures(policy.config, policy.network)
    critics = made_critics(features)
    best = BestOfPolicy(policy, critics, features, 8)
    seen, keys = observations(), [(0, 1, number) for number in range(4)]
    noise = np.stack([best.noise(key) for key in keys])
    found = best.act(*seen, noise)
    inputs = policy.prepare({"images": seen[0], "state": seen[1], "prompt": seen[2]})
    for row in range(4):
        chunks = [ActingPolicy(policy).act(*seen, noise[:, number])[row] for number in range(8)]
        values = [
            float(
                critics(
                    features(**inputs)[[row]],
                    inputs["state"][[row]],
                    policy.normalize_actions(chunk[None], seen[1][[row]])[..., :7],
                )
                .mean()
                .detach()
            )
            for chunk in chunks
        ]
        assert np.allclose(found[row], chunks[int(np.argmax(values))], atol=1e-5)


@pytest.mark.parametrize("kind", [PolicyFeatures, OwnFeatures])
def test_a_critics_folder_gives_back_what_was_written(policy, tmp_path, kind):
    features = kind(policy.config, policy.network)
    critics = made_critics(features)
    save_critic(tmp_path / "critic", critics, features, {"rollouts": 400})
    loaded, seen = load_critic(tmp_path / "critic")
    assert type(seen) is kind
    inputs = policy.prepare(dict(zip(("images", "state", "prompt"), observations(), strict=True)))
    assert torch.equal(seen(**inputs), features(**inputs))
    chunk = torch.randn(4, HORIZON, 7)
    arguments = features(**inputs), inputs["state"], chunk
    assert torch.equal(loaded(*arguments), critics(*arguments))


def test_features_are_fixed_and_those_of_a_network_of_its_own_learn(policy):
    actor = Pi0Actor(policy.copy())
    fixed, own = ObservationFeatures(actor), ObservationFeatures(actor, "own")
    assert (fixed.fixed, own.fixed) == (True, False)
    loader = make_loader(policy, [made_episode(3, 0)])
    seen = loader.batch(torch.arange(3))["observations"]
    before = fixed(seen)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 1
    assert torch.equal(fixed(seen), before)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    found = own(seen)
    assert found.shape == (3, own.width)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in own.parameters())


def test_features_that_learn_are_not_kept_so_each_batch_has_images(policy):
    loader = ACRLPDDataLoader(policy, None, 100)
    loader.add([made_episode(3, 0)])
    batch = loader.sample_batch(2, images=False)
    assert "features" not in batch and "next_features" not in batch
    for name in ("observations", "next_observations"):
        assert set(batch[name]["image"]) == set(policy.config.cameras)


def test_shuffled_outcomes_stay_in_their_task_and_their_number_stays():
    episodes = [replace(made_episode(3, n), prompt=f"task {n % 2}", success=False) for n in range(12)]
    episodes = [with_outcome(each, n in (0, 2, 1)) for n, each in enumerate(episodes)]
    shuffled = shuffled_outcomes(episodes, np.random.default_rng(0))
    solved = [[each.success for each in group] for group in (episodes, shuffled)]
    assert solved[0] != solved[1]
    for task in (0, 1):
        assert sum(solved[0][task::2]) == sum(solved[1][task::2])
    for each in shuffled:
        windows = windows_of(each)
        assert windows.rewards.sum() == each.success
        assert bool(windows.next_terminal.any()) == each.success
        assert (windows.masks[-1].min() == 0) == each.success


def test_an_episode_at_its_horizon_may_count_as_a_failure():
    cut = with_outcome(made_episode(3, 0), False)
    windows = windows_of(ended_at_horizon(cut))
    assert windows.next_terminal[-1] and windows.masks[-1].min() == 0
    assert windows.rewards.sum() == 0
    assert not windows_of(cut).next_terminal.any()
