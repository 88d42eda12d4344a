"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from come.settings.text import TextSettings

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class EvalSettings(TextSettings):
    """`eval`: what is measured of the dense and the merged model.

    Attributes:
        name: label.
        perplexity: whether to measure perplexity.
        seq_len: tokens of a window; cut to the model's maximum.
        max_tokens: only the first so many tokens of the text; null for all.
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
    perplexity: bool = True
    seq_len: int = 2048
    max_tokens: Optional[int] = None
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
        if self.max_tokens is not None and self.max_tokens < 4:
            raise ValueError(f"eval.max_tokens={self.max_tokens}: two windows of 2 tokens at least")
        if self.repeats < 1 or self.continuation_tokens < 0 or self.seq_len < 2:
            raise ValueError(
                f"eval.repeats={self.repeats} and eval.seq_len={self.seq_len} must be at least 1 "
                f"and 2, eval.continuation_tokens={self.continuation_tokens} at least 0"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"eval.limit={self.limit}: must be at least 1, or null for all")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)}: a task stands there twice")
        if self.perplexity:
            self.text_source().check()
