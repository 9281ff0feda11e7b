"""Gymnasium environments for tests of `pi0.parallel`, by their ids as `tests.support.games:NAME`."""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np


class Dot(gymnasium.Env):
    """A dot on a dark image moves left or right; on the right side there is a reward. An episode takes 20 steps.

    Args:
        cliff: at the right edge the dot falls off, with an error.
        only_in: process id in which it can start; elsewhere it raises an error. 0: anywhere.
        once: a file: the 50th step, if it does not find it, makes it and then has the `fault`.
        fault: "hang" takes an hour, "raise" raises an error.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self,
        cliff: bool = False,
        only_in: int = 0,
        once: str = "",
        fault: str = "hang",
        render_mode: str | None = None,
    ):
        self.render_mode = render_mode
        if only_in and os.getpid() != only_in:
            raise OSError("no display here")
        self._cliff, self._once, self._fault = cliff, once, fault
        self._life = 0
        self.observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._age = int(self.np_random.integers(84)), 0
        return self._image(), {}

    def step(self, action):
        self._life += 1
        if self._once and self._life == 50 and is_first(Path(self._once)):
            if self._fault == "hang":
                time.sleep(3600)
            raise ZeroDivisionError("the dot is lost")
        self._age += 1
        self._place = int(np.clip(self._place + 4 * (action - 1), 0, 83))
        if self._cliff and self._place == 83:
            raise ZeroDivisionError("the dot fell off")
        return self._image(), float(self._place > 60), self._age == 20, False, {}

    def _image(self):
        image = np.zeros((84, 84, 3), np.uint8)
        image[:, max(0, self._place - 3) : self._place + 3] = 200
        return image


def is_first(file: Path) -> bool:
    """Whether no other process has made the file, which is there then."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


gymnasium.register("Dot-v0", entry_point=Dot)
