"""Camera images to the network's input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_network_images(images: Tensor, size: int) -> Tensor:
    """Resize without distortion, pad with black and scale: uint8 [B, h, w, 3] to float32 [B, 3, size, size].

    As openpi: antialiased bilinear, rounded to whole grey levels, centred, pixels from [0, 255] to [-1, 1].

    Raises:
        ValueError: not uint8, or not [B, h, w, 3].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, h, w, 3], not {images.dtype} {list(images.shape)}")
    pixels = images.permute(0, 3, 1, 2).float()
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        ratio = max(h, w) / size
        new_h, new_w = int(h / ratio), int(w / ratio)
        pixels = F.interpolate(pixels, (new_h, new_w), mode="bilinear", antialias=True).round().clamp(0, 255)
        top, left = (size - new_h) // 2, (size - new_w) // 2
        pixels = F.pad(pixels, (left, size - new_w - left, top, size - new_h - top))
    return pixels / 255 * 2 - 1
