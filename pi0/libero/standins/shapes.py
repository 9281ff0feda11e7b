"""The vocabulary of the stand-ins: primitives with a place and a colour, bodies, joints, sites.

Lengths are metres, masses kilograms, angles degrees; positions are relative to the body. Everything here
is plain data; `mjcf.py` writes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Vec3 = tuple[float, float, float]
Quat = tuple[float, float, float, float]  # w, x, y, z
Colour = tuple[float, float, float]

UPRIGHT: Quat = (1.0, 0.0, 0.0, 0.0)


def turn(axis: str, degrees: float) -> Quat:
    """Return the rotation about one body axis ("x", "y" or "z")."""
    half = math.radians(degrees) / 2
    x, y, z = (math.sin(half) if name == axis else 0.0 for name in "xyz")
    return (math.cos(half), x, y, z)


def _middle(one: Vec3, other: Vec3) -> Vec3:
    return ((one[0] + other[0]) / 2, (one[1] + other[1]) / 2, (one[2] + other[2]) / 2)


def after(second: Quat, first: Quat) -> Quat:
    """Return the rotation that does `first` and then `second`."""
    a, b, c, d = second
    e, f, g, h = first
    return (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )


@dataclass(frozen=True)
class Part:
    """One primitive.

    kind: "box" (size: half extents) or "cylinder" (size: radius and half length along z).
    solid: objects collide with it. visible: cameras see it.
    """

    kind: str
    size: tuple[float, ...]
    pos: Vec3
    colour: Colour
    quat: Quat = UPRIGHT
    solid: bool = True
    visible: bool = True

    def volume(self) -> float:
        """Return its volume in cubic metres."""
        if self.kind == "box":
            return 8 * self.size[0] * self.size[1] * self.size[2]
        if self.kind == "cylinder":
            return 2 * math.pi * self.size[0] ** 2 * self.size[1]
        raise ValueError(f"unknown kind of part: {self.kind}")


def box(low: Vec3, high: Vec3, colour: Colour, *, solid: bool = True, visible: bool = True) -> Part:
    """Return the box between two corners."""
    size = tuple((b - a) / 2 for a, b in zip(low, high, strict=True))
    return Part("box", size, _middle(low, high), colour, solid=solid, visible=visible)


def cylinder(radius: float, bottom: float, top: float, colour: Colour, **flags: bool) -> Part:
    """Return an upright cylinder around the body's z axis from height `bottom` to `top`."""
    return Part(
        "cylinder", (radius, (top - bottom) / 2), (0, 0, (top + bottom) / 2), colour, UPRIGHT, **flags
    )


def star(half_side: float, bottom: float, top: float, colour: Colour, **flags: bool) -> list[Part]:
    """Return two crossed square slabs: the cheapest disc, for floors and bottoms that a ring surrounds.

    Boxes rest on each other more steadily than cylinders do.
    """
    slab = box((-half_side, -half_side, bottom), (half_side, half_side, top), colour, **flags)
    return [slab, replace(slab, quat=turn("z", 45))]


def prism(radius: float, bottom: float, top: float, colour: Colour, **flags: bool) -> list[Part]:
    """Return a regular octagon's prism (`radius` to its faces) made of four boxes, for upright round things."""
    narrow = radius * math.tan(math.pi / 8)
    slab = box((-radius, -narrow, bottom), (radius, narrow, top), colour, **flags)
    return [replace(slab, quat=turn("z", degrees)) for degrees in (0, 45, 90, 135)]


def ring(
    count: int,
    bottom: tuple[float, float],
    top: tuple[float, float],
    thickness: float,
    colour: Colour,
    **flags: bool,
) -> list[Part]:
    """Return a round wall of `count` flat panels, upright or leaning outwards.

    bottom, top: (radius, height) of the middle of the wall at its lower and upper edge. A panel faces each
    of the directions 0, 360 / count, ... degrees, so that a gripper meets a flat face there.
    """
    (low_radius, low), (high_radius, high) = bottom, top
    length = math.hypot(high_radius - low_radius, high - low)
    lean = math.degrees(math.atan2(high_radius - low_radius, high - low))
    width = max(low_radius, high_radius) * math.tan(math.pi / count)
    radius = (low_radius + high_radius) / 2
    panels = []
    for number in range(count):
        angle = 2 * math.pi * number / count
        place = (radius * math.cos(angle), radius * math.sin(angle), (low + high) / 2)
        facing = after(turn("z", math.degrees(angle)), turn("y", lean))
        panels.append(Part("box", (thickness / 2, width, length / 2), place, colour, facing, **flags))
    return panels


def bar(start: Vec3, end: Vec3, width: float, thickness: float, colour: Colour, **flags: bool) -> Part:
    """Return a bar in the x-z plane from `start` to `end`, `width` wide along y: a piece of a handle."""
    length = math.dist(start, end)
    lean = math.degrees(math.atan2(end[0] - start[0], end[2] - start[2]))
    size = (thickness / 2, width / 2, length / 2)
    return Part("box", size, _middle(start, end), colour, turn("y", lean), **flags)


def move(parts: Sequence[Part], x: float) -> list[Part]:
    """Return the parts shifted along x."""
    return [replace(part, pos=(part.pos[0] + x, part.pos[1], part.pos[2])) for part in parts]


def rotate(parts: Sequence[Part], axis: str, degrees: float) -> list[Part]:
    """Return the parts turned together about an axis through the body's origin."""
    whole = turn(axis, degrees)
    inverse = (whole[0], -whole[1], -whole[2], -whole[3])
    turned = []
    for part in parts:
        place = after(after(whole, (0.0, *part.pos)), inverse)[1:]
        turned.append(replace(part, pos=place, quat=after(whole, part.quat)))
    return turned


@dataclass(frozen=True)
class Site:
    """A named place without substance; LIBERO's predicates read its pose and size."""

    name: str
    pos: Vec3
    size: tuple[float, ...]
    kind: str = "box"
    quat: Quat = UPRIGHT
    rgba: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.0)


@dataclass(frozen=True)
class Joint:
    """A hinge (radians) or slide (metres) along `axis` through the body's origin or `pos`."""

    name: str
    kind: str
    axis: Vec3
    limits: tuple[float, float]
    damping: float
    pos: Vec3 = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Surface:
    """Friction (sliding, torsional, rolling) and contact stiffness in MuJoCo's terms."""

    friction: Vec3
    solref: tuple[float, float]
    solimp: Vec3


# What LIBERO gives every object it hands to the gripper: hard and grippy.
GRIPPY = Surface((0.95, 0.3, 0.1), (0.001, 1.0), (0.998, 0.998, 0.001))
# MuJoCo's defaults, which LIBERO leaves on the plate of the stove and on furniture.
PLAIN = Surface((1.0, 0.005, 0.0001), (0.02, 1.0), (0.9, 0.95, 0.001))


@dataclass(frozen=True)
class Body:
    """A rigid body and what hangs on it.

    mass: spread over the solid parts by volume.
    point_mass: put it at the body's origin instead, with a unit inertia, as LIBERO does for drawers and knobs.
    """

    name: str
    mass: float
    parts: Sequence[Part] = ()
    sites: Sequence[Site] = ()
    children: Sequence["Body"] = ()
    joint: Joint | None = None
    pos: Vec3 = (0.0, 0.0, 0.0)
    quat: Quat = UPRIGHT
    surface: Surface = GRIPPY
    point_mass: bool = False


@dataclass(frozen=True)
class Item:
    """One of LIBERO's objects or fixtures.

    file: where LIBERO looks for it in the assets folder.
    bottom, top, radius: what LIBERO's placement samplers keep clear below, above and around it.
    """

    file: str
    body: Body
    bottom: float = -0.06
    top: float = 0.04
    radius: float = 0.025
