"""Objects that LIBERO-PRO and LIBERO-plus add are made by LIBERO, and missing geometry is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pi0.libero import standins
from pi0.libero.added_objects import MissingGeometryError, add_objects, added_categories
from pi0.libero.assets import Assets, resolve_assets, use_assets
from pi0.libero.libero_import import no_cuda_devices, prepare_libero
from pi0.libero.standins.added import CHANGED, THINGS
from pi0.libero.stepping import TaskSim
from pi0.libero.suites import suite_tasks

pytestmark = pytest.mark.engine


@pytest.fixture
def table():
    """LIBERO's classes by category, with the added objects among them."""
    prepare_libero()
    use_assets(resolve_assets("standins"))
    with no_cuda_devices():
        import libero.libero.envs.problems  # noqa: F401 LIBERO's objects enter themselves
    from libero.libero.envs.base_object import OBJECTS_DICT

    add_objects()
    return OBJECTS_DICT


def test_every_added_object_is_made_from_its_own_file(table):
    assert len(added_categories()) == len(CHANGED) + len(THINGS) + 1
    for category in added_categories():
        made = table[category](name="it")
        file = Path(made.file)
        assert file.is_relative_to(resolve_assets("standins").path)
        assert file.stem == category.replace("white_white", "white")  # one has a second name


def test_objects_are_placed_as_libero_pro_and_libero_plus_place_them(table):
    as_cans = {"blue_ketchup", "yellow_milk"}
    for changed in CHANGED:
        here, there = table[changed.category](name="it"), table[changed.like](name="it")
        if changed.category in as_cans:
            assert (here.rotation, here.rotation_axis) == ((np.pi / 2, np.pi / 2), "z")
            assert here.rotation != there.rotation
        else:
            assert (here.rotation, here.rotation_axis) == (there.rotation, there.rotation_axis)
    for make in THINGS:
        thing = table[Path(make().file).stem](name="it")
        assert thing.rotation["x"] == (-np.pi / 2, -np.pi / 2)
        assert thing.rotation_axis is None


def test_the_yellow_stove_is_turned_on_and_glows_as_libero_s_stove(table):
    from libero.libero.envs.base_object import VISUAL_CHANGE_OBJECTS_DICT

    stove = table["yellow_stove"](name="yellow_stove_1", joints=None)
    assert stove.category_name in VISUAL_CHANGE_OBJECTS_DICT
    assert stove.turn_on(1.0)
    assert not stove.turn_on(0.0)


@pytest.mark.tried(
    "The assets in use lack an object that changed tasks add",
    "One line that names its file and the stand-ins",
)
def test_missing_geometry_is_named(tmp_path):
    folder = tmp_path / "assets"
    standins.build(folder)
    shutil.rmtree(folder / "stable_scanned_objects" / "red_basket")
    task = suite_tasks("libero_pro/object_object")[0]
    with pytest.raises(
        MissingGeometryError, match=r"has no stable_scanned_objects/red_basket/red_basket\.xml.*standins"
    ):
        TaskSim(task, Assets("configured", folder))
