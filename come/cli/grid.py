"""A Hydra callback that records the jobs of a sweep and updates its tables and figure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from come.files import AXES, LISTING, write_text
from come.report.listing import list_job, make_report
from come.report.records import PARAMETERS

DRY_RUN = "COME_DRY_RUN"  # set in the environment by --dry-run


class GridReport(Callback):
    """Hydra callback that records the jobs of a sweep and updates its tables and figure.

    The output folder is `runs/grid-NAME/`. NAME is the name of the experiment, so all sweeps of an
    experiment share one table; without an experiment it is "sweep". `python -m come.report
    runs/grid-NAME` writes the tables and the figure again.

    Args:
        x: horizontal axis of the figure: "parameters", or an override key that varies over jobs.
        title: title of the figure.
    """

    running: ClassVar[Path | None] = None
    """Output folder of the sweep that this process runs."""

    def __init__(self, x: str = PARAMETERS, title: str = "") -> None:
        self.axes = {"x": x, "title": title}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep without an experiment starts a new list of jobs."""
        folder = GridReport.running = self._folder(config)
        if folder.name == "grid-sweep" and DRY_RUN not in os.environ:
            (folder / LISTING).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Adds the job to the list, and writes the tables and the figure again.

        A job that was refused by its checks leaves nothing, so that it is not listed.
        """
        if config.hydra.mode != RunMode.MULTIRUN or DRY_RUN in os.environ:
            return
        if not Path(config.hydra.runtime.output_dir).is_dir():
            return
        folder = self._folder(config)
        entry = {
            "folder": str(config.hydra.runtime.output_dir),
            "overrides": [
                override.replace("merge/", "merge.", 1) for override in config.hydra.overrides.task
            ],
        }
        list_job(folder, entry)
        write_text(folder / AXES, json.dumps(self.axes))
        make_report(folder)

    def _folder(self, config: DictConfig) -> Path:
        name = config.hydra.runtime.choices.get("experiment") or "sweep"
        return Path(config.hydra.sweep.dir).absolute() / f"grid-{name}"
