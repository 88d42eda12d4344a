"""Tracker for Weights & Biases; no other module imports wandb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from come.tracking.base import RunTracker


class WandB(RunTracker):
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
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")  # for offline artifacts
        run = wandb.init(
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
        run.define_metric("merge/*", step_metric="merge/step")
        run.define_metric("layer/*", step_metric="layer_idx")
        super().__init__(wandb, run)
