"""The movable objects, as tables of primitives.

Sizes and masses follow the originals; shapes are this project's own. LIBERO records initial states with
the originals, so the heights of an object's lowest point and of the surfaces that carry others matter.
"""

from collections.abc import Sequence

from pi0.libero.standins.shapes import (
    Body,
    Colour,
    Item,
    Part,
    Site,
    Vec3,
    bar,
    box,
    cylinder,
    move,
    prism,
    ring,
    rotate,
    star,
    turn,
)

BLACK = (0.16, 0.16, 0.18)
WHITE = (0.92, 0.92, 0.94)
RED = (0.75, 0.12, 0.12)
STEEL = (0.55, 0.56, 0.58)


def scanned(name: str, mass: float, parts: list[Part], sites: Sequence[Site] = ()) -> Item:
    """Return an item of the family that LIBERO took from scans of household things."""
    return Item(f"stable_scanned_objects/{name}/{name}.xml", Body("object", mass, parts, sites))


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
            *ring(12, (0.0448, 0.0170), (0.0518, 0.0525), 0.0028, BLACK),
            *star(0.032, 0.0158, 0.0180, BLACK),
            box((-0.021, -0.021, 0.0016), (0.021, 0.021, 0.0170), BLACK),
            *ring(12, (0.0240, 0.003), (0.0440, 0.0180), 0.002, BLACK, solid=False),
        ],
    )


def white_bowl() -> Item:
    return scanned(
        "white_bowl",
        0.022,
        [
            *star(0.0170, 0.0006, 0.0042, WHITE),
            *ring(12, (0.0175, 0.0035), (0.0305, 0.0110), 0.0025, WHITE),
            *ring(12, (0.0315, 0.0105), (0.0395, 0.0350), 0.0025, WHITE),
        ],
    )


def plate() -> Item:
    return scanned(
        "plate",
        0.030,
        [
            box((-0.032, -0.032, -0.0025), (0.032, 0.032, 0.0052), WHITE),
            *ring(12, (0.034, 0.003), (0.0595, 0.0095), 0.004, WHITE, visible=False),
            *ring(16, (0.032, 0.002), (0.053, 0.0078), 0.004, WHITE, solid=False),
            *ring(16, (0.052, 0.0076), (0.0605, 0.0097), 0.0045, RED, solid=False),
        ],
    )


def ramekin() -> Item:
    porcelain = (0.80, 0.81, 0.82)
    return scanned(
        "glazed_rim_porcelain_ramekin",
        0.038,
        [
            *star(0.027, 0.0007, 0.0073, porcelain),
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


def can(name: str, bottom: float, label: Colour, picture: Colour) -> Item:
    """Return a tin can; its y axis points up in LIBERO's scenes."""
    low, high = -bottom, -bottom + 0.077
    parts = [
        *prism(0.0300, low, high, STEEL, visible=False),
        cylinder(0.0310, low, high, STEEL, solid=False),
        cylinder(0.0316, low + 0.005, high - 0.005, label, solid=False),
        cylinder(0.0319, low + 0.024, high - 0.024, picture, solid=False),
    ]
    return grocery(name, 0.054, rotate(parts, "x", -90))


def bottle(name: str, bottom: float, glass: Colour, label: Colour, cap: Colour) -> Item:
    """Return a flat sauce bottle, 14.5 cm high; its y axis points up in LIBERO's scenes."""
    low = -bottom
    parts = [
        box((-0.0277, -0.0170, low), (0.0277, 0.0170, low + 0.066), glass),
        box((-0.0235, -0.0145, low + 0.066), (0.0235, 0.0145, low + 0.094), glass),
        box((-0.0150, -0.0125, low + 0.094), (0.0150, 0.0125, low + 0.112), glass),
        box((-0.0145, -0.0145, low + 0.112), (0.0145, 0.0145, low + 0.145), cap),
        box((-0.0280, -0.0173, low + 0.016), (0.0280, 0.0173, low + 0.058), label, solid=False),
    ]
    return grocery(name, 0.047, rotate(parts, "x", -90))


def carton(name: str, bottom: float, lower: Colour, upper: Colour) -> Item:
    """Return a drinks carton with a gabled top; its y axis points up in LIBERO's scenes."""
    low = -bottom
    slope = [
        Part("box", (0.0263, 0.0170, 0.0022), (0, side * 0.0128, low + 0.1185), upper, turn("x", side * -40))
        for side in (-1, 1)
    ]
    parts = [
        box((-0.0263, -0.0263, low), (0.0263, 0.0263, low + 0.108), lower, solid=False),
        # A narrower foot: one recorded state has a packet where the carton's edge would be.
        box((-0.0195, -0.0195, low), (0.0195, 0.0195, low + 0.040), lower, visible=False),
        box((-0.0263, -0.0263, low + 0.040), (0.0263, 0.0263, low + 0.108), lower, visible=False),
        box((-0.0266, -0.0266, low + 0.060), (0.0266, 0.0266, low + 0.1085), upper, solid=False),
        *slope,
        box((-0.0263, -0.0030, low + 0.125), (0.0263, 0.0030, low + 0.134), upper),
        box((-0.0150, -0.0268, low + 0.015), (0.0150, 0.0268, low + 0.045), WHITE, solid=False),
    ]
    return grocery(name, 0.068, rotate(parts, "x", -90))


def packet(name: str, mass: float, size: Vec3, colour: Colour, band: Colour) -> Item:
    """Return a flat cardboard packet of half extents `size` with a band around its middle."""
    x, y, z = size
    return grocery(
        name,
        mass,
        [
            box((-x, -y, -z), size, colour),
            box((-x / 2, -y - 0.0003, -z - 0.0003), (x / 2, y + 0.0003, z + 0.0003), band, solid=False),
        ],
    )


# Where LIBERO recorded an object with its lower end below the ground, so that the originals are pushed out by
# up to 4 cm (and out of the living-room table into the air), `bottom` lies between the two heights.


def alphabet_soup() -> Item:
    return can("alphabet_soup", 0.0270, (0.16, 0.28, 0.55), (0.85, 0.85, 0.80))


def tomato_sauce() -> Item:
    return can("tomato_sauce", 0.0365, (0.72, 0.16, 0.10), (0.20, 0.45, 0.18))


def ketchup() -> Item:
    return bottle("ketchup", 0.0540, (0.62, 0.09, 0.05), (0.90, 0.86, 0.78), (0.93, 0.93, 0.93))


def salad_dressing() -> Item:
    return bottle("salad_dressing", 0.0540, (0.24, 0.30, 0.16), (0.75, 0.78, 0.60), (0.08, 0.42, 0.16))


def new_salad_dressing() -> Item:
    """The same bottle with its origin near the foot."""
    return bottle("new_salad_dressing", 0.0237, (0.24, 0.30, 0.16), (0.75, 0.78, 0.60), (0.08, 0.42, 0.16))


def bbq_sauce() -> Item:
    brown = (0.28, 0.10, 0.04)
    return grocery(
        "bbq_sauce",
        0.024,
        [
            box((-0.0235, -0.0146, -0.0450), (0.0235, 0.0146, 0.0087), brown),
            box((-0.0180, -0.0143, 0.0087), (0.0180, 0.0143, 0.0380), brown),
            box((-0.0140, -0.0140, 0.0380), (0.0140, 0.0140, 0.0620), (0.66, 0.22, 0.05)),
            box((-0.0238, -0.0149, -0.0370), (0.0238, 0.0149, 0.0000), (0.85, 0.50, 0.12), solid=False),
        ],
    )


def milk() -> Item:
    return carton("milk", 0.0525, (0.75, 0.12, 0.10), (0.80, 0.20, 0.16))


def orange_juice() -> Item:
    return carton("orange_juice", 0.0525, (0.93, 0.55, 0.08), (0.96, 0.66, 0.15))


def butter() -> Item:
    return packet("butter", 0.010, (0.0381, 0.0198, 0.0087), (0.85, 0.33, 0.08), (0.95, 0.85, 0.45))


def cream_cheese() -> Item:
    return packet("cream_cheese", 0.012, (0.0400, 0.0185, 0.0089), (0.30, 0.42, 0.68), (0.88, 0.90, 0.94))


def chocolate_pudding() -> Item:
    return packet(
        "chocolate_pudding", 0.022, (0.0400, 0.0232, 0.0131), (0.26, 0.14, 0.08), (0.72, 0.20, 0.16)
    )


def basket() -> Item:
    wicker = (0.58, 0.40, 0.22)
    walls = [
        Part("box", (0.0067, 0.0720, 0.0640), (-0.0727, 0, 0.0766), wicker, turn("y", -4)),
        Part("box", (0.0067, 0.0720, 0.0640), (0.0756, 0, 0.0766), wicker, turn("y", 4)),
        Part("box", (0.0790, 0.0064, 0.0640), (0.0005, -0.0688, 0.0810), wicker, turn("x", 3)),
        Part("box", (0.0790, 0.0064, 0.0640), (0.0005, 0.0688, 0.0810), wicker, turn("x", -3)),
    ]
    floor = box((-0.0741, -0.0724, 0.0046), (0.0791, 0.0724, 0.0216), (0.50, 0.34, 0.18))
    region = Site("contain_region", (0, 0, 0.0719), (0.0611, 0.0611, 0.0695), quat=turn("z", 180))
    return scanned("basket", 0.65, [floor, *walls], [region])


def furnishing(name: str, mass: float, parts: list[Part], sites: Sequence[Site] = ()) -> Item:
    """Return an item of the family that LIBERO took from a model shop: mugs, books, bottles, racks."""
    return Item(f"turbosquid_objects/{name}/{name}.xml", Body("object", mass, parts, sites))


def wine_bottle() -> Item:
    glass = (0.05, 0.06, 0.05)
    return furnishing(
        "wine_bottle",
        0.051,
        [
            *prism(0.0200, 0.0011, 0.0720, glass, visible=False),
            box((-0.0110, -0.0110, 0.0710), (0.0110, 0.0110, 0.0890), glass, visible=False),
            box((-0.0065, -0.0065, 0.0880), (0.0065, 0.0065, 0.1580), glass, visible=False),
            cylinder(0.0210, 0.0005, 0.0720, glass, solid=False),
            cylinder(0.0150, 0.0720, 0.0820, glass, solid=False),
            cylinder(0.0100, 0.0820, 0.0930, glass, solid=False),
            cylinder(0.0068, 0.0930, 0.1450, glass, solid=False),
            cylinder(0.0062, 0.1450, 0.1588, (0.80, 0.60, 0.38), solid=False),
            cylinder(0.0213, 0.0200, 0.0520, (0.62, 0.58, 0.50), solid=False),
        ],
    )


def wine_rack() -> Item:
    """Two slanted shelves, one above the other, each with a stop at its lower end, on a dark foot."""
    wood, foot = (0.82, 0.67, 0.51), (0.32, 0.11, 0.05)
    parts = [
        box((-0.0930, -0.1244, -0.0020), (0.0930, 0.1295, 0.0130), foot),
        Part("box", (0.0091, 0.0076, 0.1600), (0, 0.0089, 0.1703), foot, turn("x", 15.8)),
    ]
    for y, z in ((-0.0061, 0.2512), (-0.0427, 0.1273)):
        parts += [
            Part("box", (0.1344, 0.0789, 0.0045), (0, y, z), wood, turn("x", 31.4)),
            Part("box", (0.1322, 0.0011, 0.0087), (0, y - 0.0687, z - 0.0305), foot, turn("x", 29.0)),
        ]
    region = Site("top_region", (0, -0.0800, 0.2175), (0.1009, 0.0220, 0.0025), quat=turn("x", -62.5))
    return furnishing("wine_rack", 0.62, parts, [region])


def book(name: str, mass: float, low: Vec3, high: Vec3, cover: Colour, title: Part) -> Item:
    """Return a standing book, its back towards -y, between two corners; the pages show at the other sides."""
    pages = box(
        (low[0] + 0.0033, low[1] + 0.0013, low[2] + 0.0013),
        (high[0] - 0.0033, high[1] + 0.0005, high[2] + 0.0005),
        (0.88, 0.87, 0.84),
        solid=False,
    )
    return furnishing(name, mass, [box(low, high, cover), pages, title])


def black_book() -> Item:
    title = box((-0.0151, -0.0400, 0.0950), (0.0142, 0.0200, 0.1000), (0.80, 0.80, 0.80), solid=False)
    low, high = (-0.0148, -0.0673, 0.0022), (0.0139, 0.0430, 0.1366)
    return book("black_book", 0.156, low, high, (0.09, 0.09, 0.10), title)


def yellow_book() -> Item:
    title = box((-0.0105, -0.0300, 0.0850), (0.0137, 0.0250, 0.0900), (0.35, 0.20, 0.10), solid=False)
    low, high = (-0.0102, -0.0488, 0.0020), (0.0134, 0.0490, 0.1242)
    return book("yellow_book", 0.108, low, high, (0.86, 0.66, 0.16), title)


def wooden_tray() -> Item:
    """A crate with a handle above each short side."""
    wood, floor = (0.68, 0.52, 0.31), (0.60, 0.45, 0.27)
    parts = [
        box((-0.1362, -0.0851, -0.0001), (0.1518, 0.0747, 0.0071), floor),
        box((-0.1362, -0.0868, 0.0038), (0.1518, -0.0822, 0.0626), wood),
        box((-0.1362, 0.0735, 0.0028), (0.1518, 0.0781, 0.0596), wood),
    ]
    for wall, post in ((-0.1392, -0.1321), (0.1532, 0.1453)):
        parts += [
            box((wall - 0.0023, -0.0833, 0.0053), (wall + 0.0023, 0.0723, 0.0545), wood),
            box((post - 0.0067, -0.0840, 0.0785), (post + 0.0067, 0.0740, 0.0809), wood),
            *[
                box((post - 0.0055, y - 0.0062, 0.0016), (post + 0.0055, y + 0.0062, 0.0800), wood)
                for y in (-0.0785, 0.0685)
            ],
        ]
    region = Site("contain_region", (0.0086, -0.0047, 0.0426), (0.0404, 0.0784, 0.1355), quat=turn("y", 90))
    return furnishing("wooden_tray", 0.515, parts, [region])


def wooden_two_layer_shelf() -> Item:
    """Two boards between two sides and a back, open towards -y."""
    wood, inside = (0.22, 0.18, 0.15), (0.17, 0.14, 0.115)
    parts = [
        box((-0.1609, -0.0792, 0.0002), (-0.1467, 0.1116, 0.2061), wood),
        box((0.1560, -0.0792, 0.0002), (0.1702, 0.1116, 0.2061), wood),
        box((-0.1604, 0.1070, 0.0002), (0.1662, 0.1117, 0.2061), inside),
        box((-0.1480, -0.0707, 0.0692), (0.1584, 0.1081, 0.0708), inside),
        box((-0.1706, -0.0787, 0.2061), (0.1806, 0.1115, 0.2103), wood),
    ]
    sites = [
        Site("top_side", (0.0050, 0.0157, 0.2069), (0.1756, 0.0944, 0.0015)),
        Site("top_region", (0.0054, 0.0169, 0.1367), (0.0674, 0.0856, 0.1509), quat=turn("y", -90)),
        Site("bottom_region", (0.0056, 0.0169, 0.0141), (0.0353, 0.0856, 0.1558), quat=turn("y", 90)),
    ]
    return furnishing("wooden_two_layer_shelf", 2.32, parts, sites)


def desk_caddy() -> Item:
    wood, inside = (0.47, 0.33, 0.20), (0.38, 0.26, 0.15)
    parts = [
        box((-0.0755, -0.2169, 0.0014), (0.0755, 0.2169, 0.0138), inside),
        box((0.0628, -0.2098, 0.0100), (0.0708, 0.2098, 0.1683), wood),
        box((-0.0709, -0.2098, 0.0100), (-0.0629, 0.2098, 0.0741), wood),
        box((-0.0709, -0.2150, 0.0741), (-0.0629, -0.0640, 0.1673), wood),
        box((-0.0706, -0.2156, 0.0100), (0.0706, -0.2032, 0.1674), wood),
        box((-0.0706, -0.0742, 0.0100), (0.0706, -0.0618, 0.1674), wood),
        box((-0.0056, -0.0668, 0.0118), (0.0024, 0.0668, 0.0986), inside),
    ]
    for y in (0.0706, 0.2084):
        parts += [
            box((-0.0706, y - 0.0036, 0.0119), (0.0706, y + 0.0036, 0.0785), wood),
            box((0.0050, y - 0.0036, 0.0785), (0.0660, y + 0.0036, 0.1400), wood),
        ]
    half_turn = turn("y", 180)
    sites = [
        Site("right_contain_region", (0.0063, -0.1434, 0.0656), (0.0620, 0.0622, 0.0605), quat=half_turn),
        Site("left_contain_region", (0.0063, 0.1455, 0.0656), (0.0620, 0.0622, 0.0605), quat=half_turn),
        Site("back_contain_region", (0.0336, -0.0006, 0.0856), (0.0278, 0.0622, 0.0605), quat=half_turn),
        Site("front_contain_region", (-0.0310, -0.0006, 0.0405), (0.0278, 0.0622, 0.0360), quat=half_turn),
    ]
    return furnishing("desk_caddy", 1.64, parts, sites)


def moka_pot() -> Item:
    metal, black = (0.68, 0.68, 0.69), (0.07, 0.07, 0.07)
    handle = [
        bar((0.030, 0, 0.0560), (0.072, 0, 0.0620), 0.0132, 0.0130, black),
        bar((0.070, 0, 0.0660), (0.084, 0, 0.0480), 0.0132, 0.0130, black),
        bar((0.084, 0, 0.0500), (0.060, 0, 0.0020), 0.0132, 0.0130, black),
    ]
    parts = [
        *prism(0.0330, -0.0661, 0.0660, metal, visible=False),
        *ring(8, (0.0350, -0.0661), (0.0280, -0.0050), 0.010, metal, solid=False),
        *ring(8, (0.0240, -0.0060), (0.0320, 0.0600), 0.010, metal, solid=False),
        cylinder(0.0360, 0.0580, 0.0640, metal, solid=False),
        box((-0.0110, -0.0540, 0.0360), (0.0110, -0.0290, 0.0600), metal),
        box((-0.0055, -0.0070, 0.0630), (0.0055, 0.0060, 0.0857), black),
        *rotate(handle, "z", 90),
    ]
    return furnishing("moka_pot", 0.131, parts)


def frypan() -> Item:
    black, inside = (0.10, 0.10, 0.11), (0.16, 0.16, 0.17)
    parts = [
        *star(0.0640, 0.0008, 0.0125, inside),
        *ring(12, (0.0740, 0.005), (0.0960, 0.0405), 0.007, black),
        bar((0.1000, 0, 0.0270), (0.2593, 0, 0.0510), 0.0240, 0.0125, black),
    ]
    return scanned("chefmate_8_frypan", 0.203, parts)


def mug(
    name: str,
    centre: float,
    bottom: float,
    top: float,
    radii: tuple[float, float],
    handle: tuple[float, float, float],
    colours: tuple[Colour, Colour],
) -> Item:
    """Return an upright mug whose axis stands at x = `centre`.

    radii: of the middle of the wall at its lower and upper edge. handle: x of its outside, z of its lower
    and upper ends. colours: outside, and the round floor seen from above.
    """
    outside, inside = colours
    reach, low, high = handle
    side = 1 if reach > centre else -1
    wall = centre + side * (sum(radii) / 2 - 0.002)
    outer = reach - side * 0.004
    parts = [
        *move(star(radii[0] * 0.80, bottom, bottom + 0.008, inside), x=centre),
        *move(ring(12, (radii[0], bottom + 0.002), (radii[1], top), 0.005, outside), x=centre),
        bar((wall, 0, low), (outer, 0, low + 0.012), 0.016, 0.008, outside),
        bar((outer, 0, low + 0.008), (outer, 0, high - 0.008), 0.016, 0.008, outside),
        bar((wall, 0, high), (outer, 0, high - 0.012), 0.016, 0.008, outside),
    ]
    return furnishing(name, 0.121, parts)


def porcelain_mug() -> Item:
    white = (0.86, 0.86, 0.88)
    return mug(
        "porcelain_mug",
        0.0150,
        0.0024,
        0.1085,
        (0.0330, 0.0410),
        (-0.0640, 0.030, 0.092),
        (white, (0.70, 0.70, 0.72)),
    )


def red_coffee_mug() -> Item:
    red = (0.72, 0.10, 0.10)
    return mug(
        "red_coffee_mug",
        -0.0155,
        -0.0018,
        0.1308,
        (0.0280, 0.0400),
        (0.0600, 0.040, 0.112),
        (red, (0.50, 0.06, 0.06)),
    )


def white_yellow_mug() -> Item:
    yellow = (0.88, 0.80, 0.38)
    return mug(
        "white_yellow_mug",
        -0.0182,
        -0.0001,
        0.1031,
        (0.0360, 0.0430),
        (0.0680, 0.028, 0.082),
        (yellow, (0.80, 0.72, 0.34)),
    )


OBJECTS = [
    black_bowl,
    white_bowl,
    plate,
    ramekin,
    cookies,
    alphabet_soup,
    tomato_sauce,
    ketchup,
    salad_dressing,
    new_salad_dressing,
    bbq_sauce,
    milk,
    orange_juice,
    butter,
    cream_cheese,
    chocolate_pudding,
    basket,
    wine_bottle,
    wine_rack,
    black_book,
    yellow_book,
    wooden_tray,
    wooden_two_layer_shelf,
    desk_caddy,
    moka_pot,
    frypan,
    porcelain_mug,
    red_coffee_mug,
    white_yellow_mug,
]
