"""Cabinets, stoves and other things that LIBERO bolts to the scene, with their doors, drawers and knobs.

The regions (sites), joints and their limits are what LIBERO's goals refer to, so they follow the originals.
Parent and child bodies of a bolted fixture do collide in MuJoCo, hence the gaps around drawers.
"""

from pi0.libero.standins.shapes import (
    PLAIN,
    Body,
    Colour,
    Item,
    Joint,
    Part,
    Site,
    box,
    cylinder,
    turn,
)

DARK_WOOD = (0.22, 0.18, 0.15)
HANDLE = (0.45, 0.45, 0.45)
STOVE_GREY = (0.42, 0.42, 0.43)
DARK = (0.10, 0.10, 0.10)


def articulated(name: str, base: Body, bottom=-0.045, top=0.045, radius=0.045) -> Item:
    """Return a fixture of the articulated family; LIBERO asks for one body named "object" around it."""
    return Item(f"articulated_objects/{name}.xml", Body("object", 0.0, children=[base]), bottom, top, radius)


def upright_wall(x: float, low: float, high: float, colour: Colour, **flags: bool) -> Part:
    """Return one side of a drawer."""
    return box((x - 0.0024, -0.066, low), (x + 0.0024, 0.090, high), colour, **flags)


def drawer(level: str, floor: float, region: float, wood: Colour, front: Colour) -> Body:
    """Return one drawer of the wooden cabinet, closed at joint position 0 and open towards -y.

    floor: height of the underside of its front. region: height of the middle of its inside.
    """
    low, high = floor, floor + 0.0683
    middle = 0.0034
    return Body(
        f"cabinet_{level}",
        3.0,
        [
            # Front, sides and handle are felt a little inside of where they are seen: recorded states hold
            # bowls and bottles that overlap the corners of an open drawer and would be kicked away.
            box((middle - 0.1094, -0.078, low), (middle + 0.1094, -0.065, high), front, solid=False),
            box((middle - 0.0835, -0.078, low), (middle + 0.0835, -0.065, high), front, visible=False),
            *[
                part
                for side in (-1, 1)
                for part in (
                    upright_wall(middle + side * 0.1054, low + 0.003, high - 0.003, wood, solid=False),
                    upright_wall(middle + side * 0.0985, low + 0.003, high - 0.003, wood, visible=False),
                )
            ],
            box((middle - 0.1000, 0.090, low + 0.003), (middle + 0.1000, 0.0943, high - 0.003), wood),
            box((middle - 0.1000, -0.066, low + 0.0023), (middle + 0.1000, 0.091, low + 0.0103), wood),
            box((-0.047, -0.1093, low + 0.0272), (0.0417, -0.094, low + 0.0426), HANDLE, solid=False),
            box((-0.047, -0.1020, low + 0.0272), (0.0417, -0.094, low + 0.0426), HANDLE, visible=False),
            box((-0.041, -0.096, low + 0.030), (-0.031, -0.077, low + 0.040), HANDLE, solid=False),
            box((0.024, -0.096, low + 0.030), (0.034, -0.077, low + 0.040), HANDLE, solid=False),
        ],
        [Site(f"{level}_region", (0.0033, 0.0113, region), (0.0299, 0.0756, 0.1022), quat=turn("y", 90))],
        joint=Joint(f"{level}_level", "slide", (0, 1, 0), (-0.16, 0.01), 50),
        point_mass=True,
    )


def cabinet(name: str, wood: Colour, front: Colour) -> Item:
    """Return a cabinet of three drawers."""
    shell = [
        box((-0.117, 0.1065, 0.007), (0.121, 0.1117, 0.220), wood),
        box((-0.119, -0.073, 0.0046), (0.127, 0.106, 0.0089), wood),
        box((-0.1173, -0.079, 0.0089), (-0.1075, 0.1117, 0.2201), wood),
        box((0.1142, -0.079, 0.0089), (0.1241, 0.1117, 0.2201), wood),
        box((-0.1234, -0.079, 0.2201), (0.1312, 0.1117, 0.2230), wood, solid=False),
        # Recorded bowls drop into the open top drawer so close to the front that this edge would tip them.
        box((-0.1234, -0.048, 0.2195), (0.1312, 0.1117, 0.2230), wood, visible=False),
    ]
    drawers = [
        drawer("top", 0.1488, 0.1856, wood, front),
        drawer("middle", 0.0791, 0.1169, wood, front),
        drawer("bottom", 0.0105, 0.0470, wood, front),
    ]
    top_side = Site("top_side", (0.0035, 0.0157, 0.2215), (0.1253, 0.0944, 0.0015))
    return articulated(name, Body("base", 2.2, shell, [top_side], drawers))


def wooden_cabinet() -> Item:
    return cabinet("wooden_cabinet", DARK_WOOD, (0.17, 0.14, 0.115))


def white_cabinet() -> Item:
    return cabinet("white_cabinet", (0.84, 0.83, 0.84), (0.76, 0.75, 0.76))


def flat_stove() -> Item:
    rings = [
        cylinder(radius, 0.0195, 0.0200 + 0.0004 * number, colour, solid=False)
        for number, (radius, colour) in enumerate(
            [
                (0.065, (0.20, 0.20, 0.21)),
                (0.050, STOVE_GREY),
                (0.045, (0.20, 0.20, 0.21)),
                (0.025, STOVE_GREY),
            ],
            start=1,
        )
    ]
    burner = Body(
        "burner",
        2.9,
        [
            box((-0.095, -0.095, -0.020), (0.095, 0.095, 0.0200), STOVE_GREY, solid=False),
            box((-0.095, -0.095, -0.020), (0.095, 0.095, 0.0255), STOVE_GREY, visible=False),
            *rings,
        ],
        [
            Site("cook_region", (0, 0, 0), (0.075, 0.075, 0.0025)),
            Site("burner", (0, 0, 0.0222), (0.0625, 0.0005), "cylinder", rgba=(0.9, 0.05, 0.05, 1)),
        ],
        pos=(0.15, 0, 0),
        surface=PLAIN,
    )
    button = Body(
        "button",
        3.0,
        [
            cylinder(0.0455, 0.0005, 0.0128, DARK),
            box((-0.012, -0.017, 0.0014), (0.0135, 0.051, 0.050), DARK),
            box((-0.002, 0.030, 0.0500), (0.003, 0.050, 0.0505), (0.85, 0.85, 0.85), solid=False),
        ],
        joint=Joint("button", "hinge", (0, 0, 1), (-0.005, 2.1), 1),
        point_mass=True,
        quat=turn("z", 90),
    )
    return articulated("flat_stove", Body("base", 0.0, children=[burner, button]))


def microwave() -> Item:
    black, grey, glass = (0.13, 0.13, 0.14), (0.50, 0.50, 0.51), (0.30, 0.31, 0.33)
    shell = [
        box((-0.1725, -0.0865, 0.000), (-0.1435, 0.1110, 0.187), black),
        box((0.0640, -0.0865, 0.000), (0.1725, 0.1110, 0.187), black),
        box((-0.1435, 0.0805, 0.000), (0.0640, 0.1105, 0.187), black),
        box((-0.1435, -0.0865, 0.168), (0.0640, 0.0805, 0.187), black),
        box((-0.1435, -0.0865, 0.000), (0.0640, 0.0805, 0.024), black),
        box((0.0885, -0.1105, 0.000), (0.1725, -0.0865, 0.187), black),
        box((0.1000, -0.1115, 0.115), (0.1610, -0.1105, 0.170), grey, solid=False),
        *[
            box((x, y, -0.015), (x + 0.03, y + 0.03, 0.0), black, solid=False)
            for x in (-0.165, 0.135)
            for y in (-0.10, 0.07)
        ],
    ]
    door = Body(
        "microdoorroot",
        0.26,
        [
            box((0.002, -0.025, -0.0925), (0.257, -0.001, 0.0905), black),
            box((0.035, -0.0258, -0.060), (0.205, -0.0002, 0.060), glass, solid=False),
            box((0.2290, -0.064, -0.070), (0.2460, -0.046, 0.070), grey),
            *[
                box((0.2320, -0.050, z - 0.008), (0.2430, -0.024, z + 0.008), grey, solid=False)
                for z in (-0.058, 0.058)
            ],
        ],
        joint=Joint("microjoint", "hinge", (0, 0, 1), (-2.094, 0), 0.5),
        pos=(-0.1725, -0.088, 0.096),
        surface=PLAIN,
    )
    sites = [
        Site("top_side", (0, 0.01, 0.20), (0.12, 0.0835, 0.005)),
        Site("heating_region", (0, 0.01, 0.096), (0.12, 0.0835, 0.08)),
    ]
    base = Body("base", 3.0, shell, sites, [door], surface=PLAIN)
    return articulated("microwave", base, bottom=-0.06, top=0.06, radius=0.015)


FIXTURES = [wooden_cabinet, white_cabinet, flat_stove, microwave]
