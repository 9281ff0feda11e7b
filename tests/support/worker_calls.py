"""What tests let rollout workers do; they import it by name, so it stands apart from the tests."""

import gc
import os
import signal
import struct
import sys
import weakref

from pi0.libero.worker import Progress


def open_tasks(worker) -> list[int]:
    """Indices of the tasks whose scenes are open, the one unused for longest first."""
    return [task.index for task in worker._open]


def tasks_in_memory(worker, tasks) -> list[int]:
    """Open the scenes of `tasks` in turn; indices of those that are in memory at the end, open or not."""
    gc.disable()  # so that nothing is given back by chance
    try:
        scenes = [(task.index, weakref.ref(worker.open(task)[0])) for task in tasks]
        return [index for index, scene in scenes if scene() is not None]
    finally:
        gc.enable()


def open_task(worker, task) -> None:
    worker.open(task)


def open_task_and_fail(worker, task) -> None:
    worker.open(task)
    raise LookupError("this one opens its scene and fails")


def do_nothing(_worker) -> None:
    pass


GARBAGE = {"none": None, "other": ["something else"], "another_slot": [Progress(99, 10, False, False)]}


def answer_with_garbage(worker, garbage: str) -> None:
    """Make the worker's next rollouts answer with what is no answer to them."""
    worker.advance = lambda _commands: GARBAGE[garbage]


def die_within_the_next_answer(worker) -> None:
    """Make the worker's next rollouts end it when a part of its answer is on its way."""

    def advance(_commands) -> None:
        os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"the first of 1000 bytes")
        os.kill(os.getpid(), signal.SIGKILL)

    worker.advance = advance
