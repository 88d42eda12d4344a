"""Progress of long work: a bar on a terminal, and a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines if stderr is not a terminal


class ProgressBar(tqdm):
    """tqdm that also works in log files and notebooks without a terminal.

    Work that takes less than two seconds, or without a terminal less than `INTERVAL`, shows
    nothing.

    Args:
        args: positional arguments of tqdm.
        shown: whether to show anything.
        kwargs: keyword arguments of tqdm.
    """

    lines = False
    disable = True  # before __init__, in which an interrupt can come: tqdm closes what it removes

    def __init__(self, *args: Any, shown: bool = True, **kwargs: Any) -> None:
        self.lines = not sys.stderr.isatty()
        self.written = time.monotonic()
        given: dict[str, Any] = {"delay": 2, "leave": False, "disable": not shown, **kwargs}
        super().__init__(*args, **given)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the bar, or writes a line: "trial merges: 7 of 28, 01:40, about 05:00 left"."""
        if not self.lines:
            super().display(msg, pos)
            return
        if time.monotonic() - self.written < INTERVAL:
            return
        self.written = time.monotonic()
        state = self.format_dict
        count, total, seconds = state["n"], state["total"], state["elapsed"]
        line = f"{self.desc.removesuffix(': ')}: {count}"
        if total:
            left = self.format_interval(seconds / count * (total - count)) if count else "?"
            line += f" of {total}, {self.format_interval(seconds)}, about {left} left"
        self.fp.write(f"{line}\n")
        self.fp.flush()

    def close(self) -> None:
        """Removes the bar."""
        if self.lines and not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]
            return
        super().close()
