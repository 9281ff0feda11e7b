"""What tests let rollout workers do; they import it by name, so it stands apart from the tests."""

import gc
import weakref


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
