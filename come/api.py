"""One call that compresses a model: `come.compress(model, tokenizer)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from come.data.documents import Documents
from come.data.sampling import self_generated_windows, unused_ids
from come.data.sources.base import TextSource
from come.data.sources.text_file import TextFile
from come.data.windows import begin_token, calibration_windows, check_token_ids
from come.merge.constraints import DEFAULT_SPARSITY, layers_for_sparsity
from come.merge.loop import compress as compress_layers
from come.merge.method import Method, groups_target
from come.merge.plan import Plan
from come.merge.selection.trial_kl import REPEAT_WEIGHT, TrialKL
from come.merge.width import narrows, width_setting
from come.models.adapter import ModelAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target_layers: int | None = None,
    sparsity: float | None = None,
    text: str | Path | TextSource | Sequence[str] | Sequence[int] | Tensor | None = None,
    method: Method | None = None,
    num_samples: int = 32,
    seq_len: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Merges layers of a model in place, by default calibrated on text sampled from the model.

    Args:
        model: the dense model, changed in place.
        tokenizer: its tokenizer.
        target_layers: number of layers to reach.
        sparsity: share of the parameters to remove, instead of `target_layers`; 0.1 if neither is
            given. `method.groups` determine the depth themselves, and with `method.width` or
            `method.width_attention` alone no layer is removed.
        text: calibration text: a file (.txt, .jsonl, .parquet), a text source, a list of
            documents, or token ids, either one window per row or a single sequence. None samples
            `num_samples` windows from the model.
        method: the merging method; None for the project's own, `merge=come_plus`.
        num_samples: number of calibration windows. All given token ids are used.
        seq_len: tokens per window. Token ids that are windows already keep their length.
        seed: seed for sampling windows.
        progress: whether to show progress bars.

    Returns:
        The plan, which records every decision. `come.save_model(model, tokenizer, folder, plan)`
        saves it with the model.

    Raises:
        ValueError: the model is not supported, the depth is given twice, or
            the text is too short.
    """
    if target_layers is not None and sparsity is not None:
        raise ValueError(
            f"both target_layers={target_layers} and sparsity={sparsity} are given; leave one out"
        )
    if method is not None and method.groups and (target_layers or sparsity):
        raise ValueError(
            f"both method.groups={method.groups} and a depth are given; the groups determine it"
        )
    if text is None:
        method = method or Method(selection=TrialKL(repeat_weight=REPEAT_WEIGHT))
        windows = self_generated_windows(
            model,
            num_samples=num_samples,
            seq_len=seq_len,
            seed=seed,
            banned=unused_ids(model, tokenizer),
            progress=progress,
        ).windows
    elif (source := _as_source(text)) is not None:
        windows = calibration_windows(
            tokenizer,
            source,
            num_samples=num_samples,
            seq_len=seq_len,
            seed=seed,
            begin=begin_token(None, ModelAdapter(model).layout.begin_token, tokenizer),
        ).windows
    else:
        windows = _as_windows(torch.as_tensor(text), seq_len)
    check_token_ids(
        windows, model.get_input_embeddings().weight.shape[0], "the calibration text", tokenizer
    )
    method = method or Method()
    if method.groups:
        target_layers = groups_target(method.groups, ModelAdapter(model).num_layers)
    elif target_layers is None and narrows(method):
        if sparsity is not None:
            raise ValueError(
                f"sparsity={sparsity} follows from removed layers alone, and "
                f"{width_setting(method)} removes units too; give target_layers"
            )
        target_layers = ModelAdapter(model).num_layers
    elif target_layers is None:
        target_layers = _depth(model, method, DEFAULT_SPARSITY if sparsity is None else sparsity)
    return compress_layers(model, windows, method, target_layers=target_layers, progress=progress)


def _as_windows(ids: Tensor, seq_len: int) -> Int[Tensor, "windows seq"]:
    """Token ids as windows; a single sequence is cut into windows, and its remainder is unused."""
    if ids.dim() == 2:
        return ids
    if ids.dim() != 1 or len(ids) < seq_len:
        raise ValueError(
            f"text has the shape {list(ids.shape)}: give windows, [windows, seq], or at least "
            f"seq_len={seq_len} token ids in one row"
        )
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def _as_source(text: object) -> TextSource | None:
    """A text source for a file or for documents; None for token ids."""
    if isinstance(text, TextSource):
        return text
    if isinstance(text, str | Path):
        return TextFile(str(text))
    if isinstance(text, Sequence) and text and all(isinstance(part, str) for part in text):
        return Documents([str(part) for part in text])
    return None


def _depth(model: PreTrainedModel, method: Method, sparsity: float) -> int:
    """The number of layers that remains when `sparsity` of the parameters is removed."""
    adapter = ModelAdapter(model)
    each = adapter.block_parameters[method.block]
    total = sum(p.numel() for p in model.parameters())
    return layers_for_sparsity(sparsity, adapter.num_layers, total, each)
