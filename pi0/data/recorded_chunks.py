"""Action chunks from demonstrations in files: all at once, or as an endless stream of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pi0.data import DataError, Demonstration, DemonstrationSet, Robot
from pi0.data.chunks import Chunks
from pi0.policy.images import to_network_images

# Rounding may move actions out of the controller's range by this much.
RANGE_SLACK = 1e-3


class PromptedTask(Protocol):
    """A task whose demonstrations a data set may hold."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def prompt(self) -> str:
        """The instruction."""


def demonstrations_of_tasks(
    demonstrations: DemonstrationSet, tasks: Sequence[PromptedTask], per_task: int, failures: bool = False
) -> dict[str, list[int]]:
    """Find each task's demonstrations by the instruction: {task name: at most `per_task` indices}.

    Args:
        demonstrations: the set.
        tasks: the tasks.
        per_task: most demonstrations of a task.
        failures: whether to take those that failed, too; else they are left out (`leave_out_failures`).

    Raises:
        DataError: a task has no demonstration; the message lists the instructions of the set.
    """
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(demonstrations.prompts):
        by_prompt.setdefault(plain_prompt(prompt), []).append(index)
    found = {task.name: by_prompt.get(plain_prompt(task.prompt), []) for task in tasks}
    missing = [name for name, indices in found.items() if not indices]
    if missing:
        raise DataError(
            f"no demonstration of {', '.join(missing)}; the data set has: {'; '.join(sorted(by_prompt))}"
        )
    if failures:
        return {name: indices[:per_task] for name, indices in found.items()}
    return {
        name: leave_out_failures(demonstrations, indices, f" of {name}", per_task)
        for name, indices in found.items()
    }


def leave_out_failures(
    demonstrations: DemonstrationSet, indices: Sequence[int], of: str = "", most: int | None = None
) -> list[int]:
    """The first `most` of some demonstrations without those that failed; says how many are left out.

    Raises:
        DataError: all of them failed.
    """
    solved: list[int] = []
    looked = 0
    for index in indices:
        if most is not None and len(solved) == most:
            break
        looked += 1
        if not demonstrations.read(index, image_steps=()).failed:
            solved.append(index)
    if not solved:
        raise DataError(
            f"all {looked} demonstrations{of} failed: they hold no reward above 0 and no success; to learn them all the "
            "same, accept it: --dataset-accept failures, algo.cotraining_accept=[failures], or failures=True in Python"
        )
    if left := looked - len(solved):
        print(
            f"{left} of {looked} demonstrations{of} failed, by their rewards or successes, and are left out"
        )
    return solved


def load_chunks(
    demonstrations: DemonstrationSet,
    indices: Sequence[int],
    *,
    robot: Robot,
    chunk: int,
    frame_every: int,
    image_size: int,
) -> Chunks:
    """The chunks of some demonstrations, all in memory; images are resized to `image_size` first.

    Args:
        demonstrations: the set.
        indices: the demonstrations to load.
        robot: sizes and range that states and actions must have.
        chunk: actions in a chunk.
        frame_every: control steps from one observation to the next.
        image_size: pixels a side; other sizes are resized like the network's input (`pi0.policy.images`).

    Raises:
        DataError: states or actions do not fit the robot, or a file cannot be read.
    """
    return Chunks.cat(
        [_chunks(demonstrations, index, robot, chunk, frame_every, image_size) for index in indices]
    )


def stream_chunks(
    demonstrations: DemonstrationSet,
    indices: Sequence[int],
    *,
    batch_size: int,
    robot: Robot,
    chunk: int,
    frame_every: int,
    image_size: int,
    generator: torch.Generator,
    chunks_in_memory: int = 2048,
) -> Iterator[Chunks]:
    """Endless batches of chunks in random order, for data that does not fit into memory.

    Each round reads every demonstration once, in random order. Batches are drawn without replacement from
    `chunks_in_memory` chunks, which are filled up when half of them are used.

    Args:
        demonstrations, indices, robot, chunk, frame_every, image_size: as for `load_chunks`.
        batch_size: chunks in a batch.
        generator: random generator of the order; the same seed gives the same batches.
        chunks_in_memory: chunks from which batches are drawn.

    Raises:
        DataError: as `load_chunks`, or there is no demonstration.
    """
    if not indices:
        raise DataError("no demonstration to draw batches from")

    def rounds() -> Iterator[Chunks]:
        while True:
            for position in torch.randperm(len(indices), generator=generator).tolist():
                yield _chunks(demonstrations, indices[position], robot, chunk, frame_every, image_size)

    incoming = rounds()
    pool = next(incoming)
    unused = torch.arange(len(pool))
    while True:
        if len(unused) < max(batch_size, chunks_in_memory // 2):
            parts = [pool[unused]]
            while sum(map(len, parts)) < max(batch_size, chunks_in_memory):
                parts.append(next(incoming))
            pool = Chunks.cat(parts)
            unused = torch.randperm(len(pool), generator=generator)
        yield pool[unused[:batch_size]]
        unused = unused[batch_size:]


def _chunks(
    demonstrations: DemonstrationSet,
    index: int,
    robot: Robot,
    chunk: int,
    frame_every: int,
    image_size: int,
) -> Chunks:
    steps = np.arange(0, demonstrations.lengths[index], frame_every)
    demonstration = demonstrations.read(index, steps.tolist())
    require_robot(demonstration, f"demonstration {index}", robot)
    chunks = Chunks.of_demonstration(demonstration, chunk)
    chunks.images = {camera: _resized(frames, image_size) for camera, frames in chunks.images.items()}
    return chunks


def require_robot(demonstration: Demonstration, source: str, robot: Robot) -> None:
    """Raise `DataError`, which calls the demonstration `source`, if its states or actions do not fit the robot."""
    widths = demonstration.states.shape[1:], demonstration.actions.shape[1:]
    if widths != ((robot.state_dim,), (robot.action_dim,)):
        raise DataError(
            f"{source} has states of {widths[0]} and actions of {widths[1]} features; "
            f"the robot's have {robot.state_dim} and {robot.action_dim}"
        )
    largest = float(np.abs(demonstration.actions).max())
    if largest > robot.largest_action + RANGE_SLACK:
        raise DataError(
            f"{source} has actions up to {largest:.3g}; the robot's controller takes "
            f"{-robot.largest_action:g} to {robot.largest_action:g}"
        )


def plain_prompt(prompt: str) -> str:
    """An instruction as instructions are compared: in lower case, with single spaces."""
    return " ".join(prompt.lower().split())


def _resized(frames: Tensor, size: int) -> Tensor:
    """Frames uint8 [N, h, w, 3] to uint8 [N, size, size, 3], resized like the network's input."""
    if frames.shape[1:3] == (size, size):
        return frames
    pixels = (to_network_images(frames, size) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
