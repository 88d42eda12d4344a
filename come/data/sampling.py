"""Samples calibration text from the model itself, without data or as continuations of text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import pad

from come.data.decoding import fast_single_tokens
from come.data.prompts import FREE, prompt_starts
from come.data.windows import TokenWindows
from come.files import cache_folder, read_again, read_object, write_bytes
from come.models.caches import cache_of
from come.models.families import layout_of
from come.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)

SOURCE = "self_generated"
BATCH = 32  # windows sampled in parallel
_NUCLEUS = 2048  # maximum number of tokens that top-p samples from
_BLOCK = 256  # tokens whose probabilities are summed before one of them is found
_TOGETHER = 2**20  # probabilities at a time: larger temporary tensors get new memory each time


@dataclass(frozen=True)
class Sampling:
    """Temperature and nucleus (top-p) sampling.

    Attributes:
        temperature: divisor of the logits, > 0.
        top_p: tokens are drawn from the most likely tokens whose total probability reaches this
            value, at most 2048 of them; 1 for the whole vocabulary.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature}, top-p {self.top_p}"

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator
    ) -> Int[Tensor, "batch 1"]:
        """Draws one token per row, from one uniform number per row.

        torch.multinomial draws one number per probability, which takes longer than a layer of a
        small model.
        """
        uniform = torch.rand(len(logits), 1, generator=generator).double()  # below 1 - 2**-25
        rows = max(1, _TOGETHER // logits.shape[-1])
        parts = zip(logits.split(rows), uniform.split(rows), strict=True)
        return torch.cat([self._drawn(*part) for part in parts])

    def _drawn(
        self, logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, "batch 1"]
    ) -> Int[Tensor, "batch 1"]:
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_p >= 1:
            return _found(logits.softmax(-1), uniform)
        best, tokens = logits.topk(min(_NUCLEUS, logits.shape[-1]))
        shares = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
        before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(before >= self.top_p, 0.0)
        return tokens.gather(1, _found(shares, uniform))


def _found(
    shares: Float[Tensor, "batch vocab"], uniform: Float[Tensor, "batch 1"]
) -> Int[Tensor, "batch 1"]:
    """The index in each row where the running sum of its shares passes a part of the whole.

    A block of shares is found first, by its sum, and the index inside it, because running sums of
    a whole vocabulary take as long as two layers.

    Args:
        shares: relative probabilities, >= 0.
        uniform: the part of the whole, float64 in [0, 1).
    """
    if rest := -shares.shape[-1] % _BLOCK:
        shares = pad(shares, (0, rest))
    blocks = shares.unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    height = uniform * sums[:, -1:]
    block = torch.searchsorted(sums, height, right=True)
    below = torch.where(block > 0, sums.gather(1, (block - 1).clamp_min(0)), 0.0)
    found = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    inside = found.cumsum(dim=-1, dtype=torch.float64)
    # Rounding may put the height above the sum of the block: then its last possible token.
    height = torch.minimum(height - below, inside[:, -1:].nextafter(torch.zeros(1).double()))
    return block * _BLOCK + torch.searchsorted(inside, height, right=True)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    starts: Int[Tensor, "windows begin"],
    seq_len: int,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    banned: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] = (),
    batch_size: int = BATCH,
    progress: bool = True,
) -> Int[Tensor, "windows seq"]:
    """Samples continuations of `starts` from the model, up to `seq_len` tokens per window.

    Begin, end and padding tokens are never drawn, so every window is full. With `prompts`, the
    model may draw an end token, and one of the prompts then follows in the same window.

    Args:
        model: the model.
        starts: the first tokens of every window; -1 after the last one of a shorter start.
        seq_len: tokens per window.
        sampling: temperature and top-p.
        generator: CPU random generator of the draws.
        banned: further ids that are never drawn (see `unused_ids`).
        prompts: token ids of prompts, of which a random one follows an end token.
        batch_size: windows sampled in parallel.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the model's logits are not finite.
    """
    ends = _ends(model) if prompts else []
    never = sorted({*_special(model), *banned} - set(ends))
    device = model.get_input_embeddings().weight.device
    batches = []
    rows = 1 if layout_of(model.config).one_sequence else batch_size
    total = starts.shape[0] * seq_len
    shown = ProgressBar(total=total, desc="sampling text", unit="token", shown=progress)
    with shown as bar, fast_single_tokens(model):
        for given in starts.split(rows):
            given = pad(given[:, :seq_len], (0, max(0, seq_len - given.shape[1])), value=FREE)
            ids, cache = given[:, : int((given >= 0).all(dim=0).sum())], dict[str, Any]()
            bar.update(ids.numel())
            while ids.shape[1] < seq_len:
                step = ids[:, -1:] if cache else ids
                output = model(input_ids=step.to(device), use_cache=True, logits_to_keep=1, **cache)
                cache = cache_of(output)
                logits = output.logits[:, -1].float().cpu()
                _check_finite(logits, model)
                logits[:, never] = -torch.inf
                at = ids.shape[1]
                free = given[:, at] < 0
                drawn = torch.where(free, sampling.draw(logits, generator)[:, 0], given[:, at])
                ended = free & torch.isin(drawn, torch.tensor(ends, dtype=torch.long))
                for row in ended.nonzero():
                    prompt = prompts[int(torch.randint(len(prompts), (1,), generator=generator))]
                    following = torch.tensor(prompt[: seq_len - at - 1], dtype=torch.long)
                    given[row, at + 1 : at + 1 + len(following)] = following
                ids = torch.cat([ids, drawn[:, None]], dim=1)
                bar.update(len(ids))
            batches.append(ids)
    return torch.cat(batches)


def self_generated_windows(
    model: PreTrainedModel,
    *,
    num_samples: int,
    seq_len: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    keep: float = 1.0,
    banned: Sequence[int] = (),
    prompts: Sequence[Sequence[int]] = (),
    batch_size: int = BATCH,
    progress: bool = True,
) -> TokenWindows:
    """Samples windows from the model, each starting with the begin token and one random token.

    The begin token is omitted if the model has none. The random token is drawn uniformly from the
    ids that are not excluded. With `prompts`, each window starts with a prompt instead, and has the
    model's answer; where the answer ends, another prompt follows. No prompt starts a second window
    before all have started one.

    Args:
        model: the dense model.
        num_samples: number of windows to return.
        seq_len: tokens per window.
        seed: seed of all draws.
        sampling: temperature and top-p; None for the model's own distribution.
        keep: fraction of the sampled windows that is returned, in (0, 1]: those with the highest
            mean log-likelihood per token under the model.
        banned: ids that are never drawn, besides begin, end and padding tokens (see `unused_ids`).
        prompts: token ids of the prompts that the model answers (see `chat_prompts`); empty for
            text that starts with a random token.
        batch_size: windows sampled in parallel.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(seed)
    count = round(num_samples / keep)
    starts = (
        prompt_starts(prompts, count, generator)
        if prompts
        else _random_starts(model, count, banned, generator)
    )
    windows = sample(
        model,
        starts,
        seq_len,
        sampling,
        generator,
        banned=banned,
        prompts=prompts,
        batch_size=batch_size,
        progress=progress,
    )
    if count > num_samples:
        likely = _log_likelihood(model, windows, batch_size).topk(num_samples).indices
        windows = windows[likely.sort().values]
    kept = f", the likeliest {keep:.0%}" if count > num_samples else ""
    how = f"answers to prompts, {sampling}" if prompts else str(sampling)
    return TokenWindows(windows, windows.numel(), f"{SOURCE} ({how}{kept})")


def _random_starts(
    model: PreTrainedModel, count: int, banned: Sequence[int], generator: torch.Generator
) -> Int[Tensor, "windows begin"]:
    """The begin token, if the model has one, and a random token that is not excluded."""
    allowed = torch.ones(_rows(model))
    allowed[[*_special(model), *banned]] = 0
    starts = torch.multinomial(allowed, count, replacement=True, generator=generator)[:, None]
    begin = model.config.bos_token_id
    if begin is not None and begin >= _rows(model):
        log.warning(
            "config.bos_token_id=%d has no row in the embedding (%d rows): windows are sampled "
            "without a begin token",
            begin,
            _rows(model),
        )
    elif begin is not None:
        starts = torch.cat([torch.full_like(starts, begin), starts], dim=1)
    return starts


def continued_windows(
    model: PreTrainedModel,
    given: TokenWindows,
    *,
    count: int,
    begin: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    banned: Sequence[int] = (),
    progress: bool = True,
) -> TokenWindows:
    """The given windows, followed by `count` windows that continue prompts cut from them.

    Args:
        model: the dense model.
        given: windows of real text.
        count: number of continuations.
        begin: tokens of the prompt at the start of each continuation.
        seed: seed of the draws.
        sampling: temperature and top-p; None for the model's own distribution.
        banned: ids that are never drawn, besides begin, end and padding tokens (see `unused_ids`).
        progress: whether to show a progress bar.

    Raises:
        ValueError: the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(seed)
    begun, seq_len = continuation_starts(given.windows, count, begin), given.windows.shape[1]
    more = sample(model, begun, seq_len, sampling, generator, banned=banned, progress=progress)
    return replace(
        given,
        windows=torch.cat([given.windows, more]),
        source=f"{given.source} + {count} windows continued from {begin} tokens each ({sampling})",
    )


def continuation_starts(
    given: Int[Tensor, "windows seq"], count: int, begin: int
) -> Int[Tensor, "count begin"]:
    """Beginnings of `begin` tokens, cut from the given windows.

    They are cut in R = ceil(count / number of given windows) rounds. Round r takes one from every
    window, from offset floor(r (seq_len - begin) / R), so that those of a window start at
    different tokens.
    """
    number, seq_len = given.shape
    rounds = -(-count // number)
    offsets = [(seq_len - begin) * turn // rounds for turn in range(rounds)]
    return torch.cat([given[:, offset : offset + begin] for offset in offsets])[:count]


def cached(key: Sequence[Any], make: Callable[[], TokenWindows]) -> TokenWindows:
    """Returns the windows from the cache, or calls `make` and caches its result.

    Args:
        key: JSON values that determine the windows: model, dtype, settings, versions.
        make: samples the windows.
    """
    name = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:16]
    path = cache_folder() / "generated" / f"{name}.safetensors"
    about = path.with_suffix(".json")

    def read(about: Path) -> TokenWindows:
        windows = load_file(path)["windows"]
        if windows.dim() != 2 or windows.dtype != torch.long:
            raise ValueError(f"{path.name} holds no windows of token ids")
        return TokenWindows(windows, **read_object(about))

    known = read_again(about, read)
    if known is not None:
        return known
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({"windows": made.windows.contiguous()}))
    described = {field.name: getattr(made, field.name) for field in fields(made)}
    del described["windows"]
    write_bytes(about, json.dumps(described).encode())
    return made


def unused_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of embedding rows without a token, which pad the vocabulary to a round size."""
    return sorted(set(range(_rows(model))) - set(tokenizer.get_vocab().values()))


def _rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _special(model: PreTrainedModel) -> list[int]:
    """Ids of the begin, end and padding tokens that have a row in the embedding."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = getattr(config, "pad_token_id", None)
    named = {i for i in (*ends, padding, config.bos_token_id) if i is not None}
    return sorted(i for i in named if 0 <= i < _rows(model))


def _ends(model: PreTrainedModel) -> list[int]:
    """Ids of the end tokens of configuration and generation that have a row in the embedding."""
    named = set[int]()
    for config in (model.config, model.generation_config):
        end = getattr(config, "eos_token_id", None)
        named.update(end if isinstance(end, list) else [] if end is None else [end])
    return sorted(i for i in named if 0 <= i < _rows(model))


def _check_finite(logits: Tensor, model: PreTrainedModel) -> None:
    if not logits.sum().isfinite():  # faster than looking at each
        raise ValueError(
            f"the model's predictions are not finite in {model.dtype}, so no text can be sampled "
            "from it; try model.dtype=float32 or bfloat16"
        )


@torch.no_grad()
def _log_likelihood(
    model: PreTrainedModel, windows: Int[Tensor, "windows seq"], batch_size: int
) -> Float[Tensor, " windows"]:
    """Mean log-likelihood per token of each window, over all tokens but the first."""
    device = model.get_input_embeddings().weight.device
    found = []
    for ids in windows.split(max(1, batch_size // 8)):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(-1, ids[:, 1:, None].to(device))[..., 0]
        found.append((chosen - logits.logsumexp(dim=-1)).mean(dim=1).cpu())
    return torch.cat(found)
