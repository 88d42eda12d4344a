"""Settings of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sampling import Sampling
from come.data.text_settings import TextSettings
from come.files import size_in_bytes
from come.setting import setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

WINDOWS = 4  # per batch, by default


@dataclass
class CalibrationSettings(TextSettings):
    """`calibration`: the calibration text, its windows, and how they are processed."""

    config_key = "calibration"

    num_samples: int = setting(32, "packed windows", least=1)
    seq_len: int = setting(256, "tokens of a window", least=2)
    seed: int = setting(0, "seed of the draw")
    temperature: float = setting(1.0, "temperature of text sampled from the model", above=0)
    top_p: float = setting(1.0, "share of the probability that is drawn from", above=0, most=1)
    keep_likeliest: float = setting(
        1.0, "share of self_generated windows that is kept, the likeliest", above=0, most=1
    )
    num_continuations: int = setting(
        0, "further windows, which the model writes after beginnings of real text", least=0
    )
    prefix_tokens: int = setting(64, "tokens of real text at the beginning of those", least=1)
    batch_size: Any = setting(
        "auto",
        f"windows of a batch; auto is {WINDOWS}, or fewer where they do not fit",
        kind=int,
        least=1,
        words=("auto",),
    )
    store: str = setting(
        "auto",
        "where hidden states of layer boundaries are kept; auto is disk where they do not fit",
        choices=("auto", "memory", "disk"),
        counts=False,
    )
    memory: Optional[str] = setting(
        None,
        "most memory of a merge, such as 6GB, of the GPU if there is one; null for 9/10 of what "
        "is free",
        kind=str,
        optional=True,
        counts=False,
    )

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other, or an invalid text source."""
        if self.num_continuations and self.prefix_tokens >= self.seq_len:
            raise ValueError(
                f"calibration.prefix_tokens={self.prefix_tokens}: must be below "
                f"calibration.seq_len={self.seq_len}"
            )
        if self.memory is not None:
            size_in_bytes("calibration.memory", self.memory)
        if self.num_continuations and self.self_generated:
            raise ValueError(
                f"calibration.num_continuations={self.num_continuations} continues real text; "
                "self_generated text has none: raise calibration.num_samples"
            )
        if self.path and self.source not in ("text_file", "pydocs", SELF_GENERATED):
            raise ValueError(
                f"calibration.path={self.path} is for calibration=text_file, not "
                f"{self.source}; leave one of them out"
            )
        if not self.self_generated:
            self.text_source().check()

    @property
    def batch(self) -> int:
        """Windows per batch; "auto" counts as 4 until it is resolved (see `come.job.budget`)."""
        return WINDOWS if self.batch_size == "auto" else int(self.batch_size)

    @property
    def place(self) -> str:
        """Where hidden states are kept, "memory" or "disk"; "auto" counts as memory."""
        return "disk" if self.store == "disk" else "memory"

    @property
    def sampling(self) -> Sampling:
        """How text is sampled from the model."""
        return Sampling(self.temperature, self.top_p)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None if no limit is set.

        Raises:
            ValueError: it is not a size above 0.
        """
        return None if self.memory is None else size_in_bytes("calibration.memory", self.memory)

    @property
    def windows(self) -> int:
        """Total number of calibration windows."""
        return self.num_samples + self.num_continuations

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.windows * self.seq_len

    @property
    def self_generated(self) -> bool:
        """Whether the text is sampled from the model."""
        return self.source == SELF_GENERATED and not self.path
