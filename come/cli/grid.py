"""A Hydra callback that lists the jobs of a sweep and keeps its tables up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from come.files import AXES, LISTING, write_text
from come.report.listing import list_job, make_report
from come.report.points import PARAMETERS


class GridReport(Callback):
    """Hydra callback: lists the jobs of a sweep, and keeps its tables and figure up to date.

    They stand in `runs/grid-NAME/`, NAME being the experiment's, whose sweeps share a table, or
    "sweep"; `python -m come.report runs/grid-NAME` makes them again.

    Args:
        x: horizontal axis of the figure: "parameters", or a key that the jobs differ in.
        title: of the figure.
    """

    running: ClassVar[Path | None] = None
    """The folder of the sweep that this process runs."""

    def __init__(self, x: str = PARAMETERS, title: str = "") -> None:
        self.axes = {"x": x, "title": title}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep that is no experiment begins a list of its own."""
        folder = GridReport.running = self._folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "grid-sweep":
            (folder / LISTING).unlink(missing_ok=True)
        write_text(folder / AXES, json.dumps(self.axes))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Adds the job to the list and makes the tables and the figure anew."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = self._folder(config)
        entry = {
            "folder": str(config.hydra.runtime.output_dir),
            "overrides": [
                override.replace("merge/", "merge.", 1) for override in config.hydra.overrides.task
            ],
        }
        list_job(folder, entry)
        make_report(folder)

    def _folder(self, config: DictConfig) -> Path:
        name = config.hydra.runtime.choices.get("experiment") or "sweep"
        return Path(config.hydra.sweep.dir).absolute() / f"grid-{name}"
