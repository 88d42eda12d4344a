"""Perplexity on held-out text, with a confidence interval over windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional, cast

import torch
from jaxtyping import Int
from torch import Tensor

from come.data.sources.base import TextSource
from come.data.text_settings import TextSettings
from come.data.windows import TokenWindows, check_token_ids, evaluation_windows
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, Subject
from come.evaluate.paired import exp_interval
from come.models.adapter import ModelAdapter
from come.models.loss import window_nll
from come.progress import ProgressBar
from come.setting import setting
from come.stream.sweep import normed_states

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "eval.perplexity"


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Metric:
    """Exp of the mean cross-entropy of every token except the first of each window.

        ppl = exp( mean_{w, t > 1} -log p(x_t | x_1 .. x_{t-1}) )

    Logits are computed in blocks of tokens, so only one [block, vocab] block is in memory at a
    time.

    Args:
        model: the model.
        windows: token ids, non-overlapping windows.
        batch_tokens: tokens per forward pass; a pass has at least one window.
        progress: whether to show a progress bar.

    Returns:
        The perplexity with Student's t interval over windows. Its samples are the mean negative
        log-likelihood per predicted token of every window, in nats.

    Raises:
        ValueError: a token id has no row in the embedding, or a loss is not finite.
    """
    check_token_ids(windows, model.get_input_embeddings().weight.shape[0], "the text")
    adapter, seq = ModelAdapter(model), windows.shape[1]
    batch_size = max(1, batch_tokens // seq)
    nll: list[float] = []
    with ProgressBar(total=len(windows), desc="perplexity", unit="window", shown=progress) as bar:
        for rows, states in normed_states(adapter, windows, batch_size):
            ids = windows[rows].to(adapter.device)
            nll += (window_nll(adapter.head, states, ids) / (seq - 1)).tolist()
            if not all(map(math.isfinite, nll[rows])):
                raise ValueError(
                    f"perplexity: a loss of windows {rows.start + 1} to {rows.stop} is "
                    f"not finite; the model's predictions overflow in {model.dtype}: try "
                    "model.dtype=float32 or bfloat16"
                )
            bar.update(rows.stop - rows.start)
    found = exp_interval(nll)
    return Metric(
        found.value,
        found.low,
        found.high,
        comparison="ratio",
        samples=nll,
        data=f"{windows.numel()} tokens in {len(windows)} windows",
    )


@dataclass
class HeldOutText(TextSettings):
    """A held-out text: the main text of `eval.perplexity`, or one of its extra_texts."""

    config_key = _KEY

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

    def held_out(self, key: str) -> TextSource:
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

    def held_out_windows(self, key: str, subject: Subject, seq_len: int) -> TokenWindows:
        """The windows of the held-out text, whose tokens the model knows.

        Args:
            key: configuration key of these settings, for error messages.
            subject: the model's tokenizer, limits and the other texts of the job.
            seq_len: tokens of a window; cut to the model's maximum.
        """
        text = evaluation_windows(
            subject.tokenizer,
            self.held_out(key),
            seq_len=min(seq_len, subject.longest or seq_len),
            max_tokens=self.max_tokens,
            others=subject.others,
            drawn_from=subject.drawn_from,
            begin=subject.begin,
            key=key,
        )
        what = f"held-out text {text.source}"
        check_token_ids(text.windows, subject.vocabulary, what, subject.tokenizer)
        return text


@EVALUATIONS.register
@dataclass
class Perplexity(HeldOutText, Evaluation):
    """Perplexity on held-out texts, compared with the dense model by window."""

    name = "perplexity"

    extra_texts: dict[str, Any] = setting(
        {}, "further texts by name, each with the settings of a text", counts=False
    )
    seq_len: int = setting(2048, "tokens of a window; cut to the model's maximum", least=2)
    batch_tokens: int = setting(2048, "tokens of a forward pass", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts = {"": (_KEY, cast(HeldOutText, self))}
        for name, given in self.extra_texts.items():
            key = f"{_KEY}.extra_texts.{name}"
            self._texts[name] = key, _extra_text(key, given or {})

    def check(self) -> None:
        """Raises ValueError for an invalid text source."""
        for source in self.texts().values():
            source.check()

    def texts(self) -> dict[str, TextSource]:
        """The held-out texts by name, not read yet; the name of the main text is "".

        Raises:
            ValueError: see `HeldOutText.held_out`.
        """
        return {name: text.held_out(key) for name, (key, text) in self._texts.items()}

    def identity(self) -> Any:
        """Identifies the contents of the texts."""
        return {n: [text.text_identity(), text.counted()] for n, (_, text) in self._texts.items()}

    def prepare(self, subject: Subject) -> dict[str, TokenWindows]:
        """The held-out windows by name of the text."""
        return {
            name: text.held_out_windows(key, subject, self.seq_len)
            for name, (key, text) in self._texts.items()
        }

    def key(self, data: dict[str, TokenWindows]) -> Any:
        """Hashes of the windows."""
        return {name: text.hash for name, text in data.items()}

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: dict[str, TokenWindows],
    ) -> Metrics:
        """Perplexity on every text: "perplexity", and "perplexity/NAME" on an extra text."""
        found = {}
        for name, text in data.items():
            metric = perplexity(model, text.windows, batch_tokens=self.batch_tokens)
            found[f"perplexity/{name}" if name else "perplexity"] = replace(
                metric, data=f"{metric.data} of {text.source}", headline=not name
            )
        return found


def _extra_text(key: str, given: Mapping[str, Any]) -> HeldOutText:
    """The settings of an extra text, with its own key in error messages."""
    known = HeldOutText.settings()
    for name in given:
        if name not in known:
            raise ValueError(f"{key}.{name}: no such setting; a text has {', '.join(known)}")
    try:
        return HeldOutText(**given)
    except ValueError as error:
        raise ValueError(str(error).replace(_KEY, key, 1)) from None
