"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from come.data.sources.base import TextSource
from come.schema.text import TextSettings
from come.setting import setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class EvaluationText(TextSettings):
    """A held-out text for perplexity: the text of `eval`, or one of `eval.extra_texts`."""

    config_key = "eval"

    max_tokens: Optional[int] = setting(
        None, "only the first tokens; null for all", kind=int, least=4, optional=True
    )
    text_range: Optional[list[float]] = setting(
        None,
        "only the part between two shares, such as [0.8,1]; null for all of it, or for the last "
        "fifth where calibration or training reads the same text",
        kind=list,
        optional=True,
    )

    def evaluated(self, key: str) -> TextSource:
        """The text source, restricted to `text_range`; the text is not read yet.

        Args:
            key: configuration key of these settings, for error messages.

        Raises:
            ValueError: the source is unknown, a setting that it needs is missing, or `text_range`
                is invalid.
        """
        part = self.text_range
        if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1] <= 1):
            raise ValueError(
                f"{key}.text_range={list(part)}: two shares of the text, the first below the "
                "second, such as [0.8,1]; null for all of it"
            )
        try:
            source = self.text_source()
        except ValueError as error:
            raise ValueError(str(error).replace("calibration.source", f"{key}.source")) from None
        source.part = (part[0], part[1]) if part else None
        return source


@dataclass
class EvalSettings(EvaluationText):
    """`eval`: what is measured of the dense model and of every saved model."""

    name: str = setting("perplexity", "label", counts=False)
    extra_texts: dict[str, EvaluationText] = setting(
        {}, "further texts by name, for perplexity too", counts=False
    )
    perplexity: bool = setting(True, "whether to measure perplexity")
    seq_len: int = setting(2048, "tokens of a window; cut to the model's maximum", least=2)
    batch_tokens: int = setting(2048, "tokens of a forward pass", least=1)
    tasks: list[str] = setting([], "zero-shot tasks of lm-eval, or of include_path")
    include_path: Optional[str] = setting(
        None,
        "folder of local tasks, YAML files as lm-eval's",
        kind=str,
        optional=True,
        counts=False,
    )
    limit: Optional[int] = setting(
        None, "only the first documents of every task; null for all", kind=int, least=1,
        optional=True,
    )  # fmt: skip
    task_batch: int = setting(8, "sequences of a forward pass of a task", least=1)
    speed: bool = setting(True, "whether to time prompt processing and generation")
    prompt_tokens: int = setting(2048, "length of the timed prompt", least=1)
    new_tokens: int = setting(128, "tokens generated in the timing", least=1)
    speed_batch: int = setting(1, "prompts of a batch in the timing", least=1)
    repeats: int = setting(3, "counted repetitions of each timing", least=1)
    continuation_tokens: int = setting(
        32, "tokens of the sample continuations in the report; 0 for none", least=0
    )

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other, or an invalid text source."""
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)}: a task is named twice")
        if self.extra_texts and not self.perplexity:
            raise ValueError(
                f"eval.extra_texts has {', '.join(self.extra_texts)}, and eval.perplexity=false "
                "measures none; leave the texts out with '~eval.extra_texts'"
            )
        for text in self.texts().values():
            text.check()

    def texts(self) -> dict[str, TextSource]:
        """The held-out texts for perplexity by name, not read yet; the main text is named "".

        Raises:
            ValueError: see `EvaluationText.evaluated`.
        """
        if not self.perplexity:
            return {}
        further = {
            n: text.evaluated(f"eval.extra_texts.{n}") for n, text in self.extra_texts.items()
        }
        return {"": self.evaluated("eval"), **further}
