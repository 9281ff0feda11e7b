"""Which of a robot's images belongs to which camera of the policy, told by the image's name.

LIBERO and the published policies have a base camera, which looks at the table, and one or two on wrists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from pi0.base.errors import InputError
from pi0.model.config import PUBLISHED_CAMERAS

BASE, LEFT_WRIST, RIGHT_WRIST = PUBLISHED_CAMERAS
# Names that LeRobot's and openpi's LIBERO data sets give the two cameras (lerobot docs/source/libero.mdx; openpi
# examples/libero/convert_libero_data_to_lerobot.py).
CONVENTION = {name: name for name in PUBLISHED_CAMERAS} | {
    "image": BASE,
    "image2": LEFT_WRIST,
    "wrist_image": LEFT_WRIST,
}
# Words of names in public data sets: ALOHA's cam_left_wrist, robosuite's robot0_eye_in_hand and agentview, DROID's
# exterior_image_1_left, CALVIN's rgb_static, SO-101's front and top. Where both occur ("hand_front"), the wrist it is.
_WRIST_WORDS = "wrist|hand|gripper|endeffector|effector|eef|eyeinhand|inhand"
_BASE_WORDS = "agent|front|base|top|overhead|third|thirdperson|exterior|external|static|scene"
_SUFFIX = r"(cam|camera|view|image|img|rgb)?\d*"


class CameraNameError(InputError, ValueError):
    """Images cannot be told apart; the message names them and what states their cameras."""


class How(StrEnum):
    """How an image's camera was decided."""

    STATED = "stated"
    CONVENTION = "a known name"
    WORDS = "by the words of its name"
    ORDER = "by its order only"


class CameraChoice(NamedTuple):
    """An image, the policy's camera that it belongs to, and how that was decided."""

    image: str
    camera: str
    how: How

    def __str__(self) -> str:
        return f"{self.image} is {self.camera}, {self.how}"


def choose_cameras(
    images: Sequence[str], source: str, mend: str, stated: Mapping[str, str] | None = None
) -> list[CameraChoice]:
    """The camera of each image, in the order of the images.

    A stated one comes first, then a known name, then words that robotics people use (wrist, hand, gripper; front, top,
    agent view, ...). Only then does the order decide: an image gets the first of `PUBLISHED_CAMERAS` that is left.

    Args:
        images: names, such as "front" of the feature observation.images.front.
        source: names them in errors.
        mend: how a user states the cameras.
        stated: camera to image.

    Raises:
        CameraNameError: two images belong to the same camera, there are too many, or a stated one is not there.
    """
    by_image = {image: camera for camera, image in (stated or {}).items()}
    unknown = [*(set(by_image) - set(images)), *(set(by_image.values()) - set(PUBLISHED_CAMERAS))]
    if unknown:
        raise CameraNameError(
            f"{source}: there is no {', '.join(sorted(unknown))}; images are {', '.join(images)}, "
            f"cameras {', '.join(PUBLISHED_CAMERAS)}"
        )
    wrists = [image for image in images if _kind(image) == LEFT_WRIST]
    chosen: dict[str, tuple[str, How]] = {}
    for image in images:
        if image in by_image:
            chosen[image] = by_image[image], How.STATED
        elif image in CONVENTION:
            chosen[image] = CONVENTION[image], How.CONVENTION
        elif kind := _kind(image):
            second = kind == LEFT_WRIST and len(wrists) > 1 and "right" in _words(image)
            chosen[image] = RIGHT_WRIST if second else kind, How.WORDS
    cameras = [camera for camera, _ in chosen.values()]
    free = [camera for camera in PUBLISHED_CAMERAS if camera not in cameras]
    if len(set(cameras)) < len(cameras) or len(images) > len(PUBLISHED_CAMERAS):
        found = "; ".join(str(CameraChoice(image, *choice)) for image, choice in chosen.items())
        raise CameraNameError(
            f"{source}: image features {', '.join(images)} cannot be assigned to {', '.join(PUBLISHED_CAMERAS)} "
            f"({found or 'no name tells'}); state them: {mend}"
        )
    return [
        CameraChoice(image, *(chosen[image] if image in chosen else (free.pop(0), How.ORDER)))
        for image in images
    ]


def is_told(image: str) -> bool:
    """Whether an image's name tells its camera."""
    return image in CONVENTION or _kind(image) is not None


def _words(image: str) -> list[str]:
    apart = re.sub(r"([a-z])([A-Z])", r"\1_\2", image)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def _kind(image: str) -> str | None:
    """`LEFT_WRIST` or `BASE` by the words of a name; None: no word tells."""
    words = _words(image)
    joined = ["".join(pair) for pair in pairwise(words)]
    for pattern, camera in ((_WRIST_WORDS, LEFT_WRIST), (_BASE_WORDS, BASE)):
        if any(re.fullmatch(f"({pattern}){_SUFFIX}", word) for word in (*words, *joined)):
            return camera
    return None
