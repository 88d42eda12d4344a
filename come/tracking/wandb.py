"""Weights & Biases; the only module that imports it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

MODES = ("online", "offline")


class WandB:
    """A run in Weights & Biases, one per job; its id is the job's hash, so a rerun overwrites.

    Metrics under `merge/` are drawn over `merge/step`, those under `layer/` over `layer_idx`.

    Args:
        folder: the job's folder; offline records go below it.
        run_id: the job's hash.
        project: project name.
        group: the grid that the job belongs to.
        job_type: the stage.
        mode: "online" or "offline".
        tags: method, model and the like.
        config: the resolved configuration, plain values.
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
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # offline artifacts stay with the run
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
        """Logs a picture."""
        self.run.log({f"figures/{name}": wandb.Image(str(path))})

    def finish(self) -> None:
        """Ends the run, so that the next job of this process gets its own."""
        self.run.finish()
