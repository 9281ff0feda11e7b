"""The movable objects, as tables of primitives.

Sizes and masses follow the originals; shapes are this project's own. LIBERO records initial states with
the originals, so the heights of an object's lowest point and of the surfaces that carry others matter.
"""

from pi0.ript.env.standins.shapes import (
    Body,
    Item,
    Part,
    box,
    cylinder,
    octagon,
    ring,
)

BLACK = (0.16, 0.16, 0.18)
WHITE = (0.92, 0.92, 0.94)
RED = (0.75, 0.12, 0.12)
STEEL = (0.55, 0.56, 0.58)


def scanned(name: str, mass: float, parts: list[Part]) -> Item:
    """Return an item of the family that LIBERO took from scans of household things."""
    return Item(f"stable_scanned_objects/{name}/{name}.xml", Body("object", mass, parts))


def grocery(name: str, mass: float, parts: list[Part]) -> Item:
    """Return an item of the grocery family."""
    return Item(f"stable_hope_objects/{name}/{name}.xml", Body("object", mass, parts))


def black_bowl() -> Item:
    # The recorded states hold bowls so close to plates and ramekins that the originals sometimes overlap and
    # kick each other away at the start. On a foot, under a rim of the original's width, it clears them.
    return scanned(
        "akita_black_bowl",
        0.066,
        [
            *ring(12, (0.0425, 0.020), (0.0518, 0.0518), 0.0028, BLACK),
            *octagon(0.031, 0.0185, 0.0225, BLACK),
            box((-0.021, -0.021, 0.0016), (0.021, 0.021, 0.0190), BLACK),
            *ring(12, (0.0240, 0.003), (0.0425, 0.0215), 0.002, BLACK, solid=False),
        ],
    )


def plate() -> Item:
    return scanned(
        "plate",
        0.030,
        [
            box((-0.032, -0.032, -0.0025), (0.032, 0.032, 0.0052), WHITE),
            *ring(12, (0.034, 0.003), (0.0595, 0.0122), 0.004, WHITE, visible=False),
            *ring(16, (0.032, 0.002), (0.053, 0.0095), 0.004, WHITE, solid=False),
            *ring(16, (0.052, 0.0093), (0.0605, 0.0122), 0.0045, RED, solid=False),
        ],
    )


def ramekin() -> Item:
    porcelain = (0.80, 0.81, 0.82)
    return scanned(
        "glazed_rim_porcelain_ramekin",
        0.038,
        [
            *octagon(0.027, 0.0007, 0.0073, porcelain),
            *ring(12, (0.0350, 0.004), (0.0378, 0.0425), 0.0050, porcelain, visible=False),
            *ring(12, (0.0350, 0.004), (0.0376, 0.0390), 0.0050, porcelain, solid=False),
            *ring(12, (0.0376, 0.0388), (0.0378, 0.0427), 0.0054, STEEL, solid=False),
        ],
    )


def cookies() -> Item:
    red, cream = (0.55, 0.10, 0.08), (0.90, 0.80, 0.55)
    return grocery(
        "cookies",
        0.019,
        [
            box((-0.031, -0.0413, -0.0094), (0.031, 0.0413, 0.0094), red),
            box((-0.0313, -0.014, -0.0097), (0.0313, 0.014, 0.0097), cream, solid=False),
            cylinder(0.010, 0.0, 0.0100, (0.45, 0.28, 0.12), solid=False),
        ],
    )


OBJECTS = [black_bowl, plate, ramekin, cookies]
