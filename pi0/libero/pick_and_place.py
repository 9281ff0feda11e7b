"""Picking objects up and placing them on or in others, scripted: with privileged state and the policy's own actions."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from pi0.base.errors import InputError
from pi0.libero.motions import CLOSED, GAIN, GRIP_STEPS, NEARER, OPEN, STALLED, rotation_error
from pi0.libero.stepping import TaskSim

TRAVEL_HEIGHT = 0.12  # m above the grasp point while moving sideways
CLEARANCE = 0.08  # m above the release point while moving sideways
REACHED = 0.015  # m
LOST = 0.05  # m; an object that has moved further in the hand has slipped, and is grasped again
TURN_GAIN = 0.6  # action per radian of orientation error; 2 would cancel it in one step
STANDING = ("wine_rack", "desk_caddy")  # objects that stand still, with regions of their own
DRAWER_FRONT = 0.008  # m from the middle of a drawer towards its front, where the hand has more room
BESIDE = 0.085  # m between the middles of two things in one region of a fixture
HIGH = 0.3  # m; higher above an object nothing is in the hand's way
PALM = 0.03  # m from the middle of the fingertips up to the palm; taller things do not fit in between
FINGER_REACH = 0.02  # m of the fingertips below the middle of the hand
# Points that must be free, from the middle of the hand (m), along and across it: for the hand, and the outer fingertip.
HAND_LENGTH, HAND_WIDTH = np.linspace(-0.12, 0.12, 9), np.linspace(-0.04, 0.04, 3)
FINGER_LENGTH, FINGER_WIDTH = np.linspace(0.04, 0.07, 3), np.linspace(-0.03, 0.03, 5)
# Directions (rad) from which a round object may be grasped; at 90 degrees the hand need not turn.
SIDES = np.radians([90, -90, 60, 120, 30, 150, -60, -120, -30, -150])


@dataclass(frozen=True)
class Grasp:
    """How to grasp an object (m). The fingers open across its side, or along y if it is grasped in the middle."""

    side: float  # horizontal distance of the grasp from the object's middle
    height: float  # height of the grasp above the object's origin
    release_height: float  # height of the object's origin above the target's at release
    middle: float = (
        0.0  # the object's middle from its origin, along y; a mug's origin is nearer to its handle
    )
    precision: float = 0.012  # distance from the grasp at which the fingers close
    thin: bool = False  # grasped across its x axis, which is set down along the region's


# Bowl and mugs are grasped at the rim, groceries in the middle.
GRASPS = {
    "akita_black_bowl": Grasp(0.045, 0.03, 0.012),
    "alphabet_soup": Grasp(0.0, 0.01, 0.16),
    "cream_cheese": Grasp(0.0, 0.0, 0.14),
    "salad_dressing": Grasp(0.0, 0.02, 0.18),
    "bbq_sauce": Grasp(0.0, 0.02, 0.18),
    "ketchup": Grasp(0.0, 0.02, 0.18),
    "tomato_sauce": Grasp(0.0, 0.01, 0.16),
    "butter": Grasp(0.0, 0.0, 0.14),
    "milk": Grasp(0.0, 0.02, 0.18),
    "chocolate_pudding": Grasp(0.0, 0.0, 0.14),
    "orange_juice": Grasp(0.0, 0.02, 0.18),
    "porcelain_mug": Grasp(0.037, 0.09, 0.03, middle=-0.015),
    "white_yellow_mug": Grasp(0.040, 0.085, 0.03, middle=0.018),
    "wine_bottle": Grasp(0.0, 0.12, 0.02, precision=0.004),
    "moka_pot": Grasp(0.0, 0.06, 0.09),
    "black_book": Grasp(0.0, 0.1, 0.04, precision=0.006, thin=True),
}


class NoExpertError(InputError, ValueError):
    """There is no scripted expert for the task."""


class _Placement:
    """One part of a goal: an object that must be on or in something."""

    def __init__(self, sim: TaskSim, goal: list[str]):
        _, name, target = goal
        category = sim.libero.get_object(name).category_name
        if category not in GRASPS:
            raise NoExpertError(f"{sim.task.name}: no grasp is known for {category}")
        self._sim, self._goal, self._target = sim, goal, target
        self.grasp = GRASPS[category]
        self.body = sim.libero.obj_body_id[name]
        region = sim.libero.object_sites_dict.get(target)
        owner = target if region is None else region.parent_name
        self._owner = sim.libero.obj_body_id.get(owner)
        self.on_fixture = region is not None and (
            owner in sim.libero.fixtures_dict or str(owner).startswith(STANDING)
        )
        # On a fixture the region itself is the target: its surface, or where the object just touches a slanted one.
        self._above = 0.0 if not self.on_fixture or goal[0] == "in" else self._surface()
        joint = (
            sim.model.body_jntadr[sim.model.site_bodyid[sim.model.site(target).id]] if self.on_fixture else -1
        )
        self._drawer = int(joint)  # or -1
        self.aside = 0.0  # m along the region's x axis, beside the hand

    def target(self) -> np.ndarray:
        """Target position of the object [3] (m): origin of the object below it, or middle of a region."""
        if self.on_fixture or self._owner is None:
            outwards = -self._sim.data.xaxis[self._drawer] if self._drawer >= 0 else np.zeros(3)
            site = self._sim.data.site(self._target)
            sideways = self.aside * site.xmat.reshape(3, 3)[:, 0]
            return site.xpos + sideways + [0.0, 0.0, self._above] + DRAWER_FRONT * outwards
        return self._sim.data.xpos[self._owner]

    def yaw(self) -> float:
        """Direction of the object's x axis (rad), seen from above."""
        return yaw_of(self._sim.data.xmat[self.body].reshape(3, 3))

    def target_yaw(self) -> float:
        """Direction of the x axis of the region (rad)."""
        return yaw_of(self._sim.data.site(self._target).xmat.reshape(3, 3))

    def shares(self, other: _Placement) -> bool:
        """Whether both things are to be placed in the same region."""
        return self._target == other._target

    def _surface(self) -> float:
        """Metres from the region up to the surface there; a slanted one is too far below its middle to be meant."""
        start = self._sim.data.site(self._target).xpos + [0.0, 0.0, HIGH]
        above = HIGH - clear_below(self._sim, start, exclude=self.body)
        return above if abs(above) < 0.05 else -0.03

    def holds(self) -> bool:
        """Whether LIBERO's predicate holds."""
        return bool(self._sim.libero._eval_predicate(self._goal))


class PickAndPlace:
    """Places objects on or in others, one after the other.

    Args:
        sim: the running task; it is read, never changed.
        goals: LIBERO's predicates, such as ["on", "akita_black_bowl_1", "plate_1"].
        upright: the hand's orientation [3, 3] when it points down; None: the present one.
    Raises:
        NoExpertError: the grasp of an object is unknown.
    """

    def __init__(self, sim: TaskSim, goals: list[list[str]], upright: np.ndarray | None = None):
        self._placements = [_Placement(sim, goal) for goal in goals]
        for placement in self._placements:  # several things on one stove stand side by side
            beside = [each for each in self._placements if each.on_fixture and each.shares(placement)]
            placement.aside = BESIDE * (beside.index(placement) - (len(beside) - 1) / 2) if beside else 0.0
        self._sim = sim
        self._phase = 0
        self._waited = 0
        self._nearest = np.inf
        self._lift_to = np.zeros(3)
        self._held_at = np.zeros(3)
        self._offset, self._turn = np.zeros(3), 0.0
        self._start_ori = self._hand_ori() if upright is None else upright
        self._turns = upright is not None  # a motion before may have turned the hand
        self._begin(self._placements[0])

    @property
    def finished(self) -> bool:
        """Whether everything is in place, and the hand is free."""
        return self._phase not in (2, 3, 4, 5, 6) and all(each.holds() for each in self._placements)

    def action(self) -> np.ndarray:
        """The next action, float64 [7] in [-1, 1]; call it once a control step."""
        hand = self._sim.data.site_xpos[self._sim.hand_site]
        thing = self._sim.data.xpos[self._now.body]
        target = self._now.target()
        up = np.array([0.0, 0.0, TRAVEL_HEIGHT])
        grasp_point = thing + self._offset
        if self._phase in (3, 4, 5) and np.linalg.norm(thing - hand - self._held_at) > LOST:
            self._enter(0)
        # While carrying, keep the object, not the hand, over the target.
        release_point = target + (hand - thing) + [0.0, 0.0, self._now.grasp.release_height]
        if self._phase == 0:
            return self._go(hand, grasp_point + up, OPEN, tolerance=0.02)
        if self._phase == 1:
            return self._go(hand, grasp_point, OPEN, tolerance=self._now.grasp.precision)
        if self._phase == 2:
            self._lift_to, self._held_at = hand + up, thing - hand
            if self._now.on_fixture:  # above it before moving sideways
                self._lift_to[2] = max(self._lift_to[2], release_point[2] + CLEARANCE)
            return self._hold(CLOSED)
        if self._phase == 3:
            return self._go(hand, self._lift_to, CLOSED, tolerance=0.03)
        if self._phase == 4:
            if self._now.grasp.thin:
                wanted = yaw_of(self._hand_ori()) + half_turn(self._now.target_yaw() - self._now.yaw())
                self._turn = wanted - yaw_of(self._start_ori)
            above = np.array([release_point[0], release_point[1], max(release_point[2] + CLEARANCE, hand[2])])
            return self._go(hand, above, CLOSED)
        if self._phase == 5:
            return self._go(hand, release_point, CLOSED)
        if self._phase == 6:
            self._lift_to = hand + up
            return self._hold(OPEN)
        if self._phase == 7:
            return self._go(hand, self._lift_to, OPEN, tolerance=0.03)
        # Continue with an object that is not yet in place, which may be the same one.
        self._begin(next((place for place in self._placements if not place.holds()), self._now))
        return self._hold(OPEN)

    def _begin(self, placement: _Placement) -> None:
        self._now = placement
        self._offset, self._turn = self._choose_side()
        self._turns |= self._turn != 0.0  # the hand must later turn back
        self._enter(0)

    def _go(
        self, hand: np.ndarray, goal: np.ndarray, gripper: float, tolerance: float = REACHED
    ) -> np.ndarray:
        error = goal - hand
        distance = float(np.linalg.norm(error))
        self._waited = 0 if distance < self._nearest - NEARER else self._waited + 1
        self._nearest = min(self._nearest, distance)
        turns = self._phase < 2 or (self._now.grasp.thin and self._phase in (4, 5))
        turning = self._turning() if self._turns and turns else np.zeros(3)
        if (distance < tolerance and not turning.any()) or self._waited >= STALLED:
            self._enter(self._phase + 1)
        return np.array([*np.clip(GAIN * error, -1.0, 1.0), *turning, gripper])

    def _hold(self, gripper: float) -> np.ndarray:
        self._waited += 1
        if self._waited >= GRIP_STEPS:
            self._enter(self._phase + 1)
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])

    def _enter(self, phase: int) -> None:
        self._phase, self._waited, self._nearest = phase, 0, np.inf

    def _hand_ori(self) -> np.ndarray:
        return np.array(self._sim.data.site_xmat[self._sim.hand_site]).reshape(3, 3)

    def _choose_side(self) -> tuple[np.ndarray, float]:
        """Grasp relative to the object's origin [3] (m), and the turn of the hand (rad) from its current direction."""
        grasp = self._now.grasp
        middle = np.array([0.0, grasp.middle, 0.0])
        thing = self._sim.data.xpos[self._now.body] + middle
        if grasp.side == 0.0:
            turn = half_turn(self._now.yaw() - yaw_of(self._start_ori)) if grasp.thin else 0.0
            top = HIGH - clear_below(self._sim, thing + [0.0, 0.0, HIGH], exclude=-1)
            return middle + [0.0, 0.0, max(grasp.height, top - PALM)], turn
        target = self._now.target() + [0.0, 0.0, grasp.release_height]

        def room(angle: float) -> tuple[int, int]:
            for_hand, for_finger = self._room(thing, angle)
            return for_hand + self._room(target, angle)[0], for_finger

        angle = max(SIDES, key=room)
        if grasp.middle:  # a mug: across from its handle
            angle = np.copysign(np.pi / 2, grasp.middle)
        offset = middle + [grasp.side * np.cos(angle), grasp.side * np.sin(angle), grasp.height]
        return offset, float(
            angle % np.pi - np.pi / 2
        )  # the fingers are alike, so half a turn makes no difference

    def _room(self, thing: np.ndarray, angle: float) -> tuple[int, int]:
        """How many points are free for the hand, and for the outer fingertip, when it comes down on that side."""
        outwards, across = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]])
        grasp = thing + self._now.grasp.side * outwards + [0.0, 0.0, self._now.grasp.height]

        def count_free(along: np.ndarray, sideways: np.ndarray, height: float) -> int:
            starts = [
                grasp + a * outwards + b * across + [0, 0, height + HIGH] for a in along for b in sideways
            ]
            return sum(clear_below(self._sim, start, self._now.body) >= HIGH for start in starts)

        return count_free(HAND_LENGTH, HAND_WIDTH, PALM), count_free(
            FINGER_LENGTH, FINGER_WIDTH, -FINGER_REACH
        )

    def _turning(self) -> np.ndarray:
        """Rotation part of the action [3]; zero once the hand has turned to the chosen side."""
        cos, sin = np.cos(self._turn), np.sin(self._turn)
        goal = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        error = rotation_error(self._hand_ori(), goal @ self._start_ori)
        return np.zeros(3) if np.linalg.norm(error) < 0.05 else np.clip(TURN_GAIN * error, -1.0, 1.0)


def clear_below(sim: TaskSim, point: np.ndarray, exclude: int) -> float:
    """Metres from `point` down to the first thing that is neither the body `exclude` nor the robot."""
    down, collision_geoms = np.array([0.0, 0.0, -1.0]), np.array([1, 0, 0, 0, 0, 0], np.uint8)
    start, hit = np.array(point, dtype=float), np.zeros(1, np.int32)
    while True:
        distance = mujoco.mj_ray(sim.model, sim.data, start, down, collision_geoms, 1, exclude, hit)
        if distance < 0:
            return np.inf
        start[2] -= distance
        if not sim.model.body(sim.model.geom_bodyid[hit[0]]).name.startswith(("robot0_", "gripper0_")):
            return float(point[2] - start[2])
        start[2] -= 0.001


def yaw_of(axes: np.ndarray) -> float:
    """Direction of the first of three axes in columns (rad), seen from above."""
    return float(np.arctan2(axes[1, 0], axes[0, 0]))


def half_turn(angle: float) -> float:
    """The angle within a quarter turn to either side that is the same for fingers, which are alike (rad)."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2
