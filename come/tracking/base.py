"""One small protocol for everything a run logs, and its record on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Where metrics, tables and figures of a run go."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One record of named values; `/` in a name makes a section."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table."""

    def figure(self, name: str, path: Path) -> None:
        """A picture file."""

    def finish(self) -> None:
        """Ends the record."""


class JSONL:
    """The source of truth: one JSON object a line in `metrics.jsonl`, appended and flushed.

    Args:
        path: the file; a rerun of an interrupted job goes on at its end.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by finish

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics with the time in seconds since the epoch.

        A number that is not finite, for which JSON has no form, becomes null.
        """
        finite = {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps({"time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Tables are views of metrics that are already there."""

    def figure(self, name: str, path: Path) -> None:
        """Figures lie beside the file."""

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Trackers:
    """Several trackers as one; a context manager that finishes them."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs to all."""
        for tracker in self._trackers:
            tracker.log(metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Gives the table to all."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows)

    def figure(self, name: str, path: Path) -> None:
        """Gives the figure to all."""
        for tracker in self._trackers:
            tracker.figure(name, path)

    def finish(self) -> None:
        """Finishes all."""
        for tracker in self._trackers:
            tracker.finish()
