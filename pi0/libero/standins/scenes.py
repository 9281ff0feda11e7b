"""Floors, walls, tables and lights.

LIBERO's arena classes load one of these files and then move and resize the parts they find by name, and
choose a floor and a wall texture by file name.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pi0.libero.standins.mjcf import numbers, write_tree
from pi0.libero.standins.shapes import Colour, Vec3

TABLE_WOOD = (0.79, 0.71, 0.63)

# Flat colours, as red, green, blue from 0 to 255, for every floor and wall that an arena can ask for.
TEXTURES = {
    "brown_ceramic_tile.png": (176, 152, 131),
    "ceramic.png": (246, 246, 242),
    "dark_blue_wall.png": (102, 145, 170),
    "dark_floor_texture.png": (57, 53, 46),
    "dark_gray_plaster.png": (97, 106, 113),
    "dark_green_plaster_wall.png": (60, 90, 70),
    "gray_ceramic_tile.png": (186, 170, 154),
    "gray_plaster.png": (235, 237, 235),
    "light-gray-floor-tile.png": (195, 185, 177),
    "light-gray-plaster.png": (222, 218, 211),
    "light_blue_wall.png": (185, 225, 244),
    "rustic_floor.png": (162, 161, 157),
    "seamless_wood_planks_floor.png": (233, 199, 136),
    "tile_grigia_caldera_porcelain_floor.png": (195, 185, 177),
    "white_marble_floor.png": (232, 232, 232),
    "white_wall.png": (234, 235, 233),
    "yellow_linen_wall_texture.png": (219, 213, 180),
}


def write_textures(folder: Path) -> None:
    """Write the floor and wall textures as tiny flat pictures."""
    (folder / "textures").mkdir(parents=True, exist_ok=True)
    for name, colour in TEXTURES.items():
        Image.new("RGB", (8, 8), colour).save(folder / "textures" / name)


def arena(model: str, floor_body: bool = False) -> tuple[ET.Element, ET.Element, ET.Element]:
    """Return (root, asset, worldbody) of a room: floor, walls, lights and the cameras LIBERO moves.

    floor_body: wrap the floor in a body of its own, which some arena classes ask for.
    """
    root = ET.Element("mujoco", model=model)
    asset = ET.SubElement(root, "asset")
    sky = {"type": "skybox", "builtin": "gradient", "rgb1": "0.9 0.9 1", "rgb2": "0.2 0.3 0.4"}
    ET.SubElement(asset, "texture", sky, width="64", height="64")
    for texture, material, file in (
        ("texplane", "floorplane", "light-gray-floor-tile.png"),
        ("tex-wall", "walls_mat", "light-gray-plaster.png"),
    ):
        ET.SubElement(asset, "texture", name=texture, type="2d", file=f"../textures/{file}")
        matt = {"specular": "0", "shininess": "0", "reflectance": "0", "texuniform": "true"}
        ET.SubElement(asset, "material", matt, name=material, texture=texture)
    world = ET.SubElement(root, "worldbody")
    floor = {
        "name": "floor",
        "type": "plane",
        "pos": "0 0 0",
        "size": "3 3 .125",
        "condim": "3",
        "group": "1",
    }
    holder = ET.SubElement(world, "body", name="floor", pos="0 0 0") if floor_body else world
    ET.SubElement(holder, "geom", floor, material="floorplane")
    for name, pos, size in (
        ("rear", (-2.0, 0, 1.5), (0.01, 3.0, 1.5)),
        ("front", (6.0, 0, 1.5), (0.01, 3.0, 1.5)),
        ("left", (2.0, 3.0, 1.5), (4.0, 0.01, 1.5)),
        ("right", (2.0, -3.0, 1.5), (4.0, 0.01, 1.5)),
    ):
        add_scenery(world, "box", pos, size, name=f"wall_{name}_visual", material="walls_mat")
    for name, place in (("light1", "1 1 4"), ("light2", "-3 -3 4")):
        light = {"diffuse": ".8 .8 .8", "specular": ".3 .3 .3", "castshadow": "false"}
        ET.SubElement(world, "light", light, name=name, pos=place, dir="0 -.15 -1")
    for name, place, quat in (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.7071 0 0 0.7071"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.2761 1.488", "0.0099 0.0069 0.5912 0.8064"),
    ):
        ET.SubElement(world, "camera", name=name, mode="fixed", pos=place, quat=quat)
    return root, asset, world


def add_scenery(parent: ET.Element, kind: str, pos: Vec3, size: Sequence[float], **attributes: str) -> None:
    """Append a geom that is only seen; `attributes` give its material or colour."""
    seen = {"type": kind, "pos": numbers(pos), "size": numbers(size), "group": "1"}
    ET.SubElement(parent, "geom", seen, contype="0", conaffinity="0", **attributes)


def add_material(asset: ET.Element, name: str, colour: Colour) -> None:
    """Append a flat colour that barely shines."""
    flat = {"rgba": numbers((*colour, 1)), "specular": "0.2", "shininess": "0", "reflectance": "0"}
    ET.SubElement(asset, "material", flat, name=name)


def add_solid(parent: ET.Element, pos: Vec3, size: Vec3, **attributes: str) -> None:
    """Append a box that is only felt, with MuJoCo's soft default contact.

    Recorded objects start up to 2 cm inside it; a hard one would throw them into the air.
    """
    felt = {"type": "box", "pos": numbers(pos), "size": numbers(size), "group": "0"}
    ET.SubElement(parent, "geom", felt, friction="1 0.005 0.0001", **attributes)


def sizable_table(root: ET.Element, asset: ET.Element, world: ET.Element) -> None:
    """Append the table that the arena classes place and size: a solid, a visible top and four legs."""
    add_material(asset, "table_wood", TABLE_WOOD)
    body = ET.SubElement(world, "body", name="table", pos="0 0 0.4")
    add_solid(body, (0, 0, 0), (0.4, 0.4, 0.4), name="table_collision")
    add_scenery(body, "box", (0, 0, 0), (0.4, 0.4, 0.4), name="table_visual", material="table_wood")
    top = {"pos": "0 0 0.4", "size": "0.001 0.001 0.001", "rgba": "0 0 0 0"}
    ET.SubElement(body, "site", top, name="table_top")
    for number in range(1, 5):
        leg = f"table_leg{number}_visual"
        add_scenery(body, "cylinder", (0, 0, 0), (0.05, 0.1), name=leg, material="table_wood")


def write_tabletop(folder: Path) -> None:
    """Write the plain table of libero_spatial and libero_goal."""
    room = arena("table_arena")
    sizable_table(*room)
    write_tree(room[0], folder / "scenes" / "libero_tabletop_base_style.xml")


def write_floor(folder: Path) -> None:
    """Write the bare floor of libero_object."""
    room = arena("floor_arena", floor_body=True)
    write_tree(room[0], folder / "scenes" / "libero_floor_base_style.xml")


def write_kitchen(folder: Path) -> None:
    """Write the kitchen of libero_10 and libero_90, where the arena class brings other walls and floor."""
    room = arena("kitchen_arena")
    sizable_table(*room)
    write_tree(room[0], folder / "scenes" / "libero_kitchen_tabletop_base_style.xml")


def write_living_room(folder: Path) -> None:
    """Write the living room of libero_10 and libero_90: a low oval table, and a wall unit behind the robot."""
    root, asset, world = arena("living_room_arena", floor_body=True)
    add_material(asset, "table_wood", (0.36, 0.23, 0.17))
    add_material(asset, "unit_wood", (0.12, 0.10, 0.10))
    body = ET.SubElement(world, "body", name="living_room_table", pos="0 0 0")
    top = 0.4368
    add_solid(body, (-0.24, 0.04, top - 0.15), (0.56, 0.82, 0.15))
    for x, y in ((0.58, 0.46), (0.54, 0.58), (0.45, 0.70), (0.32, 0.80), (0.16, 0.86)):
        add_scenery(body, "box", (-0.24, 0.04, top - 0.012), (x, y, 0.012), material="table_wood")
    add_scenery(body, "box", (-0.24, 0.04, 0.2), (0.3, 0.4, 0.2), material="unit_wood")
    for z in (0.20, 0.55):
        add_scenery(world, "box", (-1.72, 0, z), (0.20, 0.95, 0.015), material="unit_wood")
    write_tree(root, folder / "scenes" / "libero_living_room_tabletop_base_style.xml")


def write_study(folder: Path) -> None:
    """Write the study of libero_10 and libero_90: a desk, a bookshelf and a plant."""
    root, asset, world = arena("study_arena")
    for name, colour in (
        ("desk_wood", (0.56, 0.39, 0.23)),
        ("shelf", (0.80, 0.80, 0.80)),
        ("leaf", (0.20, 0.32, 0.12)),
        ("pot", (0.45, 0.45, 0.45)),
    ):
        add_material(asset, name, colour)
    body = ET.SubElement(world, "body", name="study_table", pos="0 0 0")
    add_solid(body, (0, 0, 0.7851), (0.68, 1.38, 0.10))
    add_scenery(body, "box", (0, 0, 0.8493), (0.68, 1.38, 0.0358), material="desk_wood")
    for x in (-0.5, 0.5):
        for y in (-0.7, 0.7):
            add_scenery(body, "box", (x, y, 0.405), (0.03, 0.05, 0.405), material="desk_wood")
    for z in (0.3, 0.7, 1.1, 1.5):
        add_scenery(world, "box", (-1.75, -1.0, z), (0.15, 0.55, 0.015), material="shelf")
    for y in (-1.55, -0.45):
        add_scenery(world, "box", (-1.75, y, 0.8), (0.15, 0.015, 0.8), material="shelf")
    add_scenery(world, "cylinder", (-1.6, 0.6, 0.35), (0.14, 0.35), material="pot")
    for x, y, z in ((-1.65, 0.55, 1.0), (-1.55, 0.68, 1.15), (-1.62, 0.60, 1.35)):
        add_scenery(world, "ellipsoid", (x, y, z), (0.06, 0.16, 0.14), material="leaf")
    write_tree(root, folder / "scenes" / "libero_study_base_style.xml")


SCENES = [write_tabletop, write_floor, write_kitchen, write_living_room, write_study]
