"""What a test without a mark must not do: start a process or simulate. `make check` is quick because of it."""

import multiprocessing.process
import sys

import mujoco

# Marks of tests that may; docs/testing.md says what each is for.
COSTS = ("engine", "runs", "soak")
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
HARMLESS = (("uname",), ("fc-list",))  # libraries ask them for the processor and the fonts, once each
MODELS = ("from_xml_string", "from_xml_path", "from_binary_path")


class Forbidden(RuntimeError):
    """A test without a mark did what only a marked one may."""


class Boundary:
    """Refuses processes and simulations while it is closed.

    It watches Python's audit events, `multiprocessing`, and the functions that make MuJoCo's models.

    Attributes:
        closed: whether it refuses.
    """

    def __init__(self) -> None:
        self.closed = False
        self._refused: list[Forbidden] = []
        sys.addaudithook(self._audit)
        self._watch(multiprocessing.process.BaseProcess, "start", "starts a process with multiprocessing")
        for name in MODELS:
            self._watch(mujoco.MjModel, name, "makes a MuJoCo model")

    def check(self) -> None:
        """Raise the first refusal since the last check: the code under test may have caught it."""
        refused, self._refused = self._refused, []
        if refused:
            raise refused[0]

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self.closed:
            return
        if event in STARTS and arguments[:1] not in HARMLESS:
            self._refuse(f"starts a process ({' '.join([event, *map(str, arguments[:1])])})")
        if event == "import" and arguments[0] == "robosuite":
            self._refuse("imports robosuite, LIBERO's simulator")

    def _watch(self, owner: type, name: str, what: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments, **options):
            if self.closed:
                self._refuse(what)
            return function(*arguments, **options)

        setattr(owner, name, watched)

    def _refuse(self, what: str) -> None:
        self._refused.append(
            Forbidden(f"a test without a mark {what}: mark it engine, runs or soak (docs/testing.md)")
        )
        raise self._refused[-1]
