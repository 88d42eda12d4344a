"""Saves a merged model as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from come.files import new_folder, size_in_bytes, storage_errors
from come.merge.plan import Plan
from come.models.caches import cache_of
from come.models.companions import copy_companions, tokenizer_files
from come.models.dialects import derived_config, write_dialects
from come.models.loading import load_tokenizer
from come.models.weights import layers_on_disk, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SHARD_BYTES = 10**9  # with weights on disk, where only one shard is in memory
PLAN = "come/plan.json"
"""Path of the plan inside a model folder. Inference servers load every `*.safetensors` at the top
of a folder as weights, so the plan's tensors must not be stored there."""
_OLD_PLAN = "plan.json"
MARKS = (PLAN, _OLD_PLAN)
"""Either file marks a model folder that this project wrote, as opposed to a user's folder."""


def plan_path(folder: Path) -> Path:
    """Path of a model folder's plan, also for earlier versions; the file may not exist."""
    old = folder / _OLD_PLAN
    return old if old.is_file() and not (folder / PLAN).is_file() else folder / PLAN


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    plan: Plan,
    *,
    base: Path | None = None,
    shard_size: str = "5GB",
) -> Path:
    """Writes weights (safetensors), configuration, generation configuration and tokenizer.

    The folder gets its name only once it is complete. Everything except the weights comes from the
    base model: `config.json` differs only in what the merge changed, and in keys that make
    transformers 4 and 5 load the same model; tokenizer, chat templates and generation
    configuration are copied byte for byte. The model loads without custom code.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: the output folder; a model that this function saved there earlier is replaced.
        plan: the plan that produced the model, saved as `come/plan.json` in the folder.
        base: folder of the model that this model was made from. By default this is the folder that
            `model` was loaded from, and `tokenizer` is saved again if it differs from the one
            there.
        shard_size: the largest file of weights; at most 1 GB where layers are on disk.

    Returns:
        `folder`.

    Raises:
        ValueError: the folder holds something that this function did not write.
        OSError: the folder cannot be written, or its disk is full; no partial output is left.
    """
    folder = Path(folder)
    source = base or _loaded_from(model)
    with new_folder(folder, MARKS) as partial:
        (partial / PLAN).parent.mkdir()
        plan.save(partial / PLAN)
        with storage_errors(folder):
            _save_weights(model, partial, size_in_bytes("shard_size", shard_size))
        if source is not None:
            copy_companions(source, partial)
        if source is None or not (base or _is_tokenizer_of(source, tokenizer)):
            tokenizer.save_pretrained(partial)
        config = derived_config(source, model.config, partial) if source else None
        write_dialects(partial, config)
        _readable_by_group(partial)
    return folder


def _save_weights(model: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    """Writes weights, configuration and generation configuration."""
    if layers_on_disk(model) is None:
        model.save_pretrained(folder, max_shard_size=shard_bytes)
        return
    save_weights(model, folder, min(shard_bytes, SHARD_BYTES))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _loaded_from(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from; None if there is none, or it no longer exists."""
    path = Path(model.config.name_or_path)
    return path if model.config.name_or_path and (path / "config.json").is_file() else None


def _is_tokenizer_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the folder holds the same tokenizer."""
    if not tokenizer_files(folder):
        return False
    known = load_tokenizer(folder)
    return (
        known.get_vocab() == tokenizer.get_vocab()
        and known.special_tokens_map == tokenizer.special_tokens_map
        and known.chat_template == tokenizer.chat_template
    )


def _readable_by_group(folder: Path) -> None:
    """Gives the weights the permissions of the umask; safetensors restricts them to the owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


@torch.no_grad()
def check_cache(model: PreTrainedModel, length: int = 12) -> float:
    """Largest difference between cached and uncached logits, relative to the largest logit.

    Incremental decoding silently gives wrong results if layer indices or per-layer configuration
    do not match the layers.

    Args:
        model: the model.
        length: number of tokens in the probe.

    Returns:
        The relative difference; for a correct model, about the rounding error of its dtype.

    Raises:
        ValueError: the model's logits are not finite.
    """
    device = model.get_input_embeddings().weight.device
    limit = min(1000, model.config.vocab_size)  # of the probe's token ids
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    probe = (torch.arange(length, device=device) * 37 % limit)[None]
    whole = model(input_ids=probe, use_cache=False).logits.float()
    if not whole.isfinite().all():
        raise ValueError(
            f"the merged model's predictions are not finite in {model.dtype}; try "
            "model.dtype=float32 or bfloat16"
        )
    cache: dict[str, Any] = {}
    steps = []
    for part in probe.split([length - 2, 1, 1], dim=1):  # read layers from disk a few times only
        output = model(input_ids=part, use_cache=True, **cache)
        cache = cache_of(output)
        steps.append(output.logits.float())
    cached = torch.cat(steps, dim=1)
    return ((cached - whole).abs().max() / whole.abs().max()).item()
