"""Scripted experts: solve pick-and-place tasks with privileged state through the policy's own 7-dim actions.

They make the demonstrations from which the tiny policy is warm-started, for `libero_spatial` (bowl onto
plate) and `libero_object` (grocery into basket).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi0.errors import InputError
from pi0.ript.env.stepping import TaskSim

OPEN, CLOSED = -1.0, 1.0
TRAVEL_HEIGHT = 0.12  # m above the grasp point while moving sideways
CLEARANCE = 0.08  # m above the release point while moving sideways
GAIN = 16.0  # action per metre of position error; 20 would cancel it in one step if the arm followed at once
REACHED = 0.015  # m
LOST = 0.05  # m; an object further from where the hand took it has slipped, and is grasped again
GRIP_STEPS = 12  # the fingers need 8 control steps from open to closed, and some to press
STALLED = 25  # control steps; something is in the way, and the next phase is as good


@dataclass(frozen=True)
class Grasp:
    """Where the fingertips go, relative to the object's origin (m); the fingers open along y."""

    offset: tuple[float, float, float]
    release_height: float  # m of the object's origin above the target's


# The bowl is taken by its rim, 4.5 cm to the side; groceries by their middle.
_RIM = Grasp((0.0, 0.045, 0.030), 0.012)
GRASPS = {
    "akita_black_bowl": _RIM,
    "alphabet_soup": Grasp((0.0, 0.0, 0.01), 0.16),
    "cream_cheese": Grasp((0.0, 0.0, 0.0), 0.14),
    "salad_dressing": Grasp((0.0, 0.0, 0.02), 0.18),
    "bbq_sauce": Grasp((0.0, 0.0, 0.02), 0.18),
    "ketchup": Grasp((0.0, 0.0, 0.02), 0.18),
    "tomato_sauce": Grasp((0.0, 0.0, 0.01), 0.16),
    "butter": Grasp((0.0, 0.0, 0.0), 0.14),
    "milk": Grasp((0.0, 0.0, 0.02), 0.18),
    "chocolate_pudding": Grasp((0.0, 0.0, 0.0), 0.14),
    "orange_juice": Grasp((0.0, 0.0, 0.02), 0.18),
}


class NoExpertError(InputError, ValueError):
    """No scripted expert knows the task."""


class PickAndPlace:
    """Expert for tasks whose goal is one object on or in another.

    Args:
        sim: the running task; read, never changed.
    Raises:
        NoExpertError: the goal is of another kind, or nobody said how to grasp the object.
    """

    def __init__(self, sim: TaskSim):
        goals = sim.libero.parsed_problem["goal_state"]
        if len(goals) != 1 or len(goals[0]) != 3:
            raise NoExpertError(f"{sim.task.name}: the goal {goals} is not a single placement")
        _, self._object, target = goals[0]
        category = sim.libero.get_object(self._object).category_name
        if category not in GRASPS:
            raise NoExpertError(f"{sim.task.name}: no grasp is known for {category}")
        self._sim = sim
        self._grasp = GRASPS[category]
        self._target_body = sim.libero.obj_body_id[_owner(sim, target)]
        self._object_body = sim.libero.obj_body_id[self._object]
        self._phase = 0
        self._waited = 0
        self._lift_to = np.zeros(3)
        self._held_at = np.zeros(3)

    def action(self) -> np.ndarray:
        """The next action, float64 [7] in [-1, 1]; to be asked for once a control step."""
        hand = self._sim.data.site_xpos[self._sim.hand_site]
        thing = self._sim.data.xpos[self._object_body]
        target = self._sim.data.xpos[self._target_body]
        up = np.array([0.0, 0.0, TRAVEL_HEIGHT])
        grasp_point = thing + self._grasp.offset
        if self._phase in (3, 4, 5) and np.linalg.norm(thing - hand - self._held_at) > LOST:
            self._phase, self._waited = 0, 0
        # Carrying: keep the object, not the hand, over the target.
        release_point = target + (hand - thing) + [0.0, 0.0, self._grasp.release_height]
        if self._phase == 0:
            return self._go(hand, grasp_point + up, OPEN, tolerance=0.02)
        if self._phase == 1:
            return self._go(hand, grasp_point, OPEN, tolerance=0.012)
        if self._phase == 2:
            self._lift_to, self._held_at = hand + up, thing - hand
            return self._hold(CLOSED)
        if self._phase == 3:
            return self._go(hand, self._lift_to, CLOSED, tolerance=0.03)
        if self._phase == 4:
            above = np.array([release_point[0], release_point[1], max(release_point[2] + CLEARANCE, hand[2])])
            return self._go(hand, above, CLOSED)
        if self._phase == 5:
            return self._go(hand, release_point, CLOSED)
        if self._phase == 6:
            return self._hold(OPEN)
        if self._phase == 7:
            return self._go(hand, self._lift_to, OPEN)
        self._phase = 0  # placed, but not so that the goal holds: once more
        return self._hold(OPEN)

    def _go(
        self, hand: np.ndarray, goal: np.ndarray, gripper: float, tolerance: float = REACHED
    ) -> np.ndarray:
        error = goal - hand
        self._waited += 1
        if np.linalg.norm(error) < tolerance or self._waited >= STALLED:
            self._phase, self._waited = self._phase + 1, 0
        return np.array([*np.clip(GAIN * error, -1.0, 1.0), 0.0, 0.0, 0.0, gripper])

    def _hold(self, gripper: float) -> np.ndarray:
        self._waited += 1
        if self._waited >= GRIP_STEPS:
            self._phase, self._waited = self._phase + 1, 0
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])


def _owner(sim: TaskSim, target: str) -> str:
    """The object or fixture a goal region belongs to."""
    site = sim.libero.object_sites_dict.get(target)
    return target if site is None else site.parent_name
