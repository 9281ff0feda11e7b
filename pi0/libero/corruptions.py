"""The image noise of LIBERO-plus: five corruptions in ten strengths, of frames with 256 pixels a side.

Parameters and formulas are those of LIBERO-plus's envs/env_wrapper.py, which takes them from ImageNet-C (Hendrycks and
Dietterich 2019) with other strengths. It corrupts the agent's frame as robosuite gives it, bottom row first, and leaves
the hand's alone. Motion blur is ImageMagick's there (MotionBlurImage in MagickCore/effect.c).

Its random numbers come from NumPy's global stream, which also depends on everything drawn before. Here each frame has a
stream of its own, so that it is the same whoever draws it, and whatever was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numba import njit

SIZE = 256  # pixels a side of the frames that LIBERO-plus corrupts; lengths are in these pixels
STRENGTHS = 10
# By strength. Radius and deviation (pixels) of motion blur; it smears along an angle within 45 degrees of the rows.
MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
MOTION_ANGLE = 45.0
# The first factor beyond the largest, and the steps between the factors, of zoom blur.
ZOOM = (
    (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03),
    (1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03),
)  # fmt: skip
# Weight of fog, and by how much its detail fades from one scale to the next.
FOG = (
    (0.5, 3.0), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0),
    (3.0, 1.8), (3.5, 1.6), (4.0, 1.5), (4.5, 1.4), (5.0, 1.3),
)  # fmt: skip
# Deviation (pixels) of the blur, largest way of a pixel, and repetitions, of glass.
GLASS = (
    (0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2),
    (1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1),
)  # fmt: skip
GLASS_SIZE = 224  # ImageNet's; of a larger frame LIBERO-plus shuffles these rows and columns


def corrupted_view(render: Callable[[np.ndarray], None], noise: int, name: str, size: int) -> np.ndarray:
    """A noisy frame, uint8 [size, size, 3], upright.

    Args:
        render: draws the frame into uint8 [256, 256, 3].
        noise: which noise, 1 to 50: tens of motion, Gaussian and zoom blur, fog, glass.
        name: what the random numbers depend on.
        size: pixels a side. A frame is corrupted at 256 and then resized, so it is as noisy in every size.
    """
    frame = np.empty((SIZE, SIZE, 3), np.uint8)
    render(frame)
    random = np.random.default_rng(np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint32))
    return _resized(corrupt(frame[::-1], noise, random)[::-1], size)


def corrupt(frame: np.ndarray, noise: int, random: np.random.Generator) -> np.ndarray:
    """A frame, uint8 [256, 256, 3], with noise 1 to 50."""
    if not 1 <= noise <= len(_KINDS) * STRENGTHS:
        raise ValueError(f"noise is {noise}; LIBERO-plus has 1 to {len(_KINDS) * STRENGTHS}")
    kind, strength = divmod(noise - 1, STRENGTHS)
    return _KINDS[kind](frame, strength, random)


def _motion_blur(frame: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    """The mean of the frame and its copies shifted along a line, with half a bell curve as weights."""
    radius, deviation = MOTION[strength]
    angle = np.radians(random.uniform(-MOTION_ANGLE, MOTION_ANGLE))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    columns = np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    rows = np.ceil(steps * np.sin(angle) - 0.5).astype(int)
    everywhere = np.arange(SIZE)
    blurred = np.zeros(frame.shape)
    for weight, down, right in zip(weights, rows, columns, strict=True):
        blurred += weight * frame[_inside(everywhere + down)][:, _inside(everywhere + right)]
    return np.round(blurred).astype(np.uint8)


def _gaussian_blur(frame: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    return _to_bytes(_smoothed(frame / 255.0, strength + 1.0))


def _zoom_blur(frame: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    """The mean of the frame and of its middle enlarged by factors from 1 on."""
    from scipy.ndimage import zoom

    beyond, step = ZOOM[strength]
    factors = np.arange(1, beyond, step)
    plain = (frame / 255.0).astype(np.float32)
    total = np.zeros_like(plain)
    for factor in factors:
        part = int(np.ceil(SIZE / float(factor)))
        first = (SIZE - part) // 2
        middle = plain[first : first + part, first : first + part]
        larger = zoom(middle, (factor, factor, 1), order=1)
        trim = (larger.shape[0] - SIZE) // 2
        total += larger[trim : trim + SIZE, trim : trim + SIZE]
    return _to_bytes((plain + total) / (len(factors) + 1))


def _fog(frame: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    """The frame under a cloud, then as bright as it was at its brightest."""
    weight, fading = FOG[strength]
    plain = frame / 255.0
    brightest = plain.max()
    foggy = plain + weight * _cloud(fading, random)[:, :, None]
    return _to_bytes(foggy * brightest / (brightest + weight))


def _glass_blur(frame: np.ndarray, strength: int, random: np.random.Generator) -> np.ndarray:
    """Pixels replaced by near ones, one after the other, between two slight blurs."""
    deviation, way, repetitions = GLASS[strength]
    shuffled = _to_bytes(_smoothed(frame / 255.0, deviation))
    side = GLASS_SIZE - 2 * way
    for _ in range(repetitions):
        _shuffle(shuffled, way, random.integers(-way, way, size=(side, side, 2)))
    return _to_bytes(_smoothed(shuffled / 255.0, deviation))


_KINDS = (_motion_blur, _gaussian_blur, _zoom_blur, _fog, _glass_blur)


@njit(cache=True)
def _shuffle(frame: np.ndarray, way: int, moves: np.ndarray) -> None:
    """Give each pixel, from the last to the first, the colour of one that is up to `way` rows and columns away.

    LIBERO-plus means to exchange the two. But rows of a NumPy array are views, so one colour is kept twice.
    """
    last = frame.shape[0] - 1
    for i in range(moves.shape[0]):
        for j in range(moves.shape[1]):
            row, column = way + moves.shape[0] - i, way + moves.shape[1] - j
            from_row = min(max(row + moves[i, j, 1], 0), last)
            from_column = min(max(column + moves[i, j, 0], 0), last)
            for channel in range(3):
                frame[row, column, channel] = frame[from_row, from_column, channel]


def _cloud(fading: float, random: np.random.Generator) -> np.ndarray:
    """A random height map in [0, 1], float64 [256, 256], by the diamond-square algorithm on a torus."""
    heights = np.zeros((SIZE, SIZE))
    step, rough = SIZE, 100.0

    def mean_of(four: np.ndarray) -> np.ndarray:
        return four / 4 + rough * random.uniform(-rough, rough, four.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = mean_of(pairs + np.roll(pairs, -1, axis=1))
        middles, corners = heights[half::step, half::step], heights[::step, ::step]
        above_and_below = middles + np.roll(middles, 1, axis=0)
        left_and_right = corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = mean_of(left_and_right + above_and_below)
        beside = middles + np.roll(middles, 1, axis=1)
        upper_and_lower = corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = mean_of(beside + upper_and_lower)
        step, rough = half, rough / fading
    heights -= heights.min()
    return heights / heights.max()


def _smoothed(frame: np.ndarray, deviation: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(frame, (deviation, deviation, 0), mode="nearest", truncate=4.0)


def _to_bytes(frame: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as uint8; LIBERO-plus cuts fractions off."""
    return (np.clip(frame, 0, 1) * 255).astype(np.uint8)


def _inside(indices: np.ndarray) -> np.ndarray:
    return indices.clip(0, SIZE - 1)


def _resized(frame: np.ndarray, size: int) -> np.ndarray:
    """A frame in another size: each pixel is the mean of the area that it covers."""
    if size == SIZE:
        return frame
    edges = np.arange(size + 1) * (SIZE / size)
    pixels = np.arange(SIZE)
    ends, starts = edges[1:, None], edges[:-1, None]
    covered = (np.minimum(ends, pixels + 1) - np.maximum(starts, pixels)).clip(0, None)  # [size, 256]
    covered /= covered.sum(axis=1, keepdims=True)
    return np.round(
        np.einsum("ij,jkc,lk->ilc", covered, frame.astype(np.float64), covered, optimize=True)
    ).astype(np.uint8)
