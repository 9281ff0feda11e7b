"""Camera images to the network's input.

LIBERO's own frames are upside down. openpi and LeRobot turn them by 180 degrees, in training data and in
evaluation (openpi, examples/libero/main.py; LeRobot, src/lerobot/processor/env_processor.py:
LiberoProcessorStep). The turned frames are upright, but left and right are exchanged. In this project frames are
upright and not mirrored. For a policy that learned from turned frames they are mirrored here
(`Pi0Config.mirror_images`), which gives the same picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_network_images(images: Tensor, size: int, mirror: bool = False) -> Tensor:
    """Resize without distortion, pad with black and scale: uint8 [B, h, w, 3] to float32 [B, 3, size, size].

    It follows openpi (packages/openpi-client/src/openpi_client/image_tools.py, src/openpi/models/model.py): the
    sides are cut to whole pixels; resizing is bilinear and antialiased; values are rounded to whole grey levels; the
    picture is centred, with the odd pixel of padding at the end; pixels go from [0, 255] to [-1, 1]. LeRobot
    (policies/common/vla_utils.py) neither antialiases nor rounds.

    Args:
        images: upright frames.
        size: height and width of the result, pixels.
        mirror: exchange right and left first.

    Raises:
        ValueError: not uint8, or not [B, h, w, 3].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, h, w, 3], not {images.dtype} {list(images.shape)}")
    if mirror:
        images = images.flip(2)
    pixels = images.permute(0, 3, 1, 2).float()
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        ratio = max(h, w) / size
        new_h, new_w = int(h / ratio), int(w / ratio)
        pixels = F.interpolate(pixels, (new_h, new_w), mode="bilinear", antialias=True).round().clamp(0, 255)
        top, left = (size - new_h) // 2, (size - new_w) // 2
        pixels = F.pad(pixels, (left, size - new_w - left, top, size - new_h - top))
    return pixels / 255 * 2 - 1
