"""The built-in stand-ins, and LIBERO's own assets where they are at hand, hold LIBERO's 130 tasks; and the stand-ins hold
those of LIBERO-PRO whose objects are others.

Both are asked the same questions with LIBERO's own environment, placed and settled as its evaluation scripts
do it: `env.seed(0)`, `env.reset()`, a recorded state, ten steps of standing still.
"""

import itertools
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import mujoco
import numpy as np
import pytest

from pi0.base.paths import REPO_ROOT, cache_dir
from pi0.libero.added_objects import add_objects
from pi0.libero.assets import Assets, resolve_assets, use_assets
from pi0.libero.standins.added import CHANGED, THINGS
from pi0.libero.standins.mjcf import write_item
from pi0.libero.standins.shapes import Item
from pi0.libero.suites import suite_tasks

pytestmark = pytest.mark.engine

SUITES = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
# LIBERO-PRO's suites with other objects, and the tasks that do not take long.
OTHER_OBJECTS = {
    "libero_pro/spatial_object": (10, {7}),
    "libero_pro/object_object": (10, {0}),
    "libero_pro/goal_object": (10, {4}),
    "libero_pro/10_object": (9, {0}),
}
# Where the larger bowl has to go into what is too small for it: a closed drawer, and a compartment for books.
TOO_LARGE = {("libero_pro/10_object", 3), ("libero_pro/10_object", 4)}
ARCHIVE = REPO_ROOT.parent / "shared" / "libero_assets.tar.xz"
# One task of each scene of libero_90, with every kind of goal among them; the others take minutes.
SAMPLE_OF_90 = (1, 6, 16, 21, 23, 32, 34, 35, 39, 42, 47, 51, 55, 63, 65, 70, 73, 77, 84, 89)
STAND_STILL = [0, 0, 0, 0, 0, 0, -1]
SETTLE_STEPS = 10

# First, middle and last of the fifty, and the states whose objects LIBERO recorded overlapping each other.
STATES = (0, 24, 49)
OVERLAPPING = {
    ("libero_spatial", 0): 18,
    ("libero_spatial", 2): 18,
    ("libero_spatial", 4): 35,
    ("libero_spatial", 8): 47,
    ("libero_10", 0): 45,
    ("libero_10", 3): 19,
    ("libero_10", 6): 14,
    ("libero_10", 7): 39,
    ("libero_90", 4): 5,
    ("libero_90", 23): 31,
    ("libero_90", 50): 4,
}

SIDEWAYS_M = 0.02
PENETRATION_M = 0.004
SPEED_M_S = 0.05
JOINT_MOVE = 0.02  # metres of a drawer, radians of a door or knob

# What LIBERO's own assets do not hold themselves: {task: {object: (in how many of its fifty recorded states,
# what it does there)}}, measured with them.
IN_THE_AIR = "starts in the table top, is thrown up and still in the air, {} cm up, after the settling steps"
SHOVED = "overlaps its neighbour at the start and is shoved up to {} mm"
RESTLESS_ORIGINALS: dict[tuple[str, int], dict[str, tuple[int, str]]] = {
    ("libero_spatial", 0): {
        "akita_black_bowl_1": (11, SHOVED.format(56)),
        "plate_1": (1, SHOVED.format(21)),
    },
    ("libero_spatial", 2): {
        "akita_black_bowl_2": (6, SHOVED.format(104)),
        "plate_1": (2, SHOVED.format(40)),
    },
    ("libero_spatial", 5): {"akita_black_bowl_1": (50, "slides 37 mm and tips 14 degrees in the ramekin")},
    ("libero_spatial", 8): {
        "akita_black_bowl_1": (10, SHOVED.format(103)),
        "plate_1": (4, SHOVED.format(30)),
    },
    ("libero_10", 0): {
        "cream_cheese_1": (3, SHOVED.format(440)),
        "ketchup_1": (50, IN_THE_AIR.format(57)),
        "milk_1": (50, IN_THE_AIR.format(41)),
        "orange_juice_1": (50, IN_THE_AIR.format(41)),
    },
    ("libero_10", 1): {
        "ketchup_1": (50, IN_THE_AIR.format(57)),
        "milk_1": (50, IN_THE_AIR.format(41)),
        "orange_juice_1": (50, IN_THE_AIR.format(41)),
    },
    ("libero_10", 3): {"wine_bottle_1": (3, SHOVED.format(1499))},
    ("libero_10", 6): {"plate_1": (2, SHOVED.format(98))},
    ("libero_10", 7): {
        "ketchup_1": (50, IN_THE_AIR.format(57)),
        "tomato_sauce_1": (1, SHOVED.format(201)),
    },
    # In libero_90 these are the tasks in whose tested states something moves.
    ("libero_90", 0): {
        "akita_black_bowl_1": (2, SHOVED.format(1060)),
        "butter_1": (4, SHOVED.format(80)),
        "butter_2": (4, SHOVED.format(80)),
        "chocolate_pudding_1": (1, SHOVED.format(102)),
    },
    ("libero_90", 22): {"wine_bottle_1": (3, SHOVED.format(106))},
    ("libero_90", 23): {
        "akita_black_bowl_1": (1, SHOVED.format(21)),
        "wine_bottle_1": (4, SHOVED.format(179)),
    },
    ("libero_90", 26): {"wine_bottle_1": (6, SHOVED.format(1601))},
    **{
        ("libero_90", task): {"ketchup_1": (50, IN_THE_AIR.format(57))}
        for task in (*range(46, 50), *range(55, 60))
    },
    **{
        ("libero_90", task): {
            "cream_cheese_1": (2, SHOVED.format(437)),
            "ketchup_1": (50, IN_THE_AIR.format(57)),
            "milk_1": (50, IN_THE_AIR.format(41)),
            "orange_juice_1": (50, IN_THE_AIR.format(41)),
        }
        for task in range(50, 55)
    },
}
# What the stand-ins do not hold, of the tested states: the two packets are recorded in each other.
RESTLESS_STANDINS: dict[tuple[str, int], dict[str, tuple[int, str]]] = {
    ("libero_90", 0): {"butter_1": (3, SHOVED.format(34)), "butter_2": (3, SHOVED.format(34))},
}


def original_assets() -> Assets:
    """Unpack LIBERO's own assets once and return them."""
    if not ARCHIVE.is_file():
        pytest.skip(f"LIBERO's own assets are not at hand ({ARCHIVE} is missing)")
    folder = cache_dir() / "original_assets"
    if not folder.is_dir():
        temporary = Path(tempfile.mkdtemp(dir=cache_dir(), prefix="original_assets."))
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(temporary, filter="data")
        (temporary / "libero_assets").rename(folder)
        temporary.rmdir()
    return resolve_assets(str(folder))


class Scene:
    """One task in LIBERO's own environment, without cameras."""

    def __init__(self, kind: str, suite: str, index: int):
        self.kind, self.key = kind, (suite, index)
        self.assets = resolve_assets("standins") if kind == "standins" else original_assets()
        use_assets(self.assets)
        from libero.libero.envs.env_wrapper import ControlEnv

        add_objects()
        self.task = suite_tasks(suite)[index]
        self.recorded = self.task.recorded_init_states()
        self.env = ControlEnv(
            bddl_file_name=self.task.bddl_file,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
        )
        self.env.seed(0)
        self.env.reset()
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.model.geom_rgba[:, 3] = 1  # rays pass through what is transparent, and some solids are
        # The bodies that are felt: LIBERO's own new_salad_dressing has its shape on a child of its body.
        self.objects = {
            name: int(self.model.geom_bodyid[self.model.geom(item.contact_geoms[0]).id])
            for name, item in self.env.env.objects_dict.items()
        }

    def fixture_joints(self) -> np.ndarray:
        names = [
            name for fixture in self.env.env.fixtures_dict.values() for name in getattr(fixture, "joints", [])
        ]
        return np.array([self.env.sim.data.get_joint_qpos(name) for name in names])

    def support_below(self, body: int) -> int:
        """Return the body straight below an object's origin, its own parts left out."""
        solids = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)  # group 0: what is felt
        start, down = self.data.xpos[body] + [0, 0, 0.03], np.array([0.0, 0.0, -1.0])
        geom = np.array([-1], dtype=np.int32)
        mujoco.mj_ray(self.model, self.data, start, down, solids, 1, body, geom)
        # The floor is the one solid that is also seen, in group 1.
        return int(self.model.geom_bodyid[geom[0] if geom[0] >= 0 else self.model.geom("floor").id])

    def touches(self, body: int, other: int) -> bool:
        pairs = {tuple(sorted(self.model.geom_bodyid[list(contact.geom)])) for contact in self.data.contact}
        return tuple(sorted((body, other))) in pairs

    def deepest_contact(self, bodies: set[int]) -> float:
        """Return how deep the given bodies sit in anything, in metres."""
        depths = [
            -contact.dist
            for contact in self.data.contact
            if bodies & set(self.model.geom_bodyid[list(contact.geom)].tolist())
        ]
        return max(depths, default=0.0)

    def states(self) -> list[int]:
        extra = OVERLAPPING.get(self.key)
        return [*STATES, extra] if extra is not None and self.kind == "standins" else list(STATES)

    def close(self) -> None:
        self.env.close()


def scenes() -> Iterator:
    """Every task with the stand-ins, of libero_90 a sample where there is little time; then with LIBERO's own assets,
    which show what the tests ask for.
    """
    tasks = [(suite, index) for suite, count in SUITES.items() for index in range(count)]
    for kind, (suite, index) in itertools.product(("standins", "originals"), tasks):
        long = kind == "originals" or (suite == "libero_90" and index not in SAMPLE_OF_90)
        yield scene_of(kind, suite, index, long)
    for suite, (count, short) in OTHER_OBJECTS.items():
        for index in range(count):
            yield scene_of("standins", suite, index, index not in short)


def scene_of(kind: str, suite: str, index: int, long: bool):
    marks = [pytest.mark.soak] if long else []
    return pytest.param((kind, suite, index), marks=marks, id=f"{kind}-{suite}-{index}")


@pytest.fixture(scope="module", params=list(scenes()))
def scene(request):
    scene = Scene(*request.param)
    yield scene
    scene.close()


@dataclass(frozen=True)
class Settled:
    """What ten steps of standing still did to a recorded state.

    Attributes:
        index: of the recorded state.
        moved: by object that did not stay where it was or that nothing carried, what it did.
        depth: how deep the other objects sit in anything, in metres.
        joint_move: the largest move of a drawer, door or knob.
        reached: whether the goal was reached at the start or after any of the steps.
    """

    index: int
    moved: dict[str, str]
    depth: float
    joint_move: float
    reached: bool


@pytest.fixture(scope="module")
def settled(scene):
    return [settle(scene, index) for index in scene.states()]


def settle(scene: Scene, index: int) -> Settled:
    scene.env.set_init_state(scene.recorded[index])
    recorded = {name: scene.data.xpos[body].copy() for name, body in scene.objects.items()}
    joints = scene.fixture_joints()
    supports = {name: scene.support_below(body) for name, body in scene.objects.items()}
    carried = set()
    reached = scene.env.check_success()
    for step in range(SETTLE_STEPS):
        scene.env.step(STAND_STILL)
        reached = scene.env.check_success() or reached
        if step >= SETTLE_STEPS // 2:  # hard contacts come and go from step to step
            carried |= {name for name, body in scene.objects.items() if scene.touches(body, supports[name])}
    moved = {}
    for name, body in scene.objects.items():
        sideways = np.linalg.norm((scene.data.xpos[body] - recorded[name])[:2])
        speed = np.linalg.norm(scene.data.cvel[body][3:])
        if sideways > SIDEWAYS_M or speed > SPEED_M_S or name not in carried:
            moved[name] = f"{1000 * sideways:.0f} mm, {speed:.2f} m/s, carried: {name in carried}"
    held = {body for name, body in scene.objects.items() if name not in moved}
    joint_move = np.abs(scene.fixture_joints() - joints).max(initial=0)
    return Settled(index, moved, scene.deepest_contact(held), joint_move, reached)


def test_state_size_is_the_recorded_one(scene):
    assert scene.env.get_sim_state().size == scene.recorded.shape[1]


def test_recorded_objects_come_to_rest_below_where_they_were_recorded(scene, settled):
    # LIBERO recorded objects a hand's breadth above what carries them, so they come down first.
    known = (RESTLESS_ORIGINALS if scene.kind == "originals" else RESTLESS_STANDINS).get(scene.key, {})
    always = {name for name, (states, _) in known.items() if states == len(scene.recorded)}
    for state in settled:
        assert always <= set(state.moved) <= set(known), f"state {state.index}: {state.moved}"
        assert state.depth < PENETRATION_M, f"state {state.index}"
        assert state.joint_move < JOINT_MOVE, f"state {state.index}"


def test_goal_is_not_reached_at_the_start(settled):
    assert [state.index for state in settled if state.reached] == []


def test_goal_is_detected_once_the_objects_are_put_into_it(scene, request):
    if scene.key in TOO_LARGE:
        request.applymarker(pytest.mark.xfail(strict=True, reason="the larger bowl does not fit"))
    scene.env.set_init_state(scene.recorded[0])
    for _ in range(SETTLE_STEPS):
        scene.env.step(STAND_STILL)
    bring_about(scene)
    reached = scene.env.check_success()
    for _ in range(5):
        scene.env.step(STAND_STILL)
        reached = reached or scene.env.check_success()
    assert reached, scene.env.env.parsed_problem["goal_state"]


def bring_about(scene: Scene) -> None:
    """Put a task's goal in place: joints first, then each object where no other thing is."""
    goal = scene.env.env.parsed_problem["goal_state"]
    for predicate, *names in goal:
        if predicate in ("open", "close", "turnon", "turnoff"):
            state = scene.env.env.object_states_dict[names[0]]
            fixture = scene.env.env.get_object(getattr(state, "parent_name", names[0]))
            state.set_joint(np.mean(fixture.object_properties["articulation"][f"default_{predicate}_ranges"]))
    mujoco.mj_forward(scene.model, scene.data)
    placed: list[str] = []
    placements = [state for state in goal if state[0] in ("in", "on")]
    # What others are put on goes to its own place first.
    for predicate, *names in sorted(placements, key=lambda state: state[2] in scene.objects):
        name, target = names
        # Two pots share the stove side by side; two groceries in one basket may lie on each other.
        shared = sum(state[-1] == target for state in goal) > 1 and predicate == "on"
        put(scene, name, target, shift=(0.042 if target in placed else -0.042) if shared else 0.0)
        placed.append(target)


def put(scene: Scene, name: str, target: str, shift: float) -> None:
    """Put an object into a region or onto an object, as low as it fits, shifted along x."""
    joint = scene.env.env.objects_dict[name].joints[-1]
    pose = scene.env.sim.data.get_joint_qpos(joint).copy()
    state = scene.env.env.object_states_dict[target].get_geom_state()
    place, up = np.array(state["pos"]), np.array([0.0, 0.0, 1.0])
    if target in scene.env.env.object_sites_dict:
        site = mujoco.mj_name2id(scene.model, mujoco.mjtObj.mjOBJ_SITE, target)
        axes = scene.data.site_xmat[site].reshape(3, 3)
        half = np.abs(axes @ scene.env.env.object_sites_dict[target].size)
        slanted = not np.isclose(np.abs(axes[2]).max(), 1, atol=0.02)
        if slanted:
            # The wine rack: lay the bottle along its slope, the bottom near the stop.
            place = place + 0.02 * axes[:, 2]
            up = axes[:, 1] * np.sign(axes[2, 1])
            mujoco.mju_mat2Quat(pose[3:], axes.flatten())
        else:
            place[2] -= half[2]
    place[0] += shift
    if "caddy" in target:
        pose[3:] = 1, 0, 0, 0  # the book stands along the compartments
    nearby = [(0.0, 0.0), (0.0, -0.01), (0.0, 0.01), (-0.01, 0.0), (0.01, 0.0)]
    for aside, height in itertools.product(nearby, np.arange(0, 0.15, 0.001)):
        pose[:3] = place + height * up + [*aside, 0]
        scene.env.sim.data.set_joint_qpos(joint, pose)
        scene.env.sim.data.set_joint_qvel(joint, np.zeros(6))
        mujoco.mj_forward(scene.model, scene.data)
        if scene.deepest_contact({scene.objects[name]}) < 0.0005:
            return
    pytest.fail(f"{name} does not fit {target}")


@pytest.mark.parametrize("height", [0.026, 0.036, 0.046])
def test_bowl_can_be_lifted_by_its_rim(height):
    scene = Scene("standins", "libero_spatial", 1)
    scene.env.set_init_state(scene.recorded[0])
    for _ in range(SETTLE_STEPS):
        scene.env.step(STAND_STILL)
    bowl = scene.objects["akita_black_bowl_1"]
    start = scene.data.xpos[bowl].copy()
    rim = start + [0, 0.045, height]
    for target, grip, steps in (
        (rim + [0, 0, 0.1], -1, 30),
        (rim, -1, 25),
        (rim, 1, 12),
        (rim + [0, 0, 0.15], 1, 30),
    ):
        for _ in range(steps):
            hand = scene.env.sim.data.get_site_xpos("gripper0_grip_site")
            scene.env.step([*np.clip(10 * (target - hand), -1, 1), 0, 0, 0, grip])
    lifted = scene.data.xpos[bowl][2] - start[2]
    scene.close()
    assert lifted > 0.08


# Objects that LIBERO-PRO and LIBERO-plus add ------------------------------------------------------


def attributes_of(item: Item) -> list[dict[str, str]]:
    """All elements of an item's MJCF file, in order, without names of the file."""
    with tempfile.TemporaryDirectory() as folder:
        write_item(item, Path(folder))
        root = ElementTree.parse(Path(folder) / item.file).getroot()
    return [{"tag": element.tag, **element.attrib} for element in root.iter() if element is not root]


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: changed.category)
def test_a_changed_object_differs_from_its_original_in_colour_or_size_alone(changed):
    ours, originals = attributes_of(changed.make()), attributes_of(changed.original())
    assert changed.make().file == changed.original().file.replace(changed.like, changed.category)
    assert ours != originals
    assert len(ours) == len(originals)
    for one, original in zip(ours, originals, strict=True):
        for key in one.keys() | original.keys():
            if key in ("size", "pos", "density"):
                here, there = ([float(number) for number in each[key].split()] for each in (one, original))
                marker = key == "size" and one.get("name", "").endswith("_site")  # of no size that matters
                scale = 1 if key == "density" or marker else changed.scale
                assert here == pytest.approx([scale * number for number in there], abs=2e-5, rel=2e-5)
            elif key != "rgba" or changed.scale != 1:
                assert one[key] == original[key]


@pytest.mark.parametrize("make", THINGS, ids=lambda make: make.__name__)
def test_a_thing_stands_upright_on_its_origin_s_axis_and_looks_like_no_other(make):
    with tempfile.TemporaryDirectory() as folder:
        write_item(make(), Path(folder))
        model = mujoco.MjModel.from_xml_path(str(Path(folder) / make().file))
    felt = model.geom_group == 0
    assert felt.any()
    assert np.abs(model.body("object").ipos[:2]).max() < 1e-4  # m: it falls without turning
    looks = [tuple(part.colour for part in other().body.parts) for other in THINGS]
    assert len(set(looks)) == len(THINGS)
