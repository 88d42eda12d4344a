"""Tracker for Trackio, which runs locally without an account; no other module imports trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trackio

from come.tracking.base import RunTracker


class Trackio(RunTracker):
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
        run = trackio.init(
            project=project,
            name=f"{group}-{run_id[:6]}",
            group=group,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        super().__init__(trackio, run)
