"""Scripted experts: they solve tasks with privileged state and the policy's own 7-dim actions.

They make the demonstrations for warm starts: of `libero_spatial`, `libero_object`, `libero_goal` and `libero_10`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pi0.libero.microwave import CloseDoor, PutIn
from pi0.libero.motions import CloseDrawer, DrawAside, Motion, OpenDrawer, PushPlate, TurnOn
from pi0.libero.pick_and_place import NoExpertError, PickAndPlace
from pi0.libero.stepping import TaskSim

__all__ = ["Expert", "NoExpertError"]
HOLD = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
Part = PickAndPlace | Motion


class Expert:
    """Brings a task's goal about, one part after the other: it opens, turns on, places, and closes.

    Args:
        sim: the running task; it is read, never changed.
    Raises:
        NoExpertError: a part of the goal is of another kind, or the grasp or handle of an object is unknown.
    """

    def __init__(self, sim: TaskSim):
        self._sim = sim
        self._goals: list[list[str]] = sim.libero.parsed_problem["goal_state"]
        self._upright = np.array(sim.data.site_xmat[sim.hand_site]).reshape(3, 3)
        self._moved = False
        self._plan = self._parts()
        self._part = self._next()

    def action(self) -> np.ndarray:
        """The next action, float64 [7] in [-1, 1]; call it once a control step."""
        if self._part is not None and self._part.finished:
            self._moved = True
            self._part = self._next()
        return HOLD if self._part is None else self._part.action()

    def _next(self) -> Part | None:
        """The next part; after the last, what is undone again; None if nothing is."""
        self._plan = self._plan or self._parts()
        return self._plan.pop(0)() if self._plan else None

    def _parts(self) -> list[Callable[[], Part]]:
        """What is left to do, in order; each part is made when its turn comes."""
        sim, libero = self._sim, self._sim.libero
        before: list[Callable[[], Part]] = []
        placements: list[list[str]] = []
        after: list[Callable[[], Part]] = []
        for goal in self._goals:
            kind, target = goal[0], goal[-1]
            undone = not libero._eval_predicate(goal)
            if kind == "turnon":
                before += [partial(TurnOn, sim, goal)] * undone
            elif kind == "open" and self._is_drawer(target):
                before += [partial(OpenDrawer, sim, goal)] * undone
            elif kind == "close" and self._is_drawer(target):
                after.append(partial(CloseDrawer, sim, goal))
            elif kind == "close" and self._is_microwave(target):
                after.append(partial(CloseDoor, sim, goal))
            elif kind == "in" and self._is_microwave(target):
                PutIn(sim, goal)  # refuses unknown handles now
                before += [partial(PutIn, sim, goal)] * undone
            elif kind in ("on", "in") and libero.get_object(goal[1]).category_name == "plate":
                after.append(partial(PushPlate, sim, goal))
            elif kind in ("on", "in"):
                if self._is_drawer(target) and not libero.object_states_dict[target].is_open():
                    if not DrawAside(sim, goal).holds:
                        before.append(partial(DrawAside, sim, goal))
                    before.append(partial(OpenDrawer, sim, ["open", target]))
                placements.append(goal)
            else:
                raise NoExpertError(f"{sim.task.name}: there is no motion for the goal {goal}")
        if placements:
            upright = self._upright

            def place() -> PickAndPlace:
                return PickAndPlace(sim, placements, upright if self._moved else None)

            PickAndPlace(sim, placements)  # refuses unknown grasps now
            before.append(place)
        return [*before, *after]

    def _is_drawer(self, target: str) -> bool:
        """Whether a region is that of a drawer."""
        region = self._sim.libero.object_sites_dict.get(target)
        return region is not None and bool(region.joints)

    def _is_microwave(self, target: str) -> bool:
        """Whether a fixture, or that of a region, is a microwave."""
        region = self._sim.libero.object_sites_dict.get(target)
        fixture = self._sim.libero.fixtures_dict.get(target if region is None else region.parent_name)
        return fixture is not None and fixture.category_name == "microwave"
