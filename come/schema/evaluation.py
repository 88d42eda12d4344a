"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from come.data.sources.base import TextSource
from come.schema.text import TextSettings

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class EvaluationText(TextSettings):
    """A text that perplexity is measured on: that of `eval`, or one of `eval.also`.

    Attributes:
        max_tokens: only the first so many tokens; null for all.
        part: only what lies between two shares of it, as [0.8, 1]; null for all of it, or for its
            last fifth where calibration or training reads the same text.
    """

    max_tokens: Optional[int] = None
    part: Optional[list[float]] = None

    def evaluated(self, key: str) -> TextSource:
        """The text source with its part, not read yet.

        Args:
            key: where these settings are, for errors.

        Raises:
            ValueError: an unknown source, a missing setting, or no such part.
        """
        limit, part = self.max_tokens, self.part
        if limit is not None and limit < 4:
            raise ValueError(f"{key}.max_tokens={limit}: two windows of 2 tokens at least")
        if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= 1):
            raise ValueError(
                f"{key}.part={list(part)}: two shares of the text, the first below the second, "
                "as [0.8,1]; null for all of it"
            )
        try:
            source = self.text_source()
        except ValueError as error:
            raise ValueError(str(error).replace("calibration.source", f"{key}.source")) from None
        source.part = (part[0], part[1]) if part else None
        return source


@dataclass
class EvalSettings(EvaluationText):
    """`eval`: what is measured of the dense and the merged model.

    The text of its own is what tables quote; `also` names others.

    Attributes:
        name: label.
        also: further texts by name, for perplexity too.
        perplexity: whether to measure perplexity.
        seq_len: tokens of a window; cut to the model's maximum.
        batch_tokens: tokens of one forward pass.
        tasks: zero-shot tasks of the harness (lm-eval), or of `include_path`.
        include_path: folder of local tasks, YAML files of the harness's form.
        limit: only the first so many documents of every task; null for all.
        task_batch: sequences of one forward pass of a task.
        speed: whether to time prompt processing and generation.
        prompt_tokens: length of the timed prompt.
        new_tokens: tokens generated in the timing.
        speed_batch: prompts generated for side by side.
        repeats: counted repetitions of each timing.
        continuation_tokens: tokens of the sample continuations in the report; 0 for none.
    """

    name: str = "perplexity"
    also: dict[str, EvaluationText] = field(default_factory=dict)
    perplexity: bool = True
    seq_len: int = 2048
    batch_tokens: int = 2048
    tasks: list[str] = field(default_factory=list)
    include_path: Optional[str] = None
    limit: Optional[int] = None
    task_batch: int = 8
    speed: bool = True
    prompt_tokens: int = 2048
    new_tokens: int = 128
    speed_batch: int = 1
    repeats: int = 3
    continuation_tokens: int = 32

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        for key in (
            "seq_len",
            "batch_tokens",
            "task_batch",
            "prompt_tokens",
            "new_tokens",
            "speed_batch",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"eval.{key}={getattr(self, key)}: must be at least 1")
        if self.repeats < 1 or self.continuation_tokens < 0 or self.seq_len < 2:
            raise ValueError(
                f"eval.repeats={self.repeats} and eval.seq_len={self.seq_len} must be at least 1 "
                f"and 2, eval.continuation_tokens={self.continuation_tokens} at least 0"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"eval.limit={self.limit}: must be at least 1, or null for all")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)}: a task stands there twice")
        if self.also and not self.perplexity:
            raise ValueError(
                f"eval.also has {', '.join(self.also)}, and eval.perplexity=false measures none; "
                "leave the texts out with '~eval.also'"
            )
        for text in self.texts().values():
            text.check()

    def texts(self) -> dict[str, TextSource]:
        """The texts that perplexity is measured on, not read yet; the one of its own is "".

        Raises:
            ValueError: an unknown source, or a setting that the source needs is missing.
        """
        if not self.perplexity:
            return {}
        further = {n: text.evaluated(f"eval.also.{n}") for n, text in self.also.items()}
        return {"": self.evaluated("eval"), **further}
