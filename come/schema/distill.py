"""Settings of the training after the merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL, Distillation
from come.schema.text import TextSettings

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.

log = logging.getLogger(__name__)


@dataclass
class DistillSettings(TextSettings):
    """`distill`: training of the merged layers against the dense model (see `come.distill`).

    Attributes:
        method: none, come_sp, come_mp, lora, logits.
        source: of the training text; "calibration" for the calibration's.
        tokens: training tokens; a text with fewer is read again.
        seq_len: tokens of a window.
        batch_size: windows of an optimiser step, over all processes.
        micro_batch: windows of one forward pass.
        validation_samples: windows held out of the training text; they choose the best weights.
        loss: of hidden states: mse, kl (the paper's), cosine, mix.
        loss_weights: of the parts of "mix".
        temperature: T of the KLs.
        logit_weight: of the KL between logits, beside the hidden states' (come_sp).
        train: what of the merged layers trains: layers, norms, outputs, lora.
        lora_rank: rank of adapters, or "auto": as many parameters as the merged layers have.
        learning_rate: AdamW's, at its highest.
        warmup: share of the steps in which it rises; then it falls along a cosine to zero.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        precision: auto (bfloat16 autocast on CUDA), float32, bfloat16.
        gradient_checkpointing: whether layers run again for the gradient, to save memory.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        patience: validations without a better one behind which training stops; 0 for never.
        workers: processes in which merged layers train side by side (come_mp).
        seed: of the draw and the order of windows; where it and seq_len are calibration's, and the
            text is long enough, no window validates that the merge was calibrated on.
    """

    method: str = "none"
    source: str = "calibration"
    tokens: int = 150_000
    seq_len: int = 256
    batch_size: int = 8
    micro_batch: int = 8
    validation_samples: int = 16
    loss: str = "mse"
    loss_weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    logit_weight: float = 0.0
    train: str = "layers"
    lora_rank: Any = "auto"
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    validate_every: int = 25
    checkpoint_every: int = 25
    patience: int = 0
    workers: int = 1
    seed: int = 0

    @property
    def active(self) -> bool:
        """Whether anything trains."""
        return DISTILL.get(self.method).active

    def distillation(self) -> Distillation:
        """The method, made from the settings."""
        return DISTILL.create(self.method, {f.name: getattr(self, f.name) for f in fields(self)})

    def train_config(self, device: str) -> TrainConfig:
        """How training runs on a device type."""
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if device == "cuda" else "float32"
        names = {f.name for f in fields(TrainConfig)} - {"steps", "precision"}
        steps = max(1, self.tokens // (self.batch_size * self.seq_len))
        own = {name: getattr(self, name) for name in names}
        own["micro_batch"] = min(self.micro_batch, self.batch_size)
        return TrainConfig(steps=steps, precision=precision, **own)

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        if not self.active:
            return
        self.distillation()
        whole = ("tokens", "batch_size", "micro_batch", "validation_samples", "validate_every")
        for key in (*whole, "checkpoint_every", "workers"):
            if getattr(self, key) < 1:
                raise ValueError(f"distill.{key}={getattr(self, key)}: must be at least 1")
        if self.seq_len < 2:
            raise ValueError(f"distill.seq_len={self.seq_len}: a window has 2 tokens or more")
        for key in ("learning_rate", "clip"):
            if not getattr(self, key) > 0:
                raise ValueError(f"distill.{key}={getattr(self, key)}: must be above 0")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0 or self.patience < 0:
            raise ValueError(
                f"distill.warmup={self.warmup} must be in [0, 1), weight_decay="
                f"{self.weight_decay} and patience={self.patience} at least 0"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"distill.precision={self.precision!r}: allowed are auto, float32, bfloat16"
            )
        if self.workers > 1 and not DISTILL.get(self.method).apart:
            raise ValueError(
                f"distill.workers={self.workers} is for distill=come_mp; several processes of "
                f"distill={self.method} are started by accelerate launch"
            )

    def warn_unread(self) -> None:
        """Says which settings the method does not read."""
        taken = DISTILL.options(self.method)
        keys = ("loss", "loss_weights", "temperature", "logit_weight", "train", "lora_rank")
        unread = {key for key in (*keys, "gradient_checkpointing") if key not in taken}
        if self.loss != "mix":
            unread.add("loss_weights")
        if "train" in taken and self.train != "lora":
            unread.add("lora_rank")
        default = DistillSettings()
        for key in sorted(unread):
            if getattr(self, key) != getattr(default, key):
                log.warning(
                    "distill.%s=%s has no effect with distill=%s%s",
                    key, getattr(self, key), self.method,
                    f" distill.loss={self.loss}" if key == "loss_weights" else "",
                )  # fmt: skip
