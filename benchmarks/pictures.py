"""Draws two pictures for the docs: docs/pictures/standins.png and rendering.png.

    python benchmarks/pictures.py

The first shows six tasks with the stand-ins, from the agent's view and the wrist camera. The second shows the
policy's frames with `render: exact` and `render: fast`, at 64 and at 256 pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.figures import save
from pi0.base.errors import run_command
from pi0.libero import gl
from pi0.libero.assets import resolve_assets
from pi0.libero.rendering import CAMERAS, Renderer
from pi0.libero.stepping import TaskSim
from pi0.libero.suites import suite_tasks

SCENES = [
    ("libero_spatial", 3),
    ("libero_spatial", 4),
    ("libero_object", 0),
    ("libero_goal", 0),
    ("libero_10", 0),
    ("libero_10", 9),
]
TASK = ("libero_spatial", 3)


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    gl.select_backend()
    np.random.seed(0)
    draw_standins(ROOT / "docs" / "pictures" / "standins.png")
    draw_rendering(ROOT / "docs" / "pictures" / "rendering.png")


def scene(suite: str, index: int) -> TaskSim:
    """A task at a drawn initial state."""
    sim = TaskSim(suite_tasks(suite)[index], resolve_assets("standins"))
    sim.reset(sim.draw_init_state(), settle_steps=10)
    return sim


def draw_standins(file: Path) -> None:
    """Draw both cameras of every scene, a column for each scene."""
    figure, axes = plt.subplots(2, len(SCENES), figsize=(2.2 * len(SCENES), 4.8))
    for column, (suite, index) in zip(axes.T, SCENES, strict=True):
        sim = scene(suite, index)
        renderer = Renderer(sim.model, "exact", 256)
        for axis, camera in zip(column, CAMERAS.values(), strict=True):
            axis.imshow(frame(renderer, sim, camera, 256))
        column[0].set_title(f"{suite} {index}", fontsize=9)
        renderer.close()
    save_frames(figure, axes, file)


def draw_rendering(file: Path) -> None:
    """Draw exact and fast frames in two rows, with columns for the cameras at 64 and at 256 pixels."""
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.4))
    for row, mode in zip(axes, ("exact", "fast"), strict=True):
        sim = scene(*TASK)  # a scene each: `fast` changes what is visible in the model
        renderer = Renderer(sim.model, mode, 256)
        views = [(camera, size) for size in (64, 256) for camera in CAMERAS.values()]
        for axis, (camera, size) in zip(row, views, strict=True):
            axis.imshow(frame(renderer, sim, camera, size), interpolation="nearest")
            axis.set_title(f"{camera}, {size} pixels", fontsize=8)
        row[0].set_ylabel(f"render: {mode}")
        renderer.close()
    save_frames(figure, axes, file)


def frame(renderer: Renderer, sim: TaskSim, camera: str, size: int) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    renderer.render(sim.data, camera, out)
    return out


def save_frames(figure: plt.Figure, axes: np.ndarray, file: Path) -> None:
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, file, dpi=80)


if __name__ == "__main__":
    run_command(main)
