"""Perplexity on packed windows, with a confidence interval over windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from come.data.windows import check_token_ids
from come.models.adapter import ModelAdapter
from come.models.loss import window_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        nll: mean negative log-likelihood per predicted token of every window, in nats.
        tokens: number of tokens read, seq per window.
        predicted: number of tokens predicted, seq - 1 per window.
    """

    nll: tuple[float, ...]
    tokens: int
    predicted: int

    @property
    def interval(self) -> Interval:
        """Exp of the mean of `nll` over windows, with Student's t interval over windows."""
        return _exp_interval(self.nll)

    def ratio_to(self, dense: Perplexity) -> Interval:
        """Ratio to the perplexity of another model on the same windows, paired by window."""
        return _exp_interval([a - b for a, b in zip(self.nll, dense.nll, strict=True)])


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Perplexity:
    """Exp of the mean cross-entropy of every token except the first of each window.

        ppl = exp( mean_{w, t > 1} -log p(x_t | x_1 .. x_{t-1}) )

    Logits are computed in blocks of tokens, so only one [block, vocab] block is in memory at a
    time.

    Args:
        model: the model.
        windows: token ids, non-overlapping windows.
        batch_tokens: tokens per forward pass; a pass has at least one window.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a token id has no row in the embedding, or a loss is not finite.
    """
    check_token_ids(windows, model.get_input_embeddings().weight.shape[0], "the text")
    adapter = ModelAdapter(model)
    device = adapter.device
    decoder = model.get_submodule(adapter.architecture.decoder)
    head = model.get_output_embeddings()
    seq = windows.shape[1]
    nll: list[float] = []
    with tqdm(
        total=len(windows),
        desc="perplexity",
        unit="window",
        leave=False,
        delay=2,
        disable=None if progress else True,
    ) as bar:
        for batch in windows.split(max(1, batch_tokens // seq)):
            ids = batch.to(device)
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            nll += (window_nll(head, states, ids) / (seq - 1)).tolist()
            if not all(map(math.isfinite, nll[-len(batch) :])):
                raise ValueError(
                    f"perplexity: a loss of windows {len(nll) - len(batch) + 1} to {len(nll)} is "
                    f"not finite; the model's predictions overflow in {model.dtype}: try "
                    "model.dtype=float32 or bfloat16"
                )
            bar.update(len(batch))
    return Perplexity(tuple(nll), windows.numel(), len(windows) * (seq - 1))


def _exp_interval(values: Sequence[float]) -> Interval:
    """Exp of a mean and of the ends of its Student's t interval.

    Results above the largest float are clipped to it. The interval of a single value is
    [0, infinity].
    """
    from scipy import stats  # takes a second to import

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(_exp(mean), 0.0, math.inf)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread
    return Interval(_exp(mean), _exp(mean - half), _exp(mean + half))


def _exp(value: float) -> float:
    """Exp, clipped to the largest float."""
    return math.exp(value) if value < math.log(sys.float_info.max) else sys.float_info.max
