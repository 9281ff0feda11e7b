"""Options of a command line with several values."""

import argparse
from collections.abc import Sequence
from typing import Any


class Collect(argparse.Action):
    """Action of an option that may be given several times: all its values count, not only the last ones."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Add the values to earlier ones; the first take the place of the default."""
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, ([] if earlier is self.default else earlier) + list(values or []))
