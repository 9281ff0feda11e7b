"""Games as workers play them: a console game in a retro emulator, or any gymnasium environment that shows images.

Loading torch takes memory in every worker, so nothing here, nor in `policy`, `actor` and `worker`, imports it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import itertools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import gymnasium
import numpy as np

from pi0.base.errors import InputError

SIDE = 84  # pixels of a frame as the policy sees it (Mnih et al. 2015)
INSTALL = "run `make game` to install it"
# Games of which it was tested that one reading of the memory at the end of a step misses no end of an episode and
# no reward (tests/test_parallel_games.py). A reading takes a quarter of the time of a frame.
READ_ONCE_A_STEP = ("Airstriker-Genesis-v0",)


@dataclass(frozen=True)
class GameSpec:
    """A game and how it is played.

    Attributes:
        name: of the retro game, or the id of a gymnasium environment ("CarRacing-v3", "package.module:Name-v0").
        state: save state of a retro game to start from; None for the game's own.
        skip: frames that each action is held; the policy sees the maximum of the last two.
        options: arguments of `gymnasium.make`.
        image: key of the image where an environment's observation is a dictionary; None for the first image in it.
    """

    name: str
    state: str | None = None
    skip: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None

    @property
    def is_retro(self) -> bool:
        """Whether it is a console game, and no gymnasium environment."""
        return ":" not in self.name and self.name not in gymnasium.registry

    def packages(self) -> dict[str, str]:
        """Versions of the installed packages that play the game: another one may play another game."""
        if self.is_retro:
            return {"stable-retro": metadata.version("stable-retro")}
        home, _, name = self.name.rpartition(":")
        if home:
            importlib.import_module(home)  # which registers the environment
        entry = gymnasium.spec(name).entry_point
        module = entry if isinstance(entry, str) else entry.__module__
        owners = metadata.packages_distributions().get(
            module.partition(".")[0], []
        )  # a module of one's own: none
        return {name: metadata.version(name) for name in dict.fromkeys(("gymnasium", *owners))}


class Step(NamedTuple):
    """What a step led to.

    Attributes:
        frame: uint8 [84, 84], grey; None where the episode has terminated and nobody will look.
        reward: sum over the frames of the step.
        terminated: the game is over.
        truncated: the environment itself stopped the episode.
    """

    frame: np.ndarray | None
    reward: float
    terminated: bool
    truncated: bool


class Game(Protocol):
    """A game in this process.

    Attributes:
        parts: choices of each part of an action, such as buttons and axes of a pad; a game that has plain actions has
            one part.
        actions: number of actions, all combinations of `parts`, the last part changing fastest (NumPy's C order).
            Action 0 does nothing, where the game has such an action.
        shares_process: whether several can be in one process.
    """

    parts: tuple[int, ...]
    actions: int
    shares_process: bool

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode; returns its first frame, uint8 [84, 84]."""

    def noop(self, frames: int) -> np.ndarray | None:
        """Do nothing for so many single frames; returns the frame after them, or None if the episode has ended."""

    def step(self, action: int) -> Step:
        """Hold an action for `skip` frames."""

    def save(self) -> bytes:
        """All that the game is now; empty if only playing the episode again leads here."""

    def restore(self, saved: bytes) -> None:
        """Continue from what `save` returned, which was not empty."""

    def screen(self) -> np.ndarray:
        """The game as a person sees it, uint8 [height, width, 3]."""

    def close(self) -> None:
        """End it."""


def make_game(spec: GameSpec) -> Game:
    """The game of a specification.

    Raises:
        InputError: there is no such game, or it is not installed, or it has no images or no actions to choose from.
    """
    return RetroWrapper(spec) if spec.is_retro else GymGame(spec)


def resolve(name: str, retro: Any) -> str:
    """The full name of a retro game: `Jackal-Nes` is `Jackal-Nes-v0`.

    Raises:
        InputError: there is no such game.
    """
    known = retro.data.list_games(inttype=retro.data.Integrations.ALL)
    for candidate in (name, f"{name}-v0"):
        if candidate in known:
            return candidate
    environments = [each for each in gymnasium.registry if not each.startswith("GymV")]
    near = difflib.get_close_matches(name, [*known, *environments], 4, 0.5)
    meant = f"; did you mean {', '.join(near)}?" if near else "."
    raise InputError(
        f"game = {name!r}: there is no such game{meant} "
        "A gymnasium environment is named by its id, one of another package as package.module:ID"
    )


def import_retro() -> Any:
    """The package of the emulator, which is an optional requirement.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("stable_retro") is None:
        raise InputError(f"console games need the package stable-retro, which is not installed: {INSTALL}")
    import stable_retro

    return stable_retro


class RetroWrapper:
    """A console game: frames skipped, greyed and scaled as Stable-Baselines3's wrappers do it, but drawn only if seen.

    It drives the emulator itself. `RetroEnv.step` copies the screen and reads the memory at every frame; here only
    the last two of a step are copied. Actions are retro's discrete ones, which leave out buttons such as START that
    would spoil the score.
    """

    shares_process = False  # the emulator keeps its state in global variables

    def __init__(self, spec: GameSpec):
        retro = import_retro()
        name = resolve(spec.name, retro)
        integrations = retro.data.Integrations.ALL
        try:
            retro.data.get_romfile_path(name, integrations)
        except FileNotFoundError:
            expected = Path(retro.data.get_file_path(name, "rom.sha", integrations)).read_text().split()
            raise InputError(
                f"game = {name!r}: its ROM is not there. Get a copy that you may use, whose SHA-1 is "
                f"{' or '.join(expected)}, put it into a folder and run: python -m stable_retro.import FOLDER"
            ) from None
        states = retro.data.list_states(name, integrations)
        if spec.state is not None and spec.state not in states:
            raise InputError(f"state = {spec.state!r}: {name} has {', '.join(states) or 'no states'}")
        self._env = retro.make(
            name,
            state=spec.state or retro.State.DEFAULT,
            inttype=integrations,
            use_restricted_actions=retro.Actions.DISCRETE,
            render_mode="rgb_array",
        )
        self.name = name
        self.parts = tuple(len(buttons) for buttons in reversed(self._env.button_combos))
        self.actions = int(self._env.action_space.n)
        assert math.prod(self.parts) == self.actions
        self._skip = spec.skip
        self._read_often = name not in READ_ONCE_A_STEP
        self._masks = [self._env.action_to_array(action)[0] for action in range(self.actions)]
        self._screens: list[np.ndarray] = []
        self._state_bytes = 0

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode from the game's first state. The emulator has no randomness for the seed to reach."""
        screen, _ = self._env.reset(seed=seed)
        self._screens = [screen, screen]
        return small_grey(screen)

    def noop(self, frames: int) -> np.ndarray | None:
        """Do nothing for so many single frames."""
        screen = self._screens[-1]
        for _ in range(frames):
            screen, _, done, _, _ = self._env.step(0)
            if done:
                return None
        self._screens = [screen, screen]
        return small_grey(screen)

    def step(self, action: int) -> Step:
        """Hold an action for `skip` frames."""
        env = self._env
        emulator, data = env.em, env.data
        emulator.set_button_mask(self._masks[action], 0)
        reward, done = 0.0, False
        for frame in range(self._skip):
            emulator.step()
            if frame == self._skip - 2 or frame == self._skip - 1:
                self._screens = [self._screens[-1], env.get_screen(apply_rotation=True)]
            if self._read_often or frame == self._skip - 1:
                data.update_ram()
                reward += data.current_reward(0)
                done = bool(data.is_done())
                if done:
                    break
        if done:
            return Step(None, reward, True, False)
        seen = np.maximum(*self._screens) if self._skip > 1 else self._screens[-1]
        return Step(small_grey(seen), reward, False, False)

    def save(self) -> bytes:
        """The emulator's save state, compressed (a Genesis game: 1 MB, 12 KB compressed)."""
        # The emulator fills a fifth of what it returns; the rest is whatever was in that memory. It is likely to get the
        # memory that these zeros leave, and then little is left of the rest.
        bytes(self._state_bytes)
        state = self._env.em.get_state()
        self._state_bytes = len(state)
        return zlib.compress(state, 1)

    def restore(self, saved: bytes) -> None:
        """Continue from a save state; the game's memory is read, so that the next reward is counted from it."""
        if not self._screens:
            self.reset(0)
        self._env.em.set_state(zlib.decompress(saved))
        self._env.data.reset()
        self._env.data.update_ram()

    def screen(self) -> np.ndarray:
        """The last screen."""
        return self._screens[-1]

    def close(self) -> None:
        """End the emulator."""
        self._env.close()


class GymGame:
    """A gymnasium environment whose observation is an image, or a dictionary with one.

    Discrete, multi-discrete and binary actions become one list of all combinations. Continuous ones become: the
    middle of the range, and for each number its lowest and its highest value with the others in the middle.
    """

    shares_process = True

    def __init__(self, spec: GameSpec):
        try:
            self._env = gymnasium.make(spec.name, render_mode="rgb_array", **spec.options)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"game = {spec.name!r}: {text}") from error
        self._key = _image_key(spec, self._env.observation_space)
        self._table, self.parts = _action_table(spec.name, self._env.action_space)
        self.actions = len(self._table)
        self._skip = spec.skip
        self._last: np.ndarray = np.zeros((SIDE, SIDE, 3), np.uint8)

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode with a seed."""
        observation, _ = self._env.reset(seed=seed)
        return small_grey(self._see(observation))

    def noop(self, frames: int) -> np.ndarray | None:
        """Take action 0 for so many single steps of the environment."""
        for _ in range(frames):
            observation, _, terminated, truncated, _ = self._env.step(self._table[0])
            if terminated or truncated:
                return None
            self._see(observation)
        return small_grey(self._last)

    def step(self, action: int) -> Step:
        """Hold an action for `skip` steps of the environment."""
        total = 0.0
        for _ in range(self._skip):
            before = self._last
            observation, reward, terminated, truncated, _ = self._env.step(self._table[action])
            image = self._see(observation)
            total += float(reward)
            if terminated or truncated:
                break
        seen = np.maximum(before, image) if self._skip > 1 else image
        return Step(small_grey(seen), total, bool(terminated), bool(truncated))

    def save(self) -> bytes:
        """Nothing: environments have no common way to save themselves, so an episode is played again."""
        return b""

    def restore(self, saved: bytes) -> None:
        """Never called."""
        raise NotImplementedError

    def screen(self) -> np.ndarray:
        """The last image that the policy saw, in colour where the environment has it."""
        return (
            np.broadcast_to(self._last, (*self._last.shape[:2], 3))
            if self._last.ndim == 3
            else (np.repeat(self._last[..., None], 3, -1))
        )

    def close(self) -> None:
        """End the environment."""
        self._env.close()

    def _see(self, observation: Any) -> np.ndarray:
        image = observation
        for key in self._key:
            image = image[key]
        self._last = np.array(image)  # an environment may draw the next one into the same array
        return self._last


def small_grey(screen: np.ndarray) -> np.ndarray:
    """A screen, uint8 [height, width, 3] or [height, width], as uint8 [84, 84], as `WarpFrame` of Stable-Baselines3."""
    grey = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY) if screen.ndim == 3 and screen.shape[2] == 3 else screen
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _image_key(spec: GameSpec, space: gymnasium.Space) -> tuple[str, ...]:
    """Where in an observation the image is."""

    def images(space: gymnasium.Space, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if isinstance(space, gymnasium.spaces.Dict):
            return [found for key, inner in space.spaces.items() for found in images(inner, (*path, key))]
        shape = space.shape or ()
        is_image = space.dtype == np.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)))
        return [path] if is_image else []

    found = images(space, ())
    chosen = [
        path
        for path in found
        if spec.image is None or "/".join(path) == spec.image or path[-1:] == (spec.image,)
    ]
    if not chosen:
        there = ", ".join("/".join(path) for path in found) or "no images, uint8 [height, width, 1 or 3]"
        wanted = "" if spec.image is None else f"image = {spec.image!r}: "
        raise InputError(f"game = {spec.name!r}: {wanted}its observations have {there}")
    return chosen[0]


def _action_table(name: str, space: gymnasium.Space) -> tuple[Sequence[Any], tuple[int, ...]]:
    """The actions to choose from, each as the environment takes it, and their `Game.parts`."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Discrete):
        return [int(space.start) + action for action in range(int(space.n))], (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        sizes = (
            space.nvec.ravel() if isinstance(space, spaces.MultiDiscrete) else [2] * int(np.prod(space.shape))
        )
        if np.prod(np.asarray(sizes, float)) <= 1024:
            parts = tuple(int(size) for size in sizes)
            combinations = itertools.product(*map(range, parts))
            return [np.array(each, space.dtype).reshape(space.shape) for each in combinations], parts
    if isinstance(space, spaces.Box) and space.is_bounded():
        middle = ((space.low + space.high) / 2).astype(space.dtype)
        table = [middle]
        for index in np.ndindex(*space.shape):
            for end in (space.low, space.high):
                action = middle.copy()
                action[index] = end[index]
                table.append(action)
        return table, (len(table),)
    raise InputError(f"game = {name!r}: actions of {space} cannot be listed; wrap the environment")


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments for `gymnasium.make` from "KEY=VALUE" texts; a value is JSON, else text.

    Raises:
        InputError: a text has no `=`.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise InputError(f"game_options: {text!r}: expected KEY=VALUE, such as task=3")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
