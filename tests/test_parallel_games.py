"""Games as the workers of `pi0.parallel` play them: equal to Stable-Baselines3's wrappers, saved, played again, refused."""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product

import gymnasium
import numpy as np
import pytest
import stable_retro
import torch
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from pi0.base.errors import InputError
from pi0.parallel import games
from pi0.parallel.actor import Actor, Episode, Filled, Task, begin, new_stream, replay
from pi0.parallel.games import READ_ONCE_A_STEP, GameSpec, make_game, parse_options, resolve
from pi0.parallel.network import ActorCritic
from pi0.parallel.policy import STACK, FramePolicy, views
from pi0.parallel.slices import Layout, publish
from pi0.workers.arrays import arrays_in, nbytes

AIRSTRIKER = "Airstriker-Genesis-v0"
SPACES = gymnasium.spaces
# The actions of an environment, and the list that they become.
ACTIONS = {
    "discrete": (SPACES.Discrete(4, start=2), [2, 3, 4, 5]),
    "binary": (SPACES.MultiBinary(3), [np.array(each) for each in product((0, 1), repeat=3)]),
    "several": (
        SPACES.MultiDiscrete([2, 3]),
        [np.array(each) for each in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))],
    ),
    "continuous": (
        SPACES.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32)),
        [np.array(each, np.float32) for each in ((0, 2), (-1, 2), (1, 2), (0, 0), (0, 4))],
    ),
    "unbounded": (SPACES.Box(-np.inf, np.inf, (2,)), []),
    "countless": (SPACES.MultiBinary(11), []),
    "words": (SPACES.Text(3), []),
}


class Splashes(gymnasium.Env):
    """Coloured rectangles, one a frame, where chance and the action put them.

    Args:
        actions: a name in `ACTIONS`.
        ends, cuts: how likely a frame is the last one, by the rules or from outside; never one of the first 40.
        early: the episode ends with this frame in any case.
        in_place: every observation is the same array.
        inside: the image is part of a dictionary.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self, actions="discrete", ends=0.0, cuts=0.0, early=0, in_place=False, inside=False, render_mode=None
    ):
        self.render_mode = render_mode
        self.action_space = ACTIONS[actions][0]
        self._ends, self._cuts, self._early, self._in_place, self._inside = (
            ends,
            cuts,
            early,
            in_place,
            inside,
        )
        image = SPACES.Box(0, 255, (100, 140, 3), np.uint8)
        small = SPACES.Box(0, 255, (30, 20), np.uint8)
        self.observation_space = (
            SPACES.Dict({"speed": SPACES.Box(0, 1), "eyes": SPACES.Dict({"left": image, "right": small})})
            if inside
            else image
        )

    def get_action_meanings(self):
        return ["NOOP"]  # as the reference demands it of Atari games

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._image, self._age = self.np_random.integers(0, 100, (100, 140, 3)).astype(np.uint8), 0
        return self._seen(), {}

    def step(self, action):
        self._age += 1
        strength = float(np.dot(np.arange(1, np.size(action) + 1), np.ravel(action)))
        row, column = (int(each) for each in self.np_random.integers(0, 70, 2))
        colour = (np.array([40.0, 80.0, 120.0]) * (1 + abs(strength))).astype(int) % 256
        self._image[row : row + 30, column : column + 40] = colour
        chance = self.np_random.random()
        late = self._age > 40
        ends = (late and chance < self._ends) or self._age == self._early
        cuts = late and chance > 1 - self._cuts
        return self._seen(), strength + chance, ends, cuts, {}

    def _seen(self):
        image = self._image if self._in_place else self._image.copy()
        if not self._inside:
            return image
        speed = np.zeros(1, np.float32)
        return {"speed": speed, "eyes": {"left": image, "right": np.zeros((30, 20), np.uint8)}}


gymnasium.register("Splashes-v0", entry_point=Splashes)


@contextmanager
def playing(name: str = AIRSTRIKER, **spec):
    """A game that ends, so that the next emulator can be made."""
    game = make_game(GameSpec(name, **spec))
    try:
        yield game
    finally:
        game.close()


@contextmanager
def emulator() -> Iterator[gymnasium.Env]:
    """Airstriker as its package has it, for the reference."""
    discrete = stable_retro.Actions.DISCRETE
    env = stable_retro.make(AIRSTRIKER, use_restricted_actions=discrete, render_mode="rgb_array")
    env.get_action_meanings = lambda: ["NOOP"]
    try:
        yield env
    finally:
        env.close()


@dataclass
class Played:
    """An episode: what was asked of the game, and what it showed."""

    seed: int
    noops: int
    actions: list[int] = field(default_factory=list)
    frames: list[np.ndarray | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    ends: list[tuple[bool, bool]] = field(default_factory=list)

    def take(self, step) -> None:
        self.frames.append(step.frame)
        self.rewards.append(step.reward)
        self.ends.append((step.terminated, step.truncated))


def play(game, seed: int, noops: int, random: np.random.Generator, most: int = 10_000) -> Played:
    """Random actions until the end, or so many."""
    played = Played(seed, noops, frames=[begin(game, seed, noops)])
    while len(played.actions) < most and not any(played.ends[-1:] and played.ends[-1]):
        played.actions.append(int(random.integers(game.actions)))
        played.take(game.step(played.actions[-1]))
    return played


def reference(
    env: gymnasium.Env, seed: int, noops: int, actions, skip: int = 4, nothing=0
) -> tuple[np.ndarray, list[float], list[tuple[bool, bool]]]:
    """Stable-Baselines3's stacks of an episode, [T + 1, 4, 84, 84], the last one after its end.

    Also the rewards, and whether the episode was terminated and whether truncated, after each step.
    """
    if noops:
        env = NoopResetEnv(env)
        env.override_num_noops, env.noop_action = noops, nothing
    stacked = VecFrameStack(DummyVecEnv([lambda: WarpFrame(MaxAndSkipEnv(env, skip))]), STACK)
    stacked.seed(seed)
    stacks, rewards, ends = [stacked.reset()[0]], [], []
    for action in actions:
        seen, reward, ended, infos = stacked.step([action])
        stacks.append(infos[0]["terminal_observation"] if ended[0] else seen[0])
        rewards.append(float(reward[0]))
        truncated = bool(infos[0]["TimeLimit.truncated"])
        ends.append((bool(ended[0]) and not truncated, truncated))
    return np.array(stacks).transpose(0, 3, 1, 2), rewards, ends


# Airstriker -----------------------------------------------------------------------------------------------


class Witness:
    """An emulator whose game's memory is read after every frame, whoever else reads it when."""

    def __init__(self, game):
        folder = stable_retro.data.Integrations.ALL
        self._emulator = game._env.em
        self._data = stable_retro.data.GameData()
        self._emulator.configure_data(self._data)
        assert self._data.load(
            *(
                stable_retro.data.get_file_path(game.name, f"{name}.json", folder)
                for name in ("data", "scenario")
            )
        )
        game._env.em = self

    def __getattr__(self, name: str):
        return getattr(self._emulator, name)

    def begin(self) -> None:
        self._data.reset()
        self._data.update_ram()
        self.reward, self.done = 0.0, False

    def step(self) -> None:
        self._emulator.step()
        if not self.done:
            self._data.update_ram()
            self.reward += self._data.current_reward(0)
            self.done = bool(self._data.is_done())

    def seen(self) -> tuple[float, bool]:
        """Reward and end since it was last asked."""
        reward, self.reward = self.reward, 0.0
        return reward, self.done


SAVED_AT = 150  # steps


@pytest.fixture(scope="module")
def airstriker() -> tuple[list[Played], list[list[tuple[float, bool]]], bytes]:
    """Twenty whole episodes of random actions; what a reader of every frame saw; a save state of the first one."""
    random, episodes, witnessed, saved = np.random.default_rng(7), [], [], b""
    noops_of_each = [30, 0, 1, *(int(each) for each in random.integers(31, size=17))]
    with playing() as game:
        witness = Witness(game)
        witness.begin()
        for number, noops in enumerate(noops_of_each):
            played = Played(number, noops, frames=[begin(game, number, noops)])
            witness.begin()
            seen: list[tuple[float, bool]] = []
            while not seen or not seen[-1][1]:
                if (number, len(seen)) == (0, SAVED_AT):
                    saved = game.save()
                played.actions.append(int(random.integers(game.actions)))
                played.take(game.step(played.actions[-1]))
                seen.append(witness.seen())
            episodes.append(played)
            witnessed.append(seen)
    return episodes, witnessed, saved


@pytest.mark.engine
def test_frames_rewards_and_ends_of_airstriker_are_those_of_stable_baselines3(airstriker):
    episodes, _, _ = airstriker
    with emulator() as env:
        for played in episodes[:3]:
            stacks, rewards, ends = reference(env, played.seed, played.noops, played.actions)
            assert played.rewards == rewards
            assert played.ends == ends
            assert np.array_equal(played.frames[:-1], stacks[:-1, -1])
            assert played.frames[-1] is None, "nobody looks at it"
            assert len(played.actions) > 100
            assert len(set(rewards)) > 1


@pytest.mark.engine
def test_one_reading_a_step_misses_no_reward_and_no_end_of_airstriker(airstriker):
    assert AIRSTRIKER in READ_ONCE_A_STEP
    episodes, witnessed, _ = airstriker
    assert len(episodes) == 20
    for played, seen in zip(episodes, witnessed, strict=True):
        assert list(zip(played.rewards, (end for end, _ in played.ends), strict=True)) == seen
        assert played.ends[-1] == (True, False)


@pytest.mark.engine
def test_a_game_whose_memory_is_read_after_every_frame_plays_the_same(airstriker, monkeypatch):
    played = airstriker[0][1]
    monkeypatch.setattr(games, "READ_ONCE_A_STEP", ())
    with playing() as game:
        again = Played(played.seed, played.noops, frames=[begin(game, played.seed, played.noops)])
        for action in played.actions:
            again.take(game.step(action))
    assert (again.rewards, again.ends) == (played.rewards, played.ends)
    assert np.array_equal(again.frames[:-1], played.frames[:-1])


@pytest.mark.engine
def test_a_save_state_leads_to_the_same_frames_and_rewards_in_another_emulator(airstriker):
    first, saved = airstriker[0][0], airstriker[2]
    assert 1000 < len(saved) < 50_000
    with playing() as game:
        play(game, 1, 3, np.random.default_rng(1), most=60)  # another score: nothing of it may be counted
        for _ in range(2):
            game.restore(saved)
            again = Played(0, 0)
            for action in first.actions[SAVED_AT:]:
                again.take(game.step(action))
            assert again.rewards == first.rewards[SAVED_AT:]
            assert again.ends == first.ends[SAVED_AT:]
            assert np.array_equal(again.frames[:-1], first.frames[SAVED_AT + 1 : -1])
    with playing() as game:  # one that has played nothing
        game.restore(saved)
        assert np.array_equal(game.step(first.actions[SAVED_AT]).frame, first.frames[SAVED_AT + 1])


@pytest.mark.engine
def test_an_episode_that_is_played_again_is_the_same(airstriker):
    played = airstriker[0][3]
    half = len(played.actions) // 2
    with playing() as game:
        replay(game, Episode(played.seed, played.noops, np.array(played.actions[:half], np.uint16).tobytes()))
        again = Played(0, 0)
        for action in played.actions[half:]:
            again.take(game.step(action))
        assert again.rewards == played.rewards[half:]
        assert np.array_equal(again.frames[:-1], played.frames[half + 1 : -1])
        assert again.ends[-1] == (True, False)
        assert game.screen().shape == (224, 320, 3)


@pytest.mark.engine
@pytest.mark.parametrize("skip", [1, 2])
def test_an_action_may_be_held_for_another_number_of_frames(skip):
    with playing(skip=skip) as game:
        played = play(game, 0, 5, np.random.default_rng(skip), most=80)
    with emulator() as env:
        stacks, rewards, ends = reference(env, 0, 5, played.actions, skip)
    assert played.rewards == rewards
    assert set(ends) == {(False, False)}
    assert np.array_equal(played.frames, stacks[:, -1])


# A gymnasium environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, 2, 4])
@pytest.mark.parametrize("actions", ["discrete", "binary", "several", "continuous"])
def test_frames_rewards_and_ends_of_a_gymnasium_environment_are_those_of_stable_baselines3(actions, skip):
    table, options = ACTIONS[actions][1], {"actions": actions, "ends": 0.02, "cuts": 0.02}
    with playing("Splashes-v0", skip=skip, options=options) as game:
        assert game.actions == len(table)
        ends_seen = set()
        for seed, noops in ((11, 0), (12, 1), (13, 30), (14, 7)):
            played = play(game, seed, noops, np.random.default_rng(seed))
            stacks, rewards, ends = reference(
                Splashes(**options), seed, noops, [table[each] for each in played.actions], skip, table[0]
            )
            assert np.allclose(played.rewards, rewards, rtol=1e-6)
            assert played.ends == ends
            assert np.array_equal(played.frames[:-1], stacks[:-1, -1])
            ends_seen.add(played.ends[-1])
        assert len(ends_seen) > 1


@pytest.mark.parametrize(
    ("actions", "parts"),
    [("discrete", (4,)), ("binary", (2, 2, 2)), ("several", (2, 3)), ("continuous", (5,))],
)
def test_the_parts_of_an_action_are_those_of_its_space(actions, parts):
    table = ACTIONS[actions][1]
    with playing("Splashes-v0", options={"actions": actions}) as game:
        assert game.parts == parts
        if len(parts) > 1:
            chosen = [np.unravel_index(action, parts) for action in range(game.actions)]
            assert np.array_equal(np.array(chosen), np.array(table).reshape(len(table), -1))


def test_each_part_of_a_console_games_action_presses_its_own_buttons():
    with playing() as game:
        sizes = game.parts
    assert sizes == (14, 3, 3)
    with emulator() as env:
        pressed = [env.action_to_array(action)[0].astype(bool) for action in range(math.prod(sizes))]
    for action, buttons in enumerate(pressed):
        parts = np.unravel_index(action, sizes)
        alone = [
            [choice if part == number else 0 for number in range(3)] for part, choice in enumerate(parts)
        ]
        joined = np.any([pressed[np.ravel_multi_index(each, sizes)] for each in alone], axis=0)
        assert np.array_equal(buttons, joined)


@pytest.mark.filterwarnings("ignore:.*share an object")
def test_an_environment_that_draws_into_one_array_is_seen_like_any_other():
    seen = []
    for in_place in (False, True):
        with playing("Splashes-v0", skip=2, options={"in_place": in_place}) as game:
            seen.append(play(game, 5, 3, np.random.default_rng(5), most=10).frames)
    assert np.array_equal(*seen)


def test_the_frame_after_a_truncated_step_is_the_maximum_of_the_last_two():
    options = {"cuts": 0.1}
    with playing("Splashes-v0", skip=2, options=options) as game:
        steps = [begin(game, 3, 2)]
        while isinstance(steps[-1], np.ndarray) or not steps[-1].truncated:
            steps.append(game.step(1))
    stacks, _, ends = reference(Splashes(**options), 3, 2, [3] * (len(steps) - 1), skip=2)
    assert ends[-1] == (False, True)
    assert np.array_equal(steps[-1].frame, stacks[-1, -1])


def test_an_episode_that_ends_before_its_first_step_is_begun_anew_with_other_numbers():
    with playing("Splashes-v0", options={"early": 10}) as game:
        assert begin(game, 0, 9) is not None
        assert begin(game, 0, 10) is None
        actor, _ = make_actor(game, steps=4)
        for seed in range(10):
            assert actor.begin(0, new_stream(seed, 0, 0))["noops"] < 10


def test_an_image_is_found_in_a_dictionary_or_named():
    options = {"inside": True}
    with playing("Splashes-v0", options={}) as game:
        plain = begin(game, 1, 2)
    for image in (None, "left", "eyes/left"):
        with playing("Splashes-v0", options=options, image=image) as game:
            assert np.array_equal(begin(game, 1, 2), plain)
            assert game.screen().shape == (100, 140, 3)
    with playing("Splashes-v0", options=options, image="right") as game:
        assert not begin(game, 1, 2).any()
        assert game.screen().shape == (30, 20, 3)


# The actor ------------------------------------------------------------------------------------------------


def make_actor(game, steps: int, max_steps: int = 15, noops: int = 30) -> tuple[Actor, dict[str, np.ndarray]]:
    """An actor with room for two slices, and a policy that prefers some actions."""
    layout = Layout(1, 2, steps, game.actions)
    arrays = arrays_in(bytearray(nbytes(layout.table)), layout.table)
    arrays["frames"][:-1] = 77  # what nobody writes shows
    arrays["versions"][:] = -1
    publish(layout, arrays, views(make_network(game.actions).flat(), game.actions), 0)
    return Actor(game, layout, arrays, max_steps, noops), arrays


def make_network(actions: int) -> ActorCritic:
    torch.manual_seed(3)
    network = ActorCritic((actions,))
    with torch.no_grad():
        network.actor.weight *= 50
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return network


KEPT = ("ages", "actions", "log_probs", "values", "rewards", "ended", "bootstraps")


def collect(
    actor: Actor, arrays, lengths, exploration: float = 0.0
) -> list[tuple[Filled, dict[str, np.ndarray]]]:
    """Slices of these lengths, each with a copy of its arrays, its stacks and the value after it."""
    slices = []
    for number, steps in enumerate(lengths):
        filled = actor.fill(Task(0, number, number % 2, steps, 0, exploration))
        slices.append((filled, contents(actor, arrays, filled)))
    return slices


def contents(actor: Actor, arrays, filled: Filled) -> dict[str, np.ndarray]:
    found = {name: arrays[name][filled.buffer, 0, : filled.steps].copy() for name in KEPT}
    ages = arrays["ages"][filled.buffer, 0, : filled.steps + 1]
    found["stacks"] = arrays["frames"][actor._layout.stacks(filled.buffer, 0, ages)]
    found["last_value"] = arrays["last_values"][filled.buffer, 0].copy()
    return found


LENGTHS = (7, 1, 2, 20, 3, 3, 20, 1, 1, 13, 20, 20, 20)
HARD = {"actions": "several", "ends": 0.15, "cuts": 0.05}


@pytest.fixture(scope="module")
def collected():
    """Slices of an environment whose episodes end by the rules, from outside, and after 15 steps."""
    with playing("Splashes-v0", skip=2, options=HARD) as game:
        actor, arrays = make_actor(game, 20)
        actor.begin(0, new_stream(0, 0, 0))
        return collect(actor, arrays, LENGTHS, exploration=0.2)


def whole(slices, name: str) -> np.ndarray:
    return np.concatenate([content[name][: filled.steps] for filled, content in slices])


def episodes_of(slices) -> list[Episode]:
    """Those that have ended, and the one that has not."""
    state = slices[-1][0].state
    ended = [episode for filled, _ in slices for episode in filled.episodes]
    return [*ended, Episode(state["seed"], state["noops"], state["actions"], state["score"])]


def references(slices) -> list[tuple[np.ndarray, list[float], list[tuple[bool, bool]]]]:
    """The reference of each episode, from what was remembered of it."""
    table = ACTIONS["several"][1]
    return [
        reference(
            Splashes(**HARD),
            episode.seed,
            episode.noops,
            [table[each] for each in np.frombuffer(episode.actions, np.uint16)],
            skip=2,
            nothing=table[0],
        )
        for episode in episodes_of(slices)
    ]


def test_stacks_across_slices_and_episodes_are_those_of_stable_baselines3(collected):
    episodes = references(collected)
    stacks = np.concatenate([seen[:-1] for seen, _, _ in episodes])
    assert np.array_equal(whole(collected, "stacks"), stacks)
    rewards = [reward for _, rewards, _ in episodes for reward in rewards]
    assert np.allclose(whole(collected, "rewards"), rewards, rtol=1e-5)
    scores = [sum(rewards) for _, rewards, _ in episodes]
    assert np.allclose([episode.score for episode in episodes_of(collected)], scores, rtol=1e-5)
    lengths = [len(rewards) for _, rewards, _ in episodes]
    assert np.flatnonzero(whole(collected, "ended")).tolist() == (np.cumsum(lengths[:-1]) - 1).tolist()
    for (_, content), (_, after) in pairwise(collected):
        assert np.array_equal(content["stacks"][-1], after["stacks"][0])
        assert content["last_value"] == after["values"][0]


def test_values_and_log_probabilities_are_those_of_the_trainers_network(collected):
    with torch.no_grad():
        logits, values = make_network(6)(torch.from_numpy(whole(collected, "stacks")))
    share = torch.softmax(logits.double(), -1).numpy()
    chosen = whole(collected, "actions")
    mixture = 0.8 * share[np.arange(len(chosen)), chosen] + 0.2 / 6
    assert np.allclose(whole(collected, "values"), values.numpy(), atol=1e-4)
    assert np.allclose(whole(collected, "log_probs"), np.log(mixture), atol=1e-4)


def test_a_truncated_episode_goes_on_with_the_value_of_its_last_observation(collected):
    network, step, kinds = make_network(6), 0, []
    found = whole(collected, "bootstraps")
    for stacks, rewards, ends in references(collected)[:-1]:
        expected = np.zeros(len(rewards))
        terminated, truncated = ends[-1]
        kinds.append("over" if terminated else "cut off" if truncated else "time limit")
        if not terminated:
            with torch.no_grad():
                expected[-1] = network(torch.from_numpy(stacks[-1:]))[1].item()
            assert abs(expected[-1]) > 0.01
        if kinds[-1] == "time limit":
            assert len(rewards) == 15
        assert np.allclose(found[step : step + len(rewards)], expected, atol=1e-4), kinds[-1]
        step += len(rewards)
    assert set(kinds) == {"over", "cut off", "time limit"}


def test_a_slice_begun_from_its_state_by_another_actor_is_the_same_to_the_bit(collected):
    states = [None, *(filled.state for filled, _ in collected)]
    for number, (filled, content) in enumerate(collected):
        if number == 0:
            continue
        with playing("Splashes-v0", skip=2, options=HARD) as game:
            actor, arrays = make_actor(game, 20)
            again = actor.fill(Task(0, number, 1, filled.steps, 0, 0.2, states[number]))
            for name, value in contents(actor, arrays, again).items():
                assert np.array_equal(value, content[name]), (number, name)
            assert again.episodes == filled.episodes
            assert again.state.keys() == filled.state.keys()
            for name, value in again.state.items():
                assert np.array_equal(value, filled.state[name]), (number, name)


@pytest.mark.engine
def test_a_slice_of_airstriker_begun_from_its_state_is_the_same_to_the_bit():
    with playing() as game:
        actor, arrays = make_actor(game, 40, max_steps=55)
        actor.begin(0, new_stream(1, 0, 0))
        slices = collect(actor, arrays, (1, 40, 40))
    assert any(filled.episodes for filled, _ in slices)
    for number in (1, 2):
        with playing() as game:
            actor, arrays = make_actor(game, 40, max_steps=55)
            again = actor.fill(Task(0, number, 0, 40, 0, 0.0, slices[number - 1][0].state))
            for name, value in contents(actor, arrays, again).items():
                assert np.array_equal(value, slices[number][1][name]), (number, name)
            assert again.episodes == slices[number][0].episodes


def test_a_worker_that_was_not_told_where_a_slice_begins_refuses_it():
    with playing("Splashes-v0") as game:
        actor, _ = make_actor(game, 4)
        actor.begin(0, new_stream(0, 0, 0))
        with pytest.raises(RuntimeError, match=r"at \(0, 0\), not at slice 1 of 0"):
            actor.fill(Task(0, 1, 0, 4, 0))
        with pytest.raises(RuntimeError, match=r"weights 5 are not there, but \[0, -1\]"):
            actor.fill(Task(0, 0, 0, 4, 5))


def test_the_network_of_workers_is_that_of_the_trainer():
    network = make_network(5)
    acting = FramePolicy(5)
    acting.load(views(network.flat(), 5))
    random = np.random.default_rng(0)
    for length in (1, 2, 3, 11, 4):  # the newest frame at every place, and after each a new episode
        frames = np.zeros((STACK - 1 + length, 84, 84), np.uint8)
        frames[STACK - 1 :] = random.integers(0, 256, (length, 84, 84))
        acting.clear()
        for number in range(length):
            acting.show(frames[STACK - 1 + number], number)
            with torch.no_grad():
                logits, value = network(torch.from_numpy(frames[None, number : number + STACK]))
            found, found_value = acting(number)
            assert np.allclose(found, logits[0].numpy(), atol=1e-4)
            assert abs(found_value - value.item()) < 1e-4
            assert np.ptp(found) > 0.01, "not zeros"


def test_the_layout_gives_black_to_what_was_before_an_episode():
    layout = Layout(workers=2, buffers=2, steps=5, actions=3)
    own, black = layout.first_frame(1, 0), layout.table["frames"][0][0] - 1
    assert own == 2 * layout.positions + 3
    assert layout.stacks(1, 0, np.array([1, 2, 0, 1, 3])).tolist() == [
        [black, black, own - 1, own],
        [black, own - 1, own, own + 1],
        [black, black, black, own + 2],
        [black, black, own + 2, own + 3],
        [own + 1, own + 2, own + 3, own + 4],
    ]


# Names and what is refused --------------------------------------------------------------------------------


def test_a_short_name_is_that_of_the_first_version():
    assert resolve("Jackal-Nes", stable_retro) == "Jackal-Nes-v0"
    assert resolve(AIRSTRIKER, stable_retro) == AIRSTRIKER
    assert GameSpec("Jackal-Nes").is_retro
    assert not GameSpec("Splashes-v0").is_retro
    assert not GameSpec("tests.support.games:Dot-v0").is_retro


def refusal(name: str, **spec) -> str:
    """The error of a game that cannot be played."""
    with pytest.raises(InputError) as error:
        make_game(GameSpec(name, **spec))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.tried(
    "The ROM of a game of `pi0.parallel` is not there",
    "An error with the game, the ROM's SHA-1 and the command that imports it",
)
def test_a_missing_rom_is_named_with_its_checksum_and_the_command(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no romfiles found")  # as here, where nobody has imported one

    monkeypatch.setattr(stable_retro.data, "get_romfile_path", missing)
    error = refusal("Jackal-Nes")
    assert "'Jackal-Nes-v0'" in error
    assert "813e6a8bc0a502bb393f8729b1bc19836d5421a5" in error
    assert "python -m stable_retro.import FOLDER" in error


@pytest.mark.tried("The name of a game of `pi0.parallel` is misspelt", "An error with the nearest names")
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Airstrike-Genesis", AIRSTRIKER),
        ("airstriker-genesis-v0", AIRSTRIKER),
        ("Splash-v0", "Splashes-v0"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_ones(name, near):
    error = refusal(name)
    assert f"game = {name!r}: there is no such game; did you mean" in error
    assert near in error


def test_a_name_like_no_other_is_an_error_that_says_how_games_are_named():
    error = refusal("qqqq")
    assert "did you mean" not in error
    assert "package.module:ID" in error


@pytest.mark.tried(
    "A package, or an environment in it, of `--game` is not there", "An error with the game and the reason"
)
@pytest.mark.parametrize(
    ("name", "why"),
    [("no_such_package:Game-v0", "no_such_package"), ("tests.support.games:Nothing-v0", "Nothing")],
)
def test_an_environment_that_is_not_there_is_named(name, why):
    error = refusal(name)
    assert error.startswith(f"game = {name!r}: ")
    assert why in error.partition(": ")[2]


def test_an_unknown_state_is_an_error_with_those_that_the_game_has():
    assert refusal(AIRSTRIKER, state="Level9") == f"state = 'Level9': {AIRSTRIKER} has Level1"


def test_without_the_emulators_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(AIRSTRIKER).endswith("not installed: run `make game` to install it")


@pytest.mark.tried(
    "An environment of `--game` has no images", "An error that says which images its observations need"
)
def test_an_environment_without_images_is_refused():
    assert refusal("CartPole-v1") == (
        "game = 'CartPole-v1': its observations have no images, uint8 [height, width, 1 or 3]"
    )
    error = refusal("Splashes-v0", options={"inside": True}, image="centre")
    assert error == "game = 'Splashes-v0': image = 'centre': its observations have eyes/left, eyes/right"


@pytest.mark.parametrize("actions", ["unbounded", "countless", "words"])
def test_actions_that_cannot_be_listed_are_refused(actions):
    assert "cannot be listed" in refusal("Splashes-v0", options={"actions": actions})


def test_an_option_that_the_environment_does_not_know_is_named():
    assert "colour" in refusal("Splashes-v0", options={"colour": 1})


def test_options_are_json_or_text():
    given = ["task=3", "name=a=b", "list=[1, 2]", 'quoted="7"', "on=true", "empty="]
    assert parse_options(given) == {
        "task": 3,
        "name": "a=b",
        "list": [1, 2],
        "quoted": "7",
        "on": True,
        "empty": "",
    }


@pytest.mark.parametrize("text", ["task", "=3", ""])
def test_an_option_without_key_or_value_is_refused(text):
    with pytest.raises(InputError, match=rf"game_options: '{text}': expected KEY=VALUE, such as task=3"):
        parse_options([text])
