"""A job: its settings, checked against its model and texts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from come.data.windows import TokenWindows
from come.evaluate.base import Evaluation
from come.job.estimate import Cost, compression_cost
from come.merge.budget import CandidateShape
from come.merge.plan import Plan
from come.models.loading import choose_device, choose_weights, load_weights
from come.models.shape import ModelShape
from come.records import ShapeResult
from come.report.numbers import megabytes
from come.schema import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A job whose settings have been checked against its model and texts, without weights."""

    settings: Settings
    folder: Path
    hash: str
    checkpoint: Path
    shape: ModelShape
    target: int
    tokenizer: PreTrainedTokenizerBase
    plan: Plan | None
    calibration: TokenWindows | None
    evaluations: dict[str, tuple[Evaluation, Any]] = field(default_factory=dict)
    """The evaluations by name, each with the data that its `prepare` returned."""
    training: TokenWindows | None = None
    start: Path | None = None
    """The folder of a merged model to start from, with its plan."""
    disk_bytes: int = 0
    """Bytes that the job writes to its folder."""
    shapes: tuple[CandidateShape, ...] = ()
    """The candidates for `merge.budget`; for a budget of time, as estimated without measuring."""
    shape_search: ShapeResult | None = None
    """The finished search among them."""

    @property
    def merged(self) -> str:
        """Name of the merged model's folder in the job folder."""
        return "model-merged" if self.settings.distill.active else "model"

    @property
    def cost(self) -> Cost:
        """The estimated cost of the merge."""
        return merge_cost(self.settings, self.shape, self.target)

    @property
    def disk_line(self) -> str:
        """Describes the disk space that the job needs, and what is free."""
        free = shutil.disk_usage(self.folder).free
        return f"disk: {megabytes(self.disk_bytes)}; {megabytes(free)} are free"

    @property
    def label(self) -> str:
        """Name of the model in tables and tags."""
        settings = self.settings.model
        return settings.name if settings.name != "local" else self.checkpoint.name

    def with_shape(self, shape: CandidateShape) -> Job:
        """The same job with the depth and the FFN width of a candidate."""
        merge = replace(self.settings.merge, width=shape.width)
        settings = replace(self.settings, merge=merge)
        return replace(self, settings=settings, target=shape.layers)

    def load(self, folder: Path | None = None, device: str | None = None) -> PreTrainedModel:
        """Loads the dense model, or the model in `folder`, on `device` or the job's device."""
        model = self.settings.model
        return load_weights(
            folder or self.checkpoint,
            dtype=model.dtype,
            device=device or model.device,
            weights=self.settings.weights,
            scratch=self.folder,
            trust_remote_code=model.trust_remote_code,
        )


def merge_cost(settings: Settings, shape: ModelShape, target: int) -> Cost:
    """The estimated cost of merging a model of `shape` down to `target` layers."""
    device = choose_device(settings.model.device)
    return compression_cost(
        shape,
        num_samples=settings.calibration.windows,
        seq_len=settings.calibration.seq_len,
        target=target,
        method=settings.merge,
        store=settings.calibration.place,
        batch_size=settings.calibration.batch,
        device=device.type,
        weights=choose_weights(settings.weights, shape, device),
    )
