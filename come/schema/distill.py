"""Settings of the distillation after the merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import torch

from come.data.text_settings import TextSettings
from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL, Distillation
from come.distill.optimizers import OPTIMIZERS
from come.models.loading import resolve_fast
from come.setting import setting

log = logging.getLogger(__name__)


@dataclass
class DistillSettings(TextSettings):
    """`distill`: training of the merged model with the dense model as teacher.

    If `seed` and `seq_len` equal those of `calibration` and the text is long enough, no validation
    window is a calibration window.
    """

    config_key = "distill"

    method: str = setting("none", "registry name of the method")
    source: str = setting(
        "calibration", "source of the training text; calibration's by default", counts=False
    )
    prefix_tokens: int = setting(
        0,
        "tokens of each window of the text, which the dense model continues; 0: no window",
        least=0,
    )
    shifted: float = setting(
        0.5,
        "share of the windows that models write that begin inside a text: the others begin with "
        "the begin token",
        least=0,
        most=1,
    )
    on_policy: float = setting(
        0.0, "share of the windows that the model in training writes", least=0, most=1
    )
    stream: bool = setting(
        False, "whether training starts before all windows that models write are there"
    )
    block_windows: int = setting(
        256, "windows that are written at a time, and then cached", least=1
    )
    tokens: int = setting(
        150_000, "training tokens of an epoch; a shorter text is read again", least=1
    )
    epochs: int = setting(1, "how often these tokens are read, in a new order each time", least=1)
    seq_len: int = setting(256, "tokens of a window", least=2)
    batch_size: int = setting(8, "windows of an optimiser step, over all processes", least=1)
    micro_batch: int = setting(8, "windows of a forward pass", least=1)
    validation_samples: int = setting(
        16, "held-out windows of the training text, which choose the best weights", least=1
    )
    loss: str = setting("mse", "loss of hidden states: mse, kl (the paper's), cosine, mix")
    loss_weights: dict[str, float] = setting({}, "weights of the parts of the loss mix")
    temperature: float = setting(1.0, "temperature T of the KL losses", above=0)
    logit_weight: float = setting(0.0, "weight of the KL between logits (come_sp)", least=0)
    teacher: str = setting(
        "live",
        "live runs the dense model in every step; stored writes its hidden states to disk first",
        choices=("live", "stored"),
    )
    layers: str = setting(
        "merged",
        "layers that train: merged, neighbours (those and the layers beside them), all, or model "
        "(all, embeddings, final norm and head)",
    )
    train: str = setting(
        "layers", "what trains of these layers: layers, norms, outputs, norms_outputs, lora"
    )
    layer_decay: float = setting(
        1.0,
        "factor of the learning rate for each layer of distance from a merged one",
        above=0,
        most=1,
    )
    lora_rank: Any = setting(
        "auto",
        "rank of adapters; auto: as many parameters as the merged layers have",
        kind=int,
        least=1,
        words=("auto",),
    )
    optimizer: str = setting("adamw", "the optimiser", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-3, "highest learning rate", above=0)
    warmup: float = setting(
        0.05, "share of the steps in which it rises, before a cosine to zero", least=0, below=1
    )
    weight_decay: float = setting(0.0, "weight decay of the optimiser", least=0)
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    precision: str = setting(
        "auto",
        "auto is bfloat16 autocast on CUDA; fast also on processors that compute in it",
        choices=("auto", "fast", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = setting(
        False, "recomputes layers in the backward pass", counts=False
    )
    validate_every: int = setting(25, "steps between validations", least=1)
    checkpoint_every: int = setting(25, "steps between checkpoints", least=1, counts=False)
    patience: int = setting(0, "validations without progress before it stops; 0: never", least=0)
    workers: int = setting(
        1, "processes that train merged layers in parallel (come_mp)", least=1, counts=False
    )
    seed: int = setting(0, "seed of the draw and of the order of windows")

    @property
    def active(self) -> bool:
        """Whether the method trains anything."""
        return DISTILL.get(self.method).active

    @property
    def streams(self) -> bool:
        """Whether training starts before all windows are there."""
        return self.stream or self.on_policy > 0

    @property
    def block(self) -> int:
        """Windows that are written at a time: `block_windows`, rounded up to whole steps."""
        return -(-self.block_windows // self.batch_size) * self.batch_size

    def distillation(self) -> Distillation:
        """Builds the distillation method from the settings."""
        return DISTILL.create_from(
            self.method, {f.name: getattr(self, f.name) for f in fields(self)}
        )

    def train_config(self, device: str) -> TrainConfig:
        """The training configuration for a device type ("cpu" or "cuda")."""
        precision = resolve_fast(self.precision, torch.device(device))
        if precision == "auto":
            precision = "bfloat16" if device == "cuda" else "float32"
        names = {f.name for f in fields(TrainConfig)} - {"steps", "precision", "in_order"}
        steps = self.epochs * max(1, self.tokens // (self.batch_size * self.seq_len))
        own = {name: getattr(self, name) for name in names}
        own["micro_batch"] = min(self.micro_batch, self.batch_size)
        return TrainConfig(steps=steps, precision=precision, in_order=self.streams, **own)

    def check(self) -> None:
        """Raises ValueError for settings that the method does not support."""
        if not self.active:
            return
        self.distillation()
        if self.teacher == "stored" and not DISTILL.get(self.method).can_store:
            raise ValueError(
                f"distill.teacher=stored: distill={self.method} has no teacher that can be stored; "
                "leave it out, or take distill=heal, logits or come_sp"
            )
        if self.prefix_tokens >= self.seq_len:
            raise ValueError(
                f"distill.prefix_tokens={self.prefix_tokens}: must be below "
                f"distill.seq_len={self.seq_len}"
            )
        if self.streams and DISTILL.get(self.method).layerwise:
            key = f"distill.on_policy={self.on_policy:g}" if self.on_policy else "distill.stream"
            raise ValueError(
                f"{key}: distill={self.method} stores the teacher's states before it trains; leave "
                "it out, or take distill=heal, logits or come_sp"
            )
        if self.workers > 1 and not DISTILL.get(self.method).layerwise:
            raise ValueError(
                f"distill.workers={self.workers} is for distill=come_mp; several processes of "
                f"distill={self.method} are started by accelerate launch"
            )

    def check_sharded(self) -> None:
        """Raises ValueError for settings that fully sharded training does not support."""
        shown = {
            "distill.stream=true": self.stream,
            f"distill.on_policy={self.on_policy:g}": self.on_policy > 0,
            f"distill.layers={self.layers}": self.layers == "model",
            f"distill.optimizer={self.optimizer}": self.optimizer == "adafactor",
        }
        for key, given in shown.items():
            if given:
                raise ValueError(
                    f"{key} is not possible with FSDP; leave it out, or launch without"
                )

    def warn_unread(self) -> None:
        """Warns of settings that differ from their default but are not read by the method."""
        taken = DISTILL.options(self.method)
        keys = (
            "loss", "loss_weights", "temperature", "logit_weight", "layers", "train",
            "layer_decay", "lora_rank",
        )  # fmt: skip
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
