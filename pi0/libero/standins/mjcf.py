"""Write items as MJCF files in the nesting that robosuite's `MujocoXMLObject` reads."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

from pi0.libero.standins.shapes import UPRIGHT, Body, Item, Part, Site, Surface

# robosuite tells by the group what is drawn (1) and what collides (0).
SEEN = {"group": "1", "mass": "0", "contype": "0", "conaffinity": "0"}


def numbers(values: Iterable[float]) -> str:
    """Return numbers as MJCF wants them, rounded to a hundredth of a millimetre."""
    return " ".join(f"{round(value, 5):g}" for value in values)


def write_item(item: Item, folder: Path) -> None:
    """Write one object or fixture below the assets folder."""
    root = ET.Element("mujoco", model=Path(item.file).stem)
    holder = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    add_body(holder, item.body)
    for name, pos in (
        ("bottom_site", (0, 0, item.bottom)),
        ("top_site", (0, 0, item.top)),
        ("horizontal_radius_site", (item.radius, item.radius, 0)),
    ):
        add_site(holder, Site(name, pos, (0.005,), "sphere", rgba=(0, 0, 0, 0)))
    write_tree(root, folder / item.file)


def write_tree(root: ET.Element, path: Path) -> None:
    """Write an element tree, indented, creating its folder."""
    ET.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ET.tostring(root, encoding="unicode") + "\n")


def add_body(parent: ET.Element, body: Body) -> None:
    """Append a body with its parts, sites and children."""
    element = ET.SubElement(parent, "body", {"name": body.name} | _pose(body.pos, body.quat))
    volume = sum(part.volume() for part in body.parts if part.solid)
    if body.joint is not None:
        joint = body.joint
        ET.SubElement(
            element,
            "joint",
            name=joint.name,
            type=joint.kind,
            axis=numbers(joint.axis),
            pos=numbers(joint.pos),
            limited="true",
            range=numbers(joint.limits),
            damping=numbers([joint.damping]),
        )
    if body.point_mass:
        ET.SubElement(element, "inertial", pos="0 0 0", mass=numbers([body.mass]), diaginertia="1 1 1")
    density = body.mass / volume if volume else 0.0
    for site in body.sites:
        add_site(element, site)
    felt = {"group": "0", "density": f"{density:g}"} | surface_attributes(body.surface)
    for part in body.parts:
        if part.visible:
            add_part(element, part, SEEN)
        if part.solid:
            add_part(element, part, felt)
    for child in body.children:
        add_body(element, child)


def add_part(parent: ET.Element, part: Part, attributes: dict[str, str]) -> None:
    """Append one geom; `attributes` say whether it is seen or felt."""
    shape = {"type": part.kind, "size": numbers(part.size), "rgba": numbers((*part.colour, 1))}
    ET.SubElement(parent, "geom", shape | _pose(part.pos, part.quat) | attributes)


def add_site(parent: ET.Element, site: Site) -> None:
    """Append one site."""
    ET.SubElement(
        parent,
        "site",
        name=site.name,
        type=site.kind,
        size=numbers(site.size),
        rgba=numbers(site.rgba),
        group="0",
        pos=numbers(site.pos),
        quat=numbers(site.quat),  # LIBERO reads pos and quat even where they are the defaults
    )


def surface_attributes(surface: Surface) -> dict[str, str]:
    """Return a surface as geom attributes."""
    return {
        "friction": numbers(surface.friction),
        "solref": numbers(surface.solref),
        "solimp": numbers(surface.solimp),
    }


def _pose(pos: Iterable[float], quat: Iterable[float]) -> dict[str, str]:
    pose = {"pos": numbers(pos)}
    if tuple(quat) != UPRIGHT:
        pose["quat"] = numbers(quat)
    return pose
