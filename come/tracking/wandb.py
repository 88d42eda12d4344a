"""Tracker for Weights & Biases; no other module imports wandb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

MODES = ("online", "offline")


class WandB:
    """A Weights & Biases run per job; its id is the job hash, so running a job again overwrites it.

    Metrics named `merge/*` are plotted over `merge/step`, and `layer/*` over `layer_idx`.

    Args:
        folder: the job folder, which offline runs are written to.
        run_id: the job hash.
        project: project name.
        group: name of the group of runs, such as the experiment's.
        job_type: "compress", "distill" or "evaluate".
        mode: "online" or "offline".
        tags: tags of the run, such as model and method.
        config: the resolved settings, as plain data.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        project: str,
        group: str,
        job_type: str,
        mode: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        assert mode in MODES
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # for offline artifacts
        self.run = wandb.init(
            dir=str(folder),
            id=run_id,
            name=f"{group}-{run_id[:6]}",
            project=project,
            group=group,
            job_type=job_type,
            mode="online" if mode == "online" else "offline",
            tags=list(tags),
            config=dict(config),
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("merge/*", step_metric="merge/step")
        self.run.define_metric("layer/*", step_metric="layer_idx")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Logs numbers and strings."""
        self.run.log({k: v for k, v in metrics.items() if isinstance(v, int | float | str)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table."""
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self.run.log({f"tables/{name}": table})

    def figure(self, name: str, path: Path) -> None:
        """Logs an image file."""
        self.run.log({f"figures/{name}": wandb.Image(str(path))})

    def finish(self) -> None:
        """Finishes the run, so that the next job in this process starts a new one."""
        self.run.finish()
