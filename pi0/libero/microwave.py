"""Scripted motions of the hand for a microwave: a mug is put in through the open front, and the door is pushed shut."""

from __future__ import annotations

import numpy as np

from pi0.libero.motions import CLOSED, GRIP_STEPS, OPEN, SLIPPED, UP, Motion, Move, pointing
from pi0.libero.pick_and_place import NoExpertError
from pi0.libero.stepping import TaskSim

# Where a mug is taken (m), from its origin along its own axes: the outer bar of its handle.
HANDLES = {"white_yellow_mug": (0.062, 0.0, 0.060)}


class PutIn(Motion):
    """Take a mug by its handle, which points out of the opening, and put it down inside.

    An upright hand would meet the microwave's top. So the hand points in, and only its fingertips follow the mug.

    Args:
        sim: the running task; it is read, never changed.
        goal: the predicate, such as ["in", "white_yellow_mug_1", "microwave_1_heating_region"].
    Raises:
        NoExpertError: the handle of the thing is unknown.
    """

    TILT = np.radians(50)  # of the hand, from pointing down to pointing in
    ASKEW = np.radians(30)  # from straight in to away from the hinge; straight in, the arm would be stretched
    # Places of the mug's origin (m): from the region's middle away from the hinge, inwards, and above its lower end.
    BEFORE = np.array([0.02, -0.17, 0.04])  # clear of the door, which may lean over the opening
    INSIDE = np.array([-0.015, -0.01, 0.02])
    AWAY = 0.1  # m from the handle at which the hand is free

    def __init__(self, sim: TaskSim, goal: list[str]):
        category = sim.libero.get_object(goal[1]).category_name
        if category not in HANDLES:
            raise NoExpertError(f"{sim.task.name}: no handle is known for {category}")
        self._on_handle = np.array(HANDLES[category])
        self._mug, self._site = sim.libero.obj_body_id[goal[1]], sim.model.site(goal[2]).id
        super().__init__(sim, goal)

    @property
    def holds(self) -> bool:
        """Whether the mug is inside and the hand is away from it."""
        return super().holds and self._from_handle() > self.AWAY

    def moves(self) -> list[Move]:
        aside, inwards, _ = self._axes()
        way = np.cos(self.ASKEW) * inwards + np.sin(self.ASKEW) * aside
        turn = pointing(np.sin(self.TILT) * way - np.cos(self.TILT) * UP, np.cross(way, UP), self.orientation)
        start = self.hand

        def lost() -> bool:
            return self._from_handle() > SLIPPED

        def lifted() -> np.ndarray:
            return np.array([*self.hand[:2], self._carrying(self.BEFORE)[2]])

        return [
            Move(lambda: np.array([*start[:2], max(start[2], 1.15)]), OPEN),
            Move(lambda: self._handle() - 0.06 * way + 0.1 * UP, OPEN, turn),
            Move(self._handle, OPEN, turn, tolerance=0.012),
            Move(self._handle, CLOSED, turn, steps=GRIP_STEPS),
            Move(lifted, CLOSED, turn, lost=lost),
            Move(lambda: self._carrying(self.BEFORE), CLOSED, turn, lost=lost),
            Move(lambda: self._carrying(self.INSIDE), CLOSED, turn, lost=lost),
            Move(lambda: self.hand, OPEN, turn, steps=GRIP_STEPS // 2),
            Move(lambda: self._handle() - 0.15 * inwards, OPEN, turn),
        ]

    def _axes(self) -> np.ndarray:
        """The region's axes in rows [3, 3]: along the front away from the hinge, inwards, and up."""
        return np.array(self._sim.data.site_xmat[self._site]).reshape(3, 3).T

    def _handle(self) -> np.ndarray:
        data = self._sim.data
        return data.xpos[self._mug] + data.xmat[self._mug].reshape(3, 3) @ self._on_handle

    def _from_handle(self) -> float:
        return float(np.linalg.norm(self.hand - self._handle()))

    def _carrying(self, place: np.ndarray) -> np.ndarray:
        """Where the hand is when it holds the mug at a place."""
        data, half_height = self._sim.data, self._sim.model.site_size[self._site][2]
        mug = data.site_xpos[self._site] + (place - [0.0, 0.0, half_height]) @ self._axes()
        return mug + self.hand - data.xpos[self._mug]


class CloseDoor(Motion):
    """Push the door shut round its hinge, with closed fingers that point down at the upper end of its outside."""

    ALONG, ABOVE = 0.17, 0.078  # m from the hinge, and above the middle of the door, where it is pushed
    BESIDE, PUSH = 0.105, -0.015  # m outwards, where the push begins, and where the hand always aims at

    def __init__(self, sim: TaskSim, goal: list[str]):
        self._joint = sim.model.joint(sim.libero.get_object(goal[-1]).joints[0]).id
        super().__init__(sim, goal)

    def moves(self) -> list[Move]:
        turn = pointing(-UP, np.array([0.0, 1.0, 0.0]), self.orientation)
        start = self.hand
        return [
            Move(lambda: np.array([*start[:2], max(start[2], 1.25)]), CLOSED, turn),
            Move(lambda: self._outside(self.BESIDE) + 0.1 * UP, CLOSED, turn),
            Move(lambda: self._outside(self.BESIDE), CLOSED, turn),
            Move(lambda: self._outside(self.PUSH), CLOSED, turn, steps=100),
        ]

    def after(self) -> list[Move]:
        here = self.hand
        return [Move(lambda: here + 0.15 * UP, CLOSED, self.orientation)]

    def _outside(self, outwards: float) -> np.ndarray:
        """A place at the door as it stands now."""
        door = self._sim.data.xmat[self._sim.model.jnt_bodyid[self._joint]].reshape(3, 3)
        return self._sim.data.xanchor[self._joint] + door @ [self.ALONG, -outwards, self.ABOVE]
