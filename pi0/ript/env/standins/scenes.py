"""Floors, walls, tables and lights.

LIBERO's arena classes load one of these files and then move and resize the parts they find by name, and
choose a floor and a wall texture by file name.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

from pi0.ript.env.standins.mjcf import numbers, write_tree

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


def arena(model: str) -> tuple[ET.Element, ET.Element, ET.Element]:
    """Return (root, asset, worldbody) of a room: floor, walls, lights and the cameras LIBERO moves."""
    root = ET.Element("mujoco", model=model)
    asset = ET.SubElement(root, "asset")
    sky = dict(type="skybox", builtin="gradient", rgb1="0.9 0.9 1", rgb2="0.2 0.3 0.4", width="64", height="64")
    ET.SubElement(asset, "texture", sky)
    for texture, material, file in (
        ("texplane", "floorplane", "light-gray-floor-tile.png"),
        ("tex-wall", "walls_mat", "light-gray-plaster.png"),
    ):
        ET.SubElement(asset, "texture", name=texture, type="2d", file=f"../textures/{file}")
        matt = dict(specular="0", shininess="0", reflectance="0", texuniform="true", texrepeat="1 1")
        ET.SubElement(asset, "material", matt, name=material, texture=texture)
    world = ET.SubElement(root, "worldbody")
    floor = dict(name="floor", type="plane", pos="0 0 0", size="3 3 .125", condim="3", group="1")
    ET.SubElement(world, "geom", floor, material="floorplane")
    for name, pos, size in (
        ("rear", (-2.0, 0, 1.5), (0.01, 3.0, 1.5)),
        ("front", (6.0, 0, 1.5), (0.01, 3.0, 1.5)),
        ("left", (2.0, 3.0, 1.5), (4.0, 0.01, 1.5)),
        ("right", (2.0, -3.0, 1.5), (4.0, 0.01, 1.5)),
    ):
        add_scenery(world, "box", pos, size, name=f"wall_{name}_visual", material="walls_mat")
    for name, pos in (("light1", (1, 1, 4)), ("light2", (-3, -3, 4))):
        ET.SubElement(
            world,
            "light",
            name=name,
            pos=numbers(pos),
            dir="0 -.15 -1",
            diffuse=".8 .8 .8",
            specular=".3 .3 .3",
            castshadow="false",
        )
    for name, pos, quat in (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.7071 0 0 0.7071"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.2761 1.488", "0.0099 0.0069 0.5912 0.8064"),
    ):
        ET.SubElement(world, "camera", name=name, mode="fixed", pos=pos, quat=quat)
    return root, asset, world


def add_scenery(parent: ET.Element, kind: str, pos, size, **attributes: str) -> ET.Element:
    """Append a geom that is only seen."""
    seen = dict(type=kind, pos=numbers(pos), size=numbers(size), group="1", contype="0", conaffinity="0")
    return ET.SubElement(parent, "geom", seen, **attributes)


def add_table(world: ET.Element, asset: ET.Element, body_name: str, prefix: str) -> ET.Element:
    """Append a table that the arena classes place and size: a solid, a visible top and four legs."""
    wood = dict(rgba=numbers((*TABLE_WOOD, 1)), specular="0.2", shininess="0", reflectance="0")
    ET.SubElement(asset, "material", wood, name="table_wood")
    body = ET.SubElement(world, "body", name=body_name, pos="0 0 0.4")
    solid = dict(type="box", pos="0 0 0", size="0.4 0.4 0.4", group="0", friction="1 0.005 0.0001")
    ET.SubElement(body, "geom", solid, name=f"{prefix}_collision")
    add_scenery(body, "box", (0, 0, 0), (0.4, 0.4, 0.4), name=f"{prefix}_visual", material="table_wood")
    top = dict(pos="0 0 0.4", size="0.001 0.001 0.001", rgba="0 0 0 0")
    ET.SubElement(body, "site", top, name=f"{prefix}_top")
    for number in range(1, 5):
        name = f"{prefix}_leg{number}_visual"
        add_scenery(body, "cylinder", (0, 0, 0), (0.05, 0.1), name=name, material="table_wood")
    return body


def write_tabletop(folder: Path) -> None:
    """Write the plain table of libero_spatial and libero_goal."""
    root, asset, world = arena("table_arena")
    add_table(world, asset, "table", "table")
    write_tree(root, folder / "scenes" / "libero_tabletop_base_style.xml")


SCENES = [write_tabletop]
