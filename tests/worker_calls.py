"""What tests let rollout workers do; they import it by name, so it stands apart from the tests."""


def open_tasks(worker) -> list[int]:
    """Indices of the tasks whose scenes are open, the one unused for longest first."""
    return [task.index for task in worker._open]
