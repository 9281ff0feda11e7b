"""Options of a command line: several values, and numbers of a range."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from pi0.base.typed_yaml import out_of_range


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


def ranged(
    kind: type, low: float | None = None, above: float | None = None, high: float | None = None
) -> Callable[[str], Any]:
    """The `type` of an option that is a number of a range; the ends are those of `pi0.base.typed_yaml.key`."""

    def parse(text: str) -> Any:
        number = kind(text)
        if problem := out_of_range(number, low, above, high):
            raise argparse.ArgumentTypeError(f"{text}: {problem}")
        return number

    parse.__name__ = kind.__name__  # argparse prints this name if the text is no number
    return parse
