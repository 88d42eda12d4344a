"""Trackio, local and without an account; the only module that imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio


class Trackio:
    """A run in Trackio, one per job, named by the job's hash; a rerun goes on with it.

    `trackio show` opens the dashboard. Data lie in TRACKIO_DIR, else in the hub's cache folder.

    Args:
        run_id: the job's hash.
        project: project name.
        group: the grid that the job belongs to.
        config: the resolved configuration, plain values.
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
        """Logs a picture."""
        self.run.log({f"figures/{name}": trackio.Image(str(path))})

    def finish(self) -> None:
        """Ends the run."""
        self.run.finish()
