"""Tracker for Trackio, which runs locally without an account; no other module imports trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio


class Trackio:
    """A Trackio run per job, named by group and job hash; a resumed job continues its run.

    `trackio show` opens the dashboard. The data are in TRACKIO_DIR, by default in the hub's cache
    folder.

    Args:
        run_id: the job hash.
        project: project name.
        group: name of the group of runs, such as the experiment's.
        config: the resolved settings, as plain data.
    """

    def __init__(self, *, run_id: str, project: str, group: str, config: Mapping[str, Any]) -> None:
        self.run = trackio.init(
            project=project,
            name=f"{group}-{run_id[:6]}",
            group=group,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs numbers and strings."""
        self.run.log({k: v for k, v in metrics.items() if isinstance(v, int | float | str)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table."""
        table = trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self.run.log({f"tables/{name}": table})

    def figure(self, name: str, path: Path) -> None:
        """Logs an image file."""
        self.run.log({f"figures/{name}": trackio.Image(str(path))})

    def finish(self) -> None:
        """Finishes the run."""
        self.run.finish()
