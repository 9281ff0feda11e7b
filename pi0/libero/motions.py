"""Scripted motions of the hand for what is not picked up: drawers, a stove's knob, a plate that is pushed.

They use privileged state, and the places of handles and knobs, which the joints and regions of LIBERO's fixtures give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

from pi0.libero.stepping import TaskSim

OPEN, CLOSED = -1.0, 1.0
GAIN = 16.0  # action per metre of position error; 20 would cancel it in one step if the arm followed at once
TURN_GAIN = 0.8  # action per radian of orientation error; 2 would cancel it in one step
REACHED = 0.02  # m
TURNED = 0.12  # rad
STALLED = 12  # control steps without progress: something is in the way, so the next move begins
NEARER = 0.001  # m
RADIAN = 0.1  # m that a radian of orientation error counts as
GRIP_STEPS = 12  # the fingers need 8 control steps from open to closed, and some to press
SLIPPED = 0.04  # m that the hand is ahead of a handle when it has slipped off
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Move:
    """One part of a motion.

    Attributes:
        goal: where the hand shall be [3] (m), asked at every step.
        gripper: `OPEN` or `CLOSED`.
        turn: orientation of the hand [3, 3]; None: as it is.
        tolerance: m at which the move is over.
        steps: it lasts so many control steps, whatever is reached; None: until the goal is reached, or nothing moves.
        lost: asked at every step; if so the motion begins again from its first move.
    """

    goal: Callable[[], np.ndarray]
    gripper: float
    turn: np.ndarray | None = None
    tolerance: float = REACHED
    steps: int | None = None
    lost: Callable[[], bool] = lambda: False


class Motion(ABC):
    """Moves of the hand until a predicate of LIBERO holds, again from the first if need be; then those that let go.

    Args:
        sim: the running task; it is read, never changed.
        goal: the predicate, such as ["open", "wooden_cabinet_1_top_region"].
    """

    def __init__(self, sim: TaskSim, goal: list[str]):
        self._sim, self._goal = sim, goal
        self._leaving = False
        self._left: list[Move] = []
        self._done = self._waited = 0
        self._nearest = np.inf
        self._begin(self.moves())

    @abstractmethod
    def moves(self) -> list[Move]:
        """The moves that bring the predicate about, from where things are now."""

    def after(self) -> list[Move]:
        """The moves that follow when it holds."""
        return []

    @property
    def holds(self) -> bool:
        """Whether the predicate holds."""
        return bool(self._sim.libero._eval_predicate(self._goal))

    @property
    def finished(self) -> bool:
        """Whether it has been brought about, and the hand is free."""
        return self._leaving and not self._left

    def action(self) -> np.ndarray:
        """The next action, float64 [7] in [-1, 1]; call it once a control step until it has `finished`."""
        if self.holds and not self._leaving:
            self._leaving = True
            self._begin(self.after())
        elif not self._left and not self._leaving:
            self._begin(self.moves())
        if not self._left:
            return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN])
        move = self._left[0]
        error = move.goal() - self.hand
        turn = np.zeros(3) if move.turn is None else rotation_error(self.orientation, move.turn)
        distance, angle = float(np.linalg.norm(error)), float(np.linalg.norm(turn))
        left = distance + RADIAN * angle
        self._waited = 0 if left < self._nearest - NEARER else self._waited + 1
        self._nearest = min(self._nearest, left)
        self._done += 1
        if move.steps is not None:
            over = self._done >= move.steps
        else:
            over = (distance < move.tolerance and angle < TURNED) or self._waited >= STALLED
        if move.lost():
            self._begin([])
        elif over:
            self._begin(self._left[1:])
        return np.array([*np.clip(GAIN * error, -1, 1), *np.clip(TURN_GAIN * turn, -1, 1), move.gripper])

    @property
    def hand(self) -> np.ndarray:
        """The middle of the fingertips [3] (m)."""
        return self._sim.data.site_xpos[self._sim.hand_site].copy()

    @property
    def orientation(self) -> np.ndarray:
        """The hand's axes in columns [3, 3]: across its fingers, along its width, and where it points."""
        return np.array(self._sim.data.site_xmat[self._sim.hand_site]).reshape(3, 3)

    def _off(self, body: int, radius: float) -> bool:
        """Whether the fingertips are no longer over a round thing."""
        return bool(np.linalg.norm((self.hand - self._sim.data.xpos[body])[:2]) > radius)

    def _begin(self, moves: list[Move]) -> None:
        self._left, self._done, self._waited, self._nearest = list(moves), 0, 0, np.inf


def rotation_error(current: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The rotation [3] (rad) from one orientation to another, in the world's axes."""
    quat, error = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quat, (goal @ current.T).flatten())
    mujoco.mju_quat2Vel(error, quat, 1.0)
    return error


def pointing(direction: np.ndarray, fingers: np.ndarray, current: np.ndarray) -> np.ndarray:
    """The orientation [3, 3] of a hand that points in a direction, with its fingers opening along a line.

    Fingers are alike, so of two such orientations it is the one nearer to the `current` one.
    """
    z = direction / np.linalg.norm(direction)
    x = fingers - z * (fingers @ z)
    x /= np.linalg.norm(x)
    found = [np.stack([side, np.cross(z, side), z], 1) for side in (x, -x)]
    return min(found, key=lambda orientation: float(np.linalg.norm(rotation_error(current, orientation))))


class _OfDrawer(Motion):
    """A drawer: its region gives the middle of its inside, its joint where it opens to."""

    FRONT, HANDLE = 0.09, 0.109  # m from the middle of the inside to the front and to the handle
    TILT = np.radians(80)  # of the hand, from pointing down to pointing at the front

    def __init__(self, sim: TaskSim, goal: list[str]):
        self._site = sim.model.site(goal[-1]).id
        self._joint = sim.model.body_jntadr[sim.model.site_bodyid[self._site]]
        super().__init__(sim, goal)

    @property
    def _outwards(self) -> np.ndarray:
        return -self._sim.data.xaxis[self._joint]

    def _front(self, distance: float) -> np.ndarray:
        return self._sim.data.site_xpos[self._site] + distance * self._outwards

    @property
    def _forwards(self) -> np.ndarray:
        """Where the hand points: at the front, and a little down."""
        return -np.cos(self.TILT) * UP - np.sin(self.TILT) * self._outwards


class OpenDrawer(_OfDrawer):
    """Take the handle from the front, one finger above it and one below, pull, let go and step back."""

    FAR = 1.15  # m, a height at which the hand may turn

    def moves(self) -> list[Move]:
        turn = pointing(self._forwards, UP, self.orientation)
        start = self.hand
        return [
            Move(lambda: np.array([*start[:2], max(start[2], self.FAR)]), OPEN),
            Move(lambda: self._front(self.HANDLE + 0.10) + 0.02 * UP, OPEN, turn),
            Move(lambda: self._front(self.HANDLE), OPEN, turn, tolerance=0.012),
            Move(lambda: self.hand, CLOSED, turn, steps=GRIP_STEPS),
            Move(
                lambda: self.hand + 0.06 * self._outwards,
                CLOSED,
                turn,
                steps=60,
                lost=lambda: (self.hand - self._front(self.HANDLE)) @ self._outwards > SLIPPED,
            ),
        ]

    def after(self) -> list[Move]:
        turn, here = self.orientation, self.hand
        return [
            Move(lambda: here, OPEN, turn, steps=GRIP_STEPS // 2),
            Move(lambda: here + 0.08 * self._outwards, OPEN, turn),
        ]


class CloseDrawer(_OfDrawer):
    """Push the front with closed fingers, the palm behind them, clear of the handles above."""

    TILT = np.radians(40)

    def moves(self) -> list[Move]:
        turn = pointing(self._forwards, np.cross(UP, self._outwards), self.orientation)
        start = self.hand
        return [
            Move(lambda: np.array([*start[:2], max(start[2], 1.2)]), CLOSED),
            Move(lambda: self._front(self.HANDLE + 0.06) + 0.15 * UP, CLOSED, turn),
            Move(lambda: self._front(self.HANDLE + 0.05), CLOSED, turn),
            Move(lambda: self.hand - 0.06 * self._outwards, CLOSED, turn, steps=60),
        ]

    def after(self) -> list[Move]:
        here = self.hand
        return [Move(lambda: here + 0.08 * self._outwards, CLOSED, self.orientation)]


class TurnOn(Motion):
    """Push the lever of a stove's knob round its axis, with closed fingers that lean towards the lever's end."""

    TILT = np.radians(10)
    REACH, BESIDE, ABOVE = (
        0.036,
        0.055,
        0.05,
    )  # m from the axis along the lever, beside the lever, above its foot

    def moves(self) -> list[Move]:
        body = self._sim.model.body(f"{self._goal[-1]}_button").id
        lever = self._sim.data.xmat[body].reshape(3, 3)[:, 1].copy()
        push = np.cross(UP, lever)
        turn = pointing(np.sin(self.TILT) * lever - np.cos(self.TILT) * UP, push, self.orientation)
        start = self._sim.data.xpos[body] + self.REACH * lever - self.BESIDE * push
        return [
            Move(lambda: start - 0.03 * lever + 0.16 * UP, CLOSED, turn),
            Move(lambda: start + 0.045 * UP, CLOSED, turn, tolerance=0.012),
            Move(lambda: start + 0.3 * push + self.ABOVE * UP, CLOSED, turn, steps=70),
            Move(lambda: start + 0.25 * UP, CLOSED, turn),
        ]

    def after(self) -> list[Move]:
        here = self.hand
        return [Move(lambda: here + 0.2 * UP, OPEN, self.orientation)]


class PushPlate(Motion):
    """Press closed fingers into a plate and draw it over the table."""

    PRESS, AHEAD = -0.003, 0.05  # m above the plate's origin that the hand aims at, and ahead of itself

    def moves(self) -> list[Move]:
        plate = self._sim.libero.obj_body_id[self._goal[1]]
        data = self._sim.data

        def ahead() -> np.ndarray:
            way = data.site(self._goal[2]).xpos - data.xpos[plate]
            way[2] = 0.0
            place = self.hand + self.AHEAD * way / max(float(np.linalg.norm(way)), 1e-6)
            return np.array([*place[:2], data.xpos[plate][2] + self.PRESS])

        start = self.hand
        return [
            Move(lambda: np.array([*start[:2], data.xpos[plate][2] + 0.12]), CLOSED),
            Move(lambda: data.xpos[plate] + 0.12 * UP, CLOSED),
            Move(lambda: data.xpos[plate] + self.PRESS * UP, CLOSED, tolerance=0.006),
            Move(ahead, CLOSED, steps=90, lost=lambda: self._off(plate, 0.065)),
        ]


class DrawAside(Motion):
    """Press closed fingers into a bowl and draw it away from a drawer, beside which the hand needs room for it later.

    Args:
        sim: the running task.
        goal: the predicate of the placement: ["in", object, region of a drawer].
    """

    PRESS = 0.01  # m above the bowl's origin that the hand aims at
    ROOM = 0.17  # m sideways between the middles of bowl and drawer

    def __init__(self, sim: TaskSim, goal: list[str]):
        self._site = sim.model.site(goal[2]).id
        joint = sim.model.body_jntadr[sim.model.site_bodyid[self._site]]
        self._side = np.cross(UP, sim.data.xaxis[joint])  # along the drawer's front
        self._thing = sim.libero.obj_body_id[goal[1]]
        if self._sideways(sim) < 0:
            self._side = -self._side
        super().__init__(sim, goal)

    def _sideways(self, sim: TaskSim) -> float:
        return float((sim.data.xpos[self._thing] - sim.data.site_xpos[self._site]) @ self._side)

    @property
    def holds(self) -> bool:
        """Whether there is room."""
        return self._sideways(self._sim) >= self.ROOM

    def moves(self) -> list[Move]:
        data, start = self._sim.data, self.hand

        def ahead() -> np.ndarray:
            place = self.hand + 0.05 * self._side
            return np.array([*place[:2], data.xpos[self._thing][2] + self.PRESS])

        return [
            Move(lambda: np.array([*start[:2], data.xpos[self._thing][2] + 0.15]), CLOSED),
            Move(lambda: data.xpos[self._thing] + 0.15 * UP, CLOSED),
            Move(lambda: data.xpos[self._thing] + self.PRESS * UP, CLOSED, tolerance=0.03),
            Move(ahead, CLOSED, steps=40, lost=lambda: self._off(self._thing, 0.07)),
        ]
