"""Settings of texts: `calibration`, and what it shares with `distill` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sampling import Sampling
from come.data.sources.base import TEXT, TextSource
from come.stream.boundaries import check_store

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


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
        temperature: of text sampled from the model.
        top_p: of text sampled from the model: the share of the probability to draw from.
        keep: share of `self_generated` windows that is kept, the likeliest.
        continued: windows more, that begin like the drawn ones and that the model goes on with.
        begin: tokens of real text at the beginning of those.
        batch_size: windows in one batch of the layer stream.
        store: memory or disk, where the boundaries' hidden states are kept.
    """

    num_samples: int = 32
    seq_len: int = 256
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    keep: float = 1.0
    continued: int = 0
    begin: int = 64
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
        for key in ("top_p", "keep"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(
                    f"calibration.{key}={getattr(self, key)}: must be above 0 and at most 1"
                )
        if self.continued < 0:
            raise ValueError(f"calibration.continued={self.continued}: must be at least 0")
        if self.continued and not 1 <= self.begin < self.seq_len:
            raise ValueError(
                f"calibration.begin={self.begin}: must be at least 1 and below "
                f"calibration.seq_len={self.seq_len}"
            )
        if self.continued and self.self_generated:
            raise ValueError(
                f"calibration.continued={self.continued} goes on with real text; self_generated "
                "text has none: raise calibration.num_samples"
            )
        check_store(self.store)
        if self.path and self.source not in ("text_file", "pydocs", SELF_GENERATED):
            raise ValueError(
                f"calibration.path={self.path} is for calibration=text_file, not "
                f"{self.source}; leave one of them out"
            )
        if not self.self_generated:
            self.text_source().check()

    @property
    def sampling(self) -> Sampling:
        """How text is sampled from the model."""
        return Sampling(self.temperature, self.top_p)

    @property
    def windows(self) -> int:
        """How many windows there are in all."""
        return self.num_samples + self.continued

    @property
    def self_generated(self) -> bool:
        """Whether the text is sampled from the model."""
        return self.source == SELF_GENERATED and not self.path
