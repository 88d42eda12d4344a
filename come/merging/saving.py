"""Saves a merged model as an ordinary Hugging Face folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.files import new_folder
from come.merging.plan import Plan

MAX_SHARD_SIZE = "5GB"
PLAN = "plan.json"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    plan: Plan,
) -> Path:
    """Writes weights (safetensors), configuration, generation configuration and tokenizer.

    The folder has its name only when it is whole. `config.come` keeps the plan's hash and the
    merge history; no code is needed to load the model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: where to; a model that this function wrote there before is replaced.
        plan: the plan that made the model, saved beside its weights as `plan.json`.

    Returns:
        `folder`.

    Raises:
        ValueError: the folder holds something else.
        OSError: the folder cannot be written, or its disk is full; nothing half-written is left.
    """
    folder = Path(folder)
    with new_folder(folder, PLAN) as partial:
        model.config.come = {"plan": plan.hash, "merge_history": plan.history}
        if plan.block != "layer":
            model.config.come |= {"block": plan.block, "places": plan.places}
        plan.save(partial / PLAN)
        try:
            model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"weights cannot be written ({error})", str(folder)) from error
        tokenizer.save_pretrained(partial)
        _readable_by_group(partial)
    return folder


def _readable_by_group(folder: Path) -> None:
    """Gives weights the user's ordinary permissions; safetensors writes them for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


@torch.no_grad()
def check_cache(model: PreTrainedModel, vocab_limit: int = 1000, length: int = 12) -> float:
    """Largest difference of cached and uncached logits, relative to the largest logit.

    Incremental decoding goes wrong, silently, where layer indices or per-layer configuration are
    out of step with the layers.

    Args:
        model: the model.
        vocab_limit: probe tokens are below this id.
        length: tokens of the probe.

    Returns:
        The relative difference; rounding of the model's dtype if all is well.
    """
    device = model.get_input_embeddings().weight.device
    limit = min(vocab_limit, model.config.vocab_size)
    probe = (torch.arange(length, device=device) * 37 % limit)[None]
    whole = model(input_ids=probe, use_cache=False).logits.float()
    cache, steps = None, []
    for position in range(length):
        output = model(
            input_ids=probe[:, position : position + 1], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        steps.append(output.logits.float())
    cached = torch.cat(steps, dim=1)
    return ((cached - whole).abs().max() / whole.abs().max()).item()
