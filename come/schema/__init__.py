"""The typed schema of a job's settings, with the rules between them; mirrors conf/."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Optional

from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sources.base import TextSource
from come.data.text_settings import TextSettings
from come.evaluate.base import Evaluation
from come.merge.method import Method
from come.merge.width import width_setting
from come.models.loading import DTYPES, WEIGHTS, choose_device
from come.schema.calibration import CalibrationSettings
from come.schema.distill import DistillSettings
from come.schema.export import ExportSettings, HubSettings
from come.schema.merge import MergeSettings
from come.setting import HasSettings, setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

BACKENDS = ("none", "wandb", "trackio")


@dataclass
class ModelSettings(HasSettings):
    """`model`: which model, and how it is loaded."""

    config_key = "model"

    name: str = setting("local", "label in tables and tags", counts=False)
    path: Optional[str] = setting(
        None, 'folder, hub id, or "pypi:PACKAGE"', kind=str, optional=True, counts=False
    )
    base_model: Optional[str] = setting(
        None,
        "hub id of a local folder, for the card of the result",
        kind=str,
        optional=True,
        counts=False,
    )
    revision: Optional[str] = setting(
        None, "branch, tag or commit of a hub repository", kind=str, optional=True
    )
    dtype: str = setting(
        "auto",
        "auto is the checkpoint's; fast is bfloat16 where the device computes in it, else float32",
        choices=DTYPES,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N", counts=False)
    weights: str = setting(
        "auto",
        "where decoder layers are: disk reads each when it runs; auto is disk where the weights "
        "need more than two thirds of the free memory, or the merge would not fit",
        choices=WEIGHTS,
        counts=False,
    )
    trust_remote_code: bool = setting(False, "whether code of the repository may run")
    begin_token: Optional[bool] = setting(
        None,
        "whether every window of text begins with the tokenizer's begin token; null for what the "
        "family needs",
        kind=bool,
        optional=True,
    )


@dataclass
class TrackingSettings(HasSettings):
    """`tracking`: which tracker is used in addition to metrics.jsonl."""

    config_key = "tracking"

    backend: str = setting("none", "trackio is local, without an account", choices=BACKENDS)
    mode: str = setting("offline", "of wandb", choices=("online", "offline"))
    project: str = setting("come", "project name")
    group: Optional[str] = setting(
        None, 'name of the grid; null for "model-method"', kind=str, optional=True
    )

    def check(self) -> None:
        """Raises ValueError if `mode` is set without wandb, or the backend is not installed."""
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
        plugins: Python files that register their own metrics, scores, rules, operators or text
            sources; they are loaded before names are looked up.
        eval: the chosen evaluations by name.
        from_run: folder of a finished run, or one of its model folders. The job starts from that
            model instead of calibrating and merging.
        command: the command line, for the report.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    eval: dict[str, Evaluation] = field(default_factory=dict)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    hub: HubSettings = field(default_factory=HubSettings)
    plugins: list[str] = field(default_factory=list)
    from_run: Optional[str] = None
    command: str = ""

    @property
    def weights(self) -> str:
        """Where decoder layers are kept: `model.weights`, but always memory with distillation."""
        return "memory" if self.distill.active else self.model.weights

    @property
    def held_out_texts(self) -> list[TextSource]:
        """The held-out texts of all evaluations, not read yet."""
        return [text for chosen in self.eval.values() for text in chosen.texts().values()]

    def record(self) -> dict[str, Any]:
        """All settings as plain data."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    def check(self) -> None:
        """Checks all rules that need no model.

        Raises:
            ValueError: a rule is violated; the message has the key, the value and what is allowed.
        """
        choose_device(self.model.device)
        self.calibration.check()
        self.merge.check()
        if self.distill.active and not self.merge.enabled:
            raise ValueError(
                f"distill={self.distill.method} trains merged layers, and merge=none makes none; "
                "choose a merge, or start from a finished run with from_run=FOLDER"
            )
        self.distill.check()
        if self.distill.active and self.model.weights == "disk":
            raise ValueError(
                f"model.weights=disk: distill={self.distill.method} trains a model in memory; take "
                "model.weights=memory, or distill=none"
            )
        if self.distill.active:
            self._check_distill()
        for evaluation in self.eval.values():
            evaluation.check()
        self.tracking.check()
        self._check_export()

    @property
    def training(self) -> TextSettings:
        """The settings that describe the training text: those of `distill` or of `calibration`."""
        own = self.distill.path or self.distill.source != "calibration"
        return self.distill if own else self.calibration

    @property
    def training_text(self) -> TextSource | None:
        """The source of the training text; None if it is sampled from the model."""
        chosen = self.training
        return None if chosen.source == SELF_GENERATED and not chosen.path else chosen.text_source()

    def _check_export(self) -> None:
        """Checks that there will be a model to export or to push."""
        self.export.check()
        self.hub.check()
        used = "export=gguf" if self.export.format != "none" else "hub.push"
        if self.export.format == "none" and self.hub.push is None:
            return
        if not self.merge.enabled:
            raise ValueError(f"{used}: merge=none makes no model; leave it out")
        if not self.merge.save_weights:
            raise ValueError(
                f"{used}: merge.save_weights=false keeps no weights; take merge.save_weights=true"
            )

    def _check_distill(self) -> None:
        """Checks the rules between `distill` and the other groups."""
        merge = self.merge
        if self.training is self.calibration and self.calibration.mix:
            raise ValueError(
                f"distill={self.distill.method} trains on one text, not on calibration.mix; choose "
                "the text with distill.source=NAME or distill.path=FILE"
            )
        text = self.training_text
        if text is not None:
            text.check()
        if text is None and self.distill.prefix_tokens:
            raise ValueError(
                f"distill.prefix_tokens={self.distill.prefix_tokens} continues real text, and the "
                "training text is sampled from the model; choose a text with distill.source=NAME "
                "or distill.path=FILE, or leave it out"
            )
        if text is not None and self.distill.stream and not self.distill.prefix_tokens:
            raise ValueError(
                "distill.stream=true is for text that the model writes; take "
                "distill.source=self_generated or distill.prefix_tokens=N, or leave it out"
            )
        if merge.save_at and merge.save_at != [merge.target_layers]:
            raise ValueError(
                f"merge.save_at={list(merge.save_at)}: one depth is distilled at a time; run "
                f"merge.target_layers={','.join(map(str, merge.save_at))} as a sweep (-m), or "
                "distill=none"
            )
        if merge.narrows or merge.searches_shape:
            shown = width_setting(merge) if merge.narrows else merge.budget
            raise ValueError(
                f"{shown}: distillation is for layers of the dense model's width; take distill=none"
            )
        if merge.block != "layer":
            raise ValueError(
                f"merge.sublayers={list(merge.sublayers)}: distillation trains whole layers; take "
                "distill=none"
            )
        if merge.drops_sublayers and merge.enabled:
            raise ValueError(
                f"merge.schedule={merge.schedule.name} drops sublayers of layers, and distillation "
                "trains whole layers; take distill=none"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Method | Evaluation):
        return value.record()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
