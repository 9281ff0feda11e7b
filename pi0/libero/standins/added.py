"""What LIBERO-PRO and LIBERO-plus add to LIBERO's objects.

LIBERO-PRO's are LIBERO's own in other colours, two of them larger. Which object, how much larger and roughly which colours
is read off its repository (github.com/RLinf/LIBERO-PRO, commit e235a97, liberopro/liberopro/assets).

LIBERO-plus's are things of a kitchen and a bathroom. Its package says what they are, not what they look like: here they have
the size that such things usually have, and colours that tell them apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pi0.libero.standins.fixtures import flat_stove, wooden_cabinet
from pi0.libero.standins.objects import (
    STEEL,
    alphabet_soup,
    basket,
    bbq_sauce,
    black_bowl,
    butter,
    chocolate_pudding,
    cream_cheese,
    ketchup,
    milk,
    moka_pot,
    plate,
    porcelain_mug,
    salad_dressing,
    tomato_sauce,
    wine_bottle,
    wine_rack,
)
from pi0.libero.standins.shapes import Body, Colour, Item, Part, box, cylinder, prism

BLUE = (0.0, 0.0, 1.0)
GOLD = (0.90, 0.82, 0.60)
PALE_YELLOW = (0.98, 0.87, 0.60)
DENSITY = 100.0  # kg/m3, as LIBERO's objects: a full can weighs 54 g


@dataclass(frozen=True)
class Changed:
    """An object of LIBERO-PRO: one of LIBERO's in other colours or of another size.

    Attributes:
        category: its name in BDDL files.
        original: makes the object that it is like.
        colours: one for each colour of the original, in the order of its parts; None keeps a colour, () keeps all.
        scale: how many times as large it is.
    """

    category: str
    original: Callable[[], Item]
    colours: tuple[Colour | None, ...] = ()
    scale: float = 1.0

    @property
    def like(self) -> str:
        """LIBERO's category of the original."""
        return Path(self.original().file).stem

    def make(self) -> Item:
        """Return its stand-in, in the family of the original."""
        item = self.original()
        if self.colours:
            old = list(dict.fromkeys(part.colour for part in _all_parts(item.body)))
            new = {was: now or was for was, now in zip(old, self.colours, strict=True)}
            item = replace(item, body=_painted(item.body, new))
        return replace(
            item,
            file=item.file.replace(self.like, self.category),
            body=_scaled(item.body, self.scale),
            bottom=item.bottom * self.scale,
            top=item.top * self.scale,
            radius=item.radius * self.scale,
        )


CHANGED = [
    Changed("black_bowl", black_bowl, ((0.45, 0.45, 0.45),)),  # white with a dense black pattern
    Changed("bigger_akita_black_bowl", black_bowl, scale=1.5),
    Changed("yellow_plate", plate, ((0.94, 0.93, 0.88), (0.95, 0.82, 0.36))),
    Changed("red_basket", basket, ((0.62, 0.16, 0.24), (0.80, 0.24, 0.34))),
    Changed("bigger_alphabet_soup", alphabet_soup, scale=1.5),
    Changed("red_alphabet_soup", alphabet_soup, (None, (0.62, 0.12, 0.08), (0.38, 0.44, 0.10))),
    Changed("yellow_tomato_sauce", tomato_sauce, (None, (0.10, 0.32, 0.58), (0.93, 0.66, 0.12))),
    Changed("blue_ketchup", ketchup, (BLUE, BLUE, BLUE)),
    Changed(
        "red_salad_dressing", salad_dressing, ((0.80, 0.80, 0.80), (0.80, 0.10, 0.05), (0.85, 0.45, 0.30))
    ),
    Changed("green_bbq_sauce", bbq_sauce, ((0.28, 0.15, 0.03), (0.30, 0.40, 0.06), (0.36, 0.50, 0.10))),
    Changed("yellow_milk", milk, ((0.93, 0.75, 0.08), (0.96, 0.82, 0.15), (0.15, 0.45, 0.10))),
    Changed("green_butter", butter, ((0.20, 0.55, 0.05), None)),
    Changed("red_cream_cheese", cream_cheese, ((0.90, 0.88, 0.88), (0.80, 0.14, 0.12))),
    Changed("green_chocolate_pudding", chocolate_pudding, ((0.35, 0.60, 0.16), None)),
    Changed("white_bottle", wine_bottle, ((0.30, 0.80, 0.30), (0.98, 0.98, 0.98), None)),
    Changed("brown_rack", wine_rack, (None, (0.28, 0.13, 0.04))),
    Changed("white_porcelain_mug", porcelain_mug, ((0.74, 0.68, 0.50), GOLD)),
    Changed("yellow_moka_pot", moka_pot, ((0.78, 0.60, 0.05), None)),
    Changed("yellow_cabinet", wooden_cabinet, ((0.98, 0.82, 0.54), (0.92, 0.76, 0.49), PALE_YELLOW)),
    Changed("yellow_stove", flat_stove, (PALE_YELLOW, None, (0.88, 0.46, 0.05), None)),
]


def _all_parts(body: Body) -> list[Part]:
    return [*body.parts, *(part for child in body.children for part in _all_parts(child))]


def _painted(body: Body, colours: dict[Colour, Colour]) -> Body:
    parts = [replace(part, colour=colours[part.colour]) for part in body.parts]
    return replace(body, parts=parts, children=[_painted(child, colours) for child in body.children])


def _scaled(body: Body, scale: float) -> Body:
    """Return the body in another size, of the same density. Nothing that has a joint inside is scaled."""
    if scale == 1:
        return body

    def times(lengths: Sequence[float]) -> tuple:
        return tuple(scale * length for length in lengths)

    assert not body.children
    return replace(
        body,
        mass=body.mass * scale**3,
        parts=[replace(part, size=times(part.size), pos=times(part.pos)) for part in body.parts],
        sites=[replace(site, size=times(site.size), pos=times(site.pos)) for site in body.sites],
    )


def thing(name: str, parts: list[Part]) -> Item:
    """Return one of LIBERO-plus's things: its z axis points up, its origin is its middle.

    LIBERO-plus's recorded states and its placement hold it 25 cm above what it falls on.
    """
    mass = DENSITY * sum(part.volume() for part in parts if part.solid)
    return Item(f"turbosquid_objects/{name}/{name}.xml", Body("object", mass, parts), bottom=-0.25)


def carton_box(name: str, x: float, y: float, z: float, colour: Colour, band: Colour) -> Item:
    """Return a box of these edges (m) with a band around its upper half."""
    x, y, z = x / 2, y / 2, z / 2
    return thing(
        name,
        [
            box((-x, -y, -z), (x, y, z), colour),
            box((-x - 0.0003, -y - 0.0003, 0.0), (x + 0.0003, y + 0.0003, 0.7 * z), band, solid=False),
        ],
    )


def tin(name: str, radius: float, height: float, label: Colour, picture: Colour) -> Item:
    """Return an upright tin of this radius and height (m)."""
    half = height / 2
    return thing(
        name,
        [
            *prism(radius * 0.97, -half, half, STEEL, visible=False),
            cylinder(radius, -half, half, STEEL, solid=False),
            cylinder(radius + 0.0004, -half * 0.88, half * 0.88, label, solid=False),
            cylinder(radius + 0.0007, -half * 0.35, half * 0.35, picture, solid=False),
        ],
    )


def flask(
    name: str, radius: float, height: float, body: Colour, label: Colour, cap: Colour, neck: float
) -> Item:
    """Return an upright bottle of this radius and height (m); `neck` is the part of the radius that the cap has."""
    low, high = -height / 2, height / 2
    shoulder, throat = low + 0.70 * height, low + 0.78 * height
    return thing(
        name,
        [
            *prism(radius * 0.97, low, shoulder, body, visible=False),
            cylinder(radius, low, shoulder, body, solid=False),
            cylinder(radius * (1 + neck) / 2, shoulder, throat, body),
            cylinder(radius * neck, throat, high, cap),
            cylinder(radius + 0.0004, low + 0.12 * height, low + 0.58 * height, label, solid=False),
        ],
    )


def box_of_shampoo() -> Item:
    return carton_box("box_of_shampoo__1", 0.065, 0.045, 0.170, (0.45, 0.72, 0.80), (0.95, 0.95, 0.97))


def bag_of_yeast() -> Item:
    """Return a filled bag whose upper edge is pressed flat."""
    paper, print_ = (0.90, 0.86, 0.74), (0.78, 0.18, 0.14)
    return thing(
        "bag_of_yeast",
        [
            box((-0.040, -0.018, -0.060), (0.040, 0.018, 0.035), paper),
            box((-0.038, -0.006, 0.035), (0.038, 0.006, 0.060), paper),
            box((-0.030, -0.0184, -0.035), (0.030, 0.0184, 0.015), print_, solid=False),
        ],
    )


def canned_food() -> Item:
    return tin("canned_food__1", 0.037, 0.110, (0.16, 0.46, 0.22), (0.92, 0.82, 0.30))


def can_of_soda() -> Item:
    return tin("can_of_soda__1", 0.033, 0.122, (0.80, 0.08, 0.10), (0.95, 0.95, 0.95))


def box_of_vegetable_juice() -> Item:
    return carton_box(
        "box_of_vegetable_juice__1", 0.064, 0.095, 0.165, (0.86, 0.28, 0.16), (0.30, 0.55, 0.20)
    )


def bottle_of_alfredo_sauce() -> Item:
    cream, gold = (0.93, 0.89, 0.76), (0.72, 0.58, 0.24)
    return flask("bottle_of_alfredo_sauce", 0.040, 0.150, cream, (0.25, 0.34, 0.20), gold, neck=0.85)


def bottle_of_baby_oil() -> Item:
    oil = (0.90, 0.86, 0.62)
    return flask("bottle_of_baby_oil", 0.030, 0.165, oil, (0.96, 0.74, 0.80), (0.96, 0.74, 0.80), neck=0.45)


def boxed_ink_cartridge() -> Item:
    return carton_box("boxed_ink_cartridge__3", 0.110, 0.035, 0.115, (0.10, 0.22, 0.52), (0.20, 0.62, 0.82))


def bottle_of_antihistamines() -> Item:
    white = (0.94, 0.94, 0.94)
    return flask("bottle_of_antihistamines", 0.023, 0.085, (0.82, 0.42, 0.10), white, white, neck=0.90)


def can_of_sardines() -> Item:
    return carton_box("can_of_sardines", 0.105, 0.060, 0.024, (0.70, 0.71, 0.73), (0.88, 0.72, 0.14))


def bottle_of_aspirin() -> Item:
    white = (0.94, 0.94, 0.94)
    return flask("bottle_of_aspirin", 0.024, 0.092, white, (0.20, 0.55, 0.30), white, neck=0.80)


def bottle_of_barbecue_sauce() -> Item:
    brown = (0.24, 0.09, 0.04)
    return flask(
        "bottle_of_barbecue_sauce__2", 0.034, 0.200, brown, (0.88, 0.60, 0.14), (0.06, 0.06, 0.06), neck=0.45
    )


def box_of_yogurt() -> Item:
    return carton_box("box_of_yogurt__1", 0.130, 0.065, 0.080, (0.92, 0.92, 0.95), (0.62, 0.30, 0.62))


THINGS = [
    box_of_shampoo,
    bag_of_yeast,
    canned_food,
    can_of_soda,
    box_of_vegetable_juice,
    bottle_of_alfredo_sauce,
    bottle_of_baby_oil,
    boxed_ink_cartridge,
    bottle_of_antihistamines,
    can_of_sardines,
    bottle_of_aspirin,
    bottle_of_barbecue_sauce,
    box_of_yogurt,
]
