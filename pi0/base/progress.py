"""Progress bars with the time left. A file or pipe gets a line now and then."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar:
    """A progress bar that also shows a short state."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def update(self, amount: int = 1, state: str = "") -> None:
        """Advance by `amount` and show `state` behind the bar."""
        if state:
            self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(amount)


@contextmanager
def progress(total: int, label: str, unit: str, delay: float = 0, initial: int = 0) -> Iterator[Bar]:
    """A bar over `total` units; in a file or pipe it is redrawn every 10 seconds only. Under torchrun rank 0 shows it.

    What takes less than `delay` seconds gets no bar. `initial` units were done earlier.
    """
    hidden = os.environ.get("RANK", "0") != "0"
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total,
        desc=label,
        unit=unit,
        mininterval=interval,
        dynamic_ncols=True,
        disable=hidden,
        delay=delay,
        initial=initial,
    ) as bar:
        yield Bar(bar)
