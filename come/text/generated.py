"""Calibration text sampled from the model itself: no data needed."""

from __future__ import annotations

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from come.text.windows import TokenWindows

SOURCE = "self_generated"


@torch.no_grad()
def self_generated_windows(
    model: PreTrainedModel,
    *,
    num_samples: int,
    seq_len: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: bool = True,
) -> TokenWindows:
    """Samples windows from the model, each from the begin token and one random token.

    Ancestral sampling with temperature over the whole vocabulary. The end token is never drawn,
    so that every window is full without padding.

    Args:
        model: the dense model.
        num_samples: how many windows.
        seq_len: tokens of a window.
        seed: seeds all draws.
        temperature: divides the logits, > 0.
        batch_size: windows sampled side by side.
        progress: whether to show a progress bar.
    """
    assert temperature > 0
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    banned = sorted({i for i in (*ends, config.pad_token_id, config.bos_token_id) if i is not None})
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(config.vocab_size)
    allowed[banned] = 0

    batches = []
    with tqdm(
        total=num_samples * seq_len,
        desc="sampling calibration text",
        unit="token",
        leave=False,
        delay=2,
        disable=None if progress else True,
    ) as bar:
        for start in range(0, num_samples, batch_size):
            rows = min(batch_size, num_samples - start)
            ids = torch.multinomial(allowed, rows, replacement=True, generator=generator)[:, None]
            if config.bos_token_id is not None:
                ids = torch.cat([torch.full_like(ids, config.bos_token_id), ids], dim=1)
            ids, cache = ids[:, :seq_len], None
            bar.update(ids.numel())
            while ids.shape[1] < seq_len:
                step = ids if cache is None else ids[:, -1:]
                output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1].float().cpu() / temperature
                logits[:, banned] = -torch.inf
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                ids = torch.cat([ids, drawn], dim=1)
                bar.update(rows)
            batches.append(ids)
    windows = torch.cat(batches)
    return TokenWindows(windows, windows.numel(), f"{SOURCE} (temperature {temperature})")
