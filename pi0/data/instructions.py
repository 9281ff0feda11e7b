"""Instructions in the names of LIBERO's tasks."""


def instruction_in(task_name: str) -> str:
    """The instruction in a task's name, without the scene that some names begin with (KITCHEN_SCENE3_...)."""
    words = task_name.split("_")
    scene = next((number for number, word in enumerate(words) if word.startswith("SCENE")), -1)
    return " ".join(words[scene + 1 :])
