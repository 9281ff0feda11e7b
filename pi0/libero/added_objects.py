"""Objects of LIBERO-PRO and LIBERO-plus, made known to LIBERO.

LIBERO makes what a BDDL file names from a table of classes. LIBERO-PRO's objects are made by the classes of those that they are
like, from files of their own; LIBERO-plus's by one class of this module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.libero.standins.added import CHANGED, THINGS

# LIBERO-PRO turns these two when it places them as it turns cans, unlike the bottle and the carton that they are like
# (envs/objects/hope_objects.py); drawn initial states follow it.
_PLACED_AS = {"blue_ketchup": "tomato_sauce", "yellow_milk": "tomato_sauce"}
# LIBERO-PRO's second name for one of its mugs (envs/objects/__init__.py).
_SAME_AS = {"white_white_porcelain_mug": "white_porcelain_mug"}
# How LIBERO-plus turns all its objects when it places them (envs/objects/custom_objects.py).
_THINGS_TURN = {"x": (-np.pi / 2, -np.pi / 2), "y": (-np.pi, -np.pi), "z": (np.pi, np.pi)}


class MissingGeometryError(InputError, RuntimeError):
    """The assets in use have no geometry for an object that LIBERO-PRO or LIBERO-plus adds."""


def added_categories() -> frozenset[str]:
    """The categories that LIBERO-PRO and LIBERO-plus add to LIBERO's."""
    things = (Path(make().file).stem for make in THINGS)
    return frozenset({*(changed.category for changed in CHANGED), *_SAME_AS, *things})


def add_objects() -> None:
    """Enter the added objects into LIBERO's table, once LIBERO's own objects are imported."""
    known = importlib.import_module("libero.libero.envs.base_object").OBJECTS_DICT
    for changed in CHANGED:
        make = known[_PLACED_AS.get(changed.category, changed.like)]
        known.setdefault(changed.category, _maker(make, changed.category, changed.make().file))
    for name, same in _SAME_AS.items():
        known.setdefault(name, known[same])
    for make_item in THINGS:
        file = make_item().file
        name = Path(file).stem
        known.setdefault(name, _maker(partial(_thing, known["wine_bottle"]), name, file))


def _maker(make: Callable[..., Any], category: str, file: str) -> Callable[..., Any]:
    """What LIBERO calls to make one of these objects."""

    def made(**arguments: Any) -> Any:
        folder = Path(importlib.import_module("libero.libero").get_assets_path())
        if not (folder / file).is_file():
            raise MissingGeometryError(
                f"the assets folder {folder} has no {file}, which LIBERO-PRO or LIBERO-plus adds; the stand-ins have it "
                "(--assets standins)"
            )
        return make(obj_name=category, **arguments)

    return made


def _thing(make: Callable[..., Any], **arguments: Any) -> Any:
    thing = make(**arguments)
    thing.rotation, thing.rotation_axis = _THINGS_TURN, None
    return thing
