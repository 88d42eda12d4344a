"""The protocol of trackers, and the tracker that writes metrics to disk.

The trackers of accelerate would not be shorter: its Trackio tracker logs neither tables nor images,
and its W&B tracker has no metric axes.
"""

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
    """Records metrics, tables and figures of a run."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs one record of named values; a `/` in a name separates the section from the name."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table."""

    def figure(self, name: str, path: Path) -> None:
        """Logs an image file."""

    def finish(self) -> None:
        """Finishes the run."""


class JSONL:
    """The source of truth: appends one JSON object per line to `metrics.jsonl`, and flushes it.

    Args:
        path: the file; a resumed job appends to it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by finish

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics, with the time in seconds since the epoch.

        A number that is not finite is written as null, because JSON cannot represent it.
        """
        finite = {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps({"time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes nothing: tables repeat metrics that are already logged."""

    def figure(self, name: str, path: Path) -> None:
        """Writes nothing: figures are already files in the job folder."""

    def finish(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunTracker:
    """Logs to a run of a package with the interface of wandb.

    Args:
        package: the module, which has `Table` and `Image`.
        run: what its `init` returned.
    """

    def __init__(self, package: Any, run: Any) -> None:
        self.run = run
        self._package = package

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs numbers and strings."""
        self.run.log({k: v for k, v in metrics.items() if isinstance(v, int | float | str)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table."""
        table = self._package.Table(columns=list(columns), data=[list(row) for row in rows])
        self.run.log({f"tables/{name}": table})

    def figure(self, name: str, path: Path) -> None:
        """Logs an image file."""
        self.run.log({f"figures/{name}": self._package.Image(str(path))})

    def finish(self) -> None:
        """Finishes the run, so that the next job in this process starts a new one."""
        self.run.finish()


class Trackers:
    """Forwards calls to several trackers; as a context manager, finishes them at exit."""

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
        """Logs to all trackers."""
        for tracker in self._trackers:
            tracker.log(metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table to all trackers."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows)

    def figure(self, name: str, path: Path) -> None:
        """Logs a figure to all trackers."""
        for tracker in self._trackers:
            tracker.figure(name, path)

    def finish(self) -> None:
        """Finishes all trackers."""
        for tracker in self._trackers:
            tracker.finish()
