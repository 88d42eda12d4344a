"""Settings of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

from come.data.mix import check_shares, window_counts
from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sampling import Sampling
from come.data.sources.base import TEXT, TextSource
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

    mix: Any = setting(
        None,
        "shares of several text sources, in place of source: {self_generated:0.5,pydocs:0.5}",
        kind=dict,
        optional=True,
    )
    chat: bool = setting(
        False,
        "chats in the model's chat template: self_generated answers built-in prompts, and field is "
        "messages by default",
    )
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
        if self.mix is not None:
            check_shares("calibration.mix", self.mix, [SELF_GENERATED, *TEXT.names()])
        if self.num_continuations and self.sampled_windows:
            raise ValueError(
                f"calibration.num_continuations={self.num_continuations} continues real text; "
                "self_generated text has none: raise calibration.num_samples"
            )
        if self.path and "text_file" not in self.counts:
            raise ValueError(
                f"calibration.path={self.path} is for calibration=text_file, not "
                f"{self.label}; leave one of them out"
            )
        if self.chat and not self._has_chats:
            raise ValueError(
                f"calibration.chat=true has no effect with {self.label}, which is plain text; "
                "leave it out, or take self_generated, hub, or a .jsonl or .parquet file of chats"
            )
        for text in self.texts().values():
            text.check()

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
    def counts(self) -> dict[str, int]:
        """Windows that are drawn from every source, by its name.

        Raises:
            ValueError: a source of the mix gets no window.
        """
        if self.mix:
            return window_counts("calibration.mix", self.mix, self.num_samples)
        return {self.source: self.num_samples}

    @property
    def sampled_windows(self) -> int:
        """Number of windows that are sampled from the model without other text."""
        return self.counts.get(SELF_GENERATED, 0)

    @property
    def label(self) -> str:
        """The names of the sources, with their shares in a mix."""
        return " + ".join(self.described(name, name) for name in self.counts)

    def described(self, name: str, text: str) -> str:
        """The description `text` of the windows of one source, with its share in a mix."""
        return f"{100 * self.mix[name]:g}% {text}" if self.mix else text

    def text_source(self) -> TextSource:
        """The text source; with `chat`, `field` is "messages" by default.

        Raises:
            ValueError: the name is unknown, or a setting that the source needs is missing.
        """
        if self.chat and not self.field:
            return replace(self, field="messages").text_source()
        return super().text_source()

    def texts(self) -> dict[str, TextSource]:
        """The text sources that are read, by name; self_generated is not one of them.

        Raises:
            ValueError: see `text_source`, or a source of the mix gets no window.
        """
        read = [name for name in self.counts if name != SELF_GENERATED]
        if not self.mix:
            return {name: self.text_source() for name in read}
        path = {"text_file": self.path}
        alone = {name: replace(self, mix=None, source=name, path=path.get(name)) for name in read}
        return {name: settings.text_source() for name, settings in alone.items()}

    def text_identity(self) -> str:
        """Identifies the texts that are read by their content, or names if they cannot be read."""
        try:
            return " + ".join(text.identity for text in self.texts().values())
        except (ValueError, OSError):
            return f"unreadable {self.path or self.label}"

    @property
    def _has_chats(self) -> bool:
        """Whether the model answers prompts, or a source has rows, which can be chats."""
        plain = {"text_file"} if (self.path or "").endswith(".txt") else set()
        return any(
            name == SELF_GENERATED or "field" in TEXT.options(name)
            for name in self.counts.keys() - plain
        )

    @property
    def windows(self) -> int:
        """Total number of calibration windows."""
        return self.num_samples + self.num_continuations

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.windows * self.seq_len
