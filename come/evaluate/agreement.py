"""The share of the dense model's greedy tokens that a compressed model would have taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from come.data.sources.base import TextSource
from come.data.windows import TokenWindows, check_length
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, Subject
from come.evaluate.continuations import generate_greedily
from come.evaluate.paired import mean_difference
from come.evaluate.perplexity import HeldOutText
from come.models.adapter import ModelAdapter
from come.models.loss import BLOCK
from come.progress import ProgressBar
from come.setting import setting
from come.stream.sweep import normed_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "eval.agreement"


def greedy_continuations(
    model: PreTrainedModel,
    prompts: Int[Tensor, "windows prompt"],
    new_tokens: int,
    *,
    batch_size: int,
    progress: bool = True,
) -> list[list[int]]:
    """Continues every prompt greedily, up to and including the first end-of-sequence token.

    Args:
        model: the model.
        prompts: token ids of prompts of equal length, so that no prompt is padded.
        new_tokens: maximum number of generated tokens.
        batch_size: prompts of a forward pass.
        progress: whether to show a progress bar.

    Returns:
        The generated tokens of every prompt.
    """
    device = model.get_input_embeddings().weight.device
    found: list[list[int]] = []
    with ProgressBar(total=len(prompts), desc="continue", unit="prompt", shown=progress) as bar:
        for batch in prompts.split(batch_size):
            ids = generate_greedily(model, batch.to(device), new_tokens)
            found += [_until_end(row, model) for row in ids[:, prompts.shape[1] :].tolist()]
            bar.update(len(batch))
    return found


def _until_end(ids: list[int], model: PreTrainedModel) -> list[int]:
    """The tokens up to the first end-of-sequence token; those after it are padding."""
    assert model.generation_config is not None
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


@torch.inference_mode()
def predicted(
    model: PreTrainedModel,
    prompts: Int[Tensor, "windows prompt"],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: bool = True,
) -> list[list[bool]]:
    """Whether each token of the continuations is the model's most likely next token.

    The model is teacher forced: it predicts token t from the prompt and the tokens before t of the
    given continuation. Shorter continuations are padded on the right, which changes no prediction
    before the padding.

    Args:
        model: the model.
        prompts: token ids of prompts of equal length.
        continuations: token ids that follow each prompt, at least one for each.
        batch_size: windows of a forward pass.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a logit is not finite.
    """
    adapter, begin = ModelAdapter(model), prompts.shape[1]
    longest = max(map(len, continuations))
    padded = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in continuations]
    targets = torch.tensor(padded)
    windows = torch.cat([prompts, targets[:, :-1]], dim=1)
    found: list[list[bool]] = []
    with ProgressBar(total=len(windows), desc="agreement", unit="window", shown=progress) as bar:
        for rows, states in normed_states(adapter, windows, batch_size):
            chosen = []
            for block in states[:, begin - 1 :].flatten(0, 1).split(BLOCK):
                logits = adapter.head(block).float()
                if not logits.amax(dim=-1).isfinite().all():
                    raise ValueError(
                        f"agreement: a logit of windows {rows.start + 1} to {rows.stop} is not "
                        f"finite; the model's predictions overflow in {model.dtype}: try "
                        "model.dtype=float32 or bfloat16"
                    )
                chosen.append(logits.argmax(dim=-1).cpu())
            same = torch.cat(chosen).view(-1, longest) == targets[rows]
            own = zip(same.tolist(), continuations[rows], strict=True)
            found += [row[: len(ids)] for row, ids in own]
            bar.update(len(same))
    return found


@EVALUATIONS.register
@dataclass
class Agreement(HeldOutText, Evaluation):
    """Share of the dense model's greedy tokens that the model would have taken, teacher forced.

    The dense model continues prompts from a held-out text greedily. For every token x_t of these
    continuations, the model reads the prompt and the continuation before t:

        agreement = mean_w mean_t [argmax_v p(v | prompt_w, x_1 .. x_{t-1}) = x_t]

    Windows have equal weight. The dense model's own value is measured in the same way. It is 1
    except where its two most likely tokens are within rounding of each other, because generation
    with a cache and a pass over the whole window add in a different order. In bfloat16 this can be
    a few percent of the tokens.
    """

    name = "agreement"

    seq_len: int = setting(
        256, "tokens from one prompt's beginning to the next; cut to the model's maximum", least=2
    )
    prompt_tokens: int = setting(64, "tokens of a prompt: the first of a window", least=1)
    new_tokens: int = setting(64, "tokens that the dense model generates after a prompt", least=1)
    batch_size: int = setting(16, "windows of a forward pass", least=1)

    def check(self) -> None:
        """Raises ValueError for an invalid text source, or a prompt longer than its window."""
        if self.prompt_tokens > self.seq_len:
            raise ValueError(
                f"{_KEY}.prompt_tokens={self.prompt_tokens}: a window has "
                f"{_KEY}.seq_len={self.seq_len} tokens"
            )
        self.held_out(_KEY).check()

    def texts(self) -> dict[str, TextSource]:
        """The held-out text, not read yet."""
        return {"": self.held_out(_KEY)}

    def identity(self) -> str:
        """Identifies the content of the text."""
        return self.text_identity()

    def prepare(self, subject: Subject) -> TokenWindows:
        """The prompts."""
        key = f"{_KEY}.new_tokens={self.new_tokens} after {self.prompt_tokens} of a prompt"
        check_length(key, self.prompt_tokens + self.new_tokens, subject.longest)
        text = self.held_out_windows(_KEY, subject, self.seq_len)
        return replace(text, windows=text.windows[:, : self.prompt_tokens].contiguous())

    def key(self, data: TokenWindows) -> str:
        """Hash of the prompts."""
        return data.hash

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TokenWindows
    ) -> Metrics:
        """The dense model's continuations, and how far it predicts them itself."""
        ids = greedy_continuations(model, data.windows, self.new_tokens, batch_size=self.batch_size)
        found = self._metrics(model, data, ids)
        own = found["agreement"]
        return {**found, "agreement": replace(own, details={**own.details, "ids": ids})}

    def measure_compressed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: TokenWindows,
        dense: Metrics,
    ) -> Metrics:
        """How far a compressed model predicts the dense model's continuations."""
        return self._metrics(model, data, dense["agreement"].details["ids"])

    def _metrics(self, model: PreTrainedModel, data: TokenWindows, ids: list[list[int]]) -> Metrics:
        same = predicted(model, data.windows, ids, batch_size=self.batch_size)
        reference = hashlib.sha256(json.dumps([data.hash, ids]).encode()).hexdigest()[:16]
        about = f"{sum(map(len, ids))} tokens after {len(ids)} prompts of {data.source}"
        shares = {
            "agreement": [sum(row) / len(row) for row in same],
            "agreement/before_first_difference": [
                (row.index(False) if False in row else len(row)) / len(row) for row in same
            ],
        }
        return {
            name: Metric(
                sum(values) / len(values),
                *mean_difference([[(values, [0.0] * len(values))]]),
                comparison="difference",
                samples=values,
                data=about,
                headline=name == "agreement",
                details={"reference": reference},
            )
            for name, values in shares.items()
        }

    @classmethod
    def compare(cls, own: Metrics, dense: Metrics, removed: float = 0.0) -> Metrics:
        """Adds the paired differences.

        Raises:
            ValueError: the metrics are of different continuations, as those of two runs may be.
        """
        for name, metric in own.items():
            if metric.details["reference"] != dense[name].details["reference"]:
                raise ValueError(
                    f"{name} was measured on other continuations: evaluate both runs with the same "
                    f"dense model, model.dtype and settings of {_KEY}"
                )
        return super().compare(own, dense, removed)
