"""Packed token windows: calibration windows, and held-out windows disjoint from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from come.data.rows import document_text, template_text
from come.data.sources.base import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CALIBRATION_PART = (0.0, 0.6)
EVALUATION_PART = (0.8, 1.0)  # 0.6 to 0.8: for tuning settings (a rate, a lambda, a rule)
_POOL_CHARS = 2_000_000
_CHARS_PER_TOKEN = 16  # upper bound for any tokenizer
_LINE_REACH = 20_000  # characters within which a cut searches for a line end
_WORD_REACH = 1_000  # if there is none, characters within which it searches for a word end
_DISTINCT_LINE = 40  # shorter lines (headings, "Returns:") may be in both texts


@dataclass(frozen=True)
class TokenWindows:
    """Packed windows without padding, and a description of the text they come from.

    Attributes:
        windows: token ids, [windows, seq] int64.
        corpus_tokens: number of tokens of the text that the windows were cut from.
        source: description of the text.
        removed_lines: number of lines removed from the text because the held-out text has them.
        drawn_from: for each text that the windows were drawn from, named by its content, the share
            of it, from its beginning, that they were drawn from.
    """

    windows: Int[Tensor, "windows seq"]
    corpus_tokens: int
    source: str
    removed_lines: int = 0
    drawn_from: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Total number of tokens in all windows."""
        return self.windows.numel()

    @property
    def hash(self) -> str:
        """Hash of the token ids and the shape."""
        digest = hashlib.sha256(str(tuple(self.windows.shape)).encode())
        digest.update(self.windows.numpy().tobytes())
        return digest.hexdigest()[:16]


def all_drawn(*uses: Mapping[str, float]) -> dict[str, float]:
    """The texts of several uses (see `TokenWindows.drawn_from`), each with its largest share."""
    texts = dict.fromkeys(text for use in uses for text in use)
    return {text: max(use.get(text, 0.0) for use in uses) for text in texts}


def shifted(
    windows: Int[Tensor, "windows seq"], share: float, begin: int | None
) -> Int[Tensor, "windows seq"]:
    """The windows, the last `share` of which begin in the middle of a text.

    Such a window is the second half of one window and then the beginning of the next (the last
    one: of the first such window), without the begin token: text has none in the middle of a
    window, and a model that trains to predict tokens would learn where it is.

    Args:
        windows: token ids.
        share: share of the windows that are shifted, rounded, in [0, 1].
        begin: the begin token, with which the windows may begin; None for none.
    """
    half, count = windows.shape[1] // 2, round(share * len(windows))
    kept, moved = windows.tensor_split([len(windows) - count])
    following = moved.roll(-1, dims=0)
    left_out = int(begin is not None and bool((moved[:, 0] == begin).all()))
    pairs = torch.cat([moved, following[:, left_out:]], dim=1)
    return torch.cat([kept, pairs[:, half : half + windows.shape[1]]])


def corpus_text(
    source: TextSource,
    max_chars: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The documents of a source joined by blank lines, cut after the line at `max_chars`.

    Args:
        source: the corpus.
        max_chars: number of characters after which reading stops; None for all.
        tokenizer: provides the chat template for documents that are chats.

    Raises:
        ValueError: the source cannot be read or has no text, or it has chats and there is no chat
            template, or it fails; the message has the number of the document.
    """
    documents: list[str] = []
    length = 0
    for number, document in enumerate(source.documents(), start=1):
        try:
            documents.append(document_text(document, tokenizer))
        except ValueError as error:
            place = f"{source.name} ({source.identity}), document {number}"
            raise ValueError(f"{place}: {error}") from error
        length += len(documents[-1])
        if max_chars is not None and length >= max_chars:
            break
    text = "\n\n".join(documents)
    if max_chars is not None:
        text = text[: _cut(text, max_chars)]
    if not text.strip():
        raise ValueError(f"{source.name} ({source.identity}) holds no text")
    return text


def text_part(text: str, part: tuple[float, float]) -> str:
    """The part of a text between two fractions of its length, cut at line ends.

    Very long lines, for example of a text without newlines, are cut after a word.
    """
    begin, end = (
        int(share * len(text)) if share in (0.0, 1.0) else _cut(text, int(share * len(text)))
        for share in part
    )
    return text[begin:end]


def _cut(text: str, position: int) -> int:
    """The position after the line at `position`, or after the word if the line is long."""
    for sign, reach in (("\n", _LINE_REACH), (" ", _WORD_REACH)):
        end = text.find(sign, position, position + reach)
        if end >= 0:
            return end + 1
    return min(position, len(text))


def without_lines_of(text: str, held_out: str, template: str = "") -> tuple[str, int]:
    """Removes the long lines of `held_out` from `text`; also returns how many were removed.

    Lines of `template`, which is in every chat, such as a system message, are not removed.
    """
    foreign = {line.strip() for line in held_out.splitlines() if len(line.strip()) > _DISTINCT_LINE}
    foreign -= {line.strip() for line in template.splitlines()}
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if line.strip() not in foreign]
    return "".join(kept), len(lines) - len(kept)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    num_samples: int,
    seq_len: int,
    seed: int = 0,
    held_out: Sequence[TextSource] = (),
    at_most: bool = False,
    backwards: bool = False,
    begin: int | None = None,
    what: str = "calibration",
    asked_by: str | None = None,
) -> TokenWindows:
    """Draws packed windows from a corpus, disjoint from the held-out text.

    The corpus is tokenised as one stream without special tokens and split into non-overlapping
    windows, of which `num_samples` are drawn without replacement. If a held-out text comes from
    the same corpus, or the source has no held-out split of its own, calibration uses the first 60%
    of the text, and the held-out text is by default the last 20%. Lines of more than 40 characters
    that are also in a held-out text are removed from the calibration text.

    Args:
        tokenizer: the model's tokenizer.
        source: the corpus. Only its first 2 million characters are used, or more if needed for
            `num_samples` windows.
        num_samples: number of windows.
        seq_len: tokens per window.
        seed: seed of the draw.
        held_out: the corpora of the evaluation texts.
        at_most: whether fewer than `num_samples` windows, but at least one, are acceptable.
        backwards: whether to draw in reverse order, so that the first windows are those that a
            forward draw with the same seed and length takes last.
        begin: token that every window begins with, in addition to its text; None for none.
        what: purpose of the text for error messages, "calibration" or "training".
        asked_by: the setting that asks for `num_samples` windows, for error messages; None for
            calibration.num_samples.

    Raises:
        ValueError: the corpus cannot be read, or has too few tokens; the message says how many.
    """
    asked = num_samples * seq_len
    text = corpus_text(source, max(_POOL_CHARS, _CHARS_PER_TOKEN * asked), tokenizer)
    splits = source.always_split or any(other.content == source.content for other in held_out)
    if splits:
        text = text_part(text, CALIBRATION_PART)
    drawn_from = {source.content: CALIBRATION_PART[1] if splits else 1.0}
    removed, template = 0, template_text(tokenizer)
    for other in held_out:
        apart = _evaluation_text(other, tokenizer, _drawn(other, drawn_from))
        text, lines = without_lines_of(text, apart, template)
        removed += lines
    tokens = tokenize(tokenizer, text, special=False)
    split = _split(tokens, seq_len, begin)
    available = len(split)
    if available < (1 if at_most else num_samples):
        least = f"one of distill.seq_len={seq_len} is the least"
        if not at_most:
            least = f"{asked_by or f'calibration.num_samples={num_samples}'} asks for {asked} "
            least += "tokens. Lower "
            least += "calibration.num_samples or calibration.seq_len"
        raise ValueError(
            f"{what} text too short: {source.name} ({source.identity}) has {len(tokens)} tokens "
            f"for {what}, {available} windows of {seq_len}; {least}, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(available, generator=generator)
    drawn = (order.flip(0) if backwards else order)[:num_samples]
    name = f"{source.name} ({source.identity})"
    return TokenWindows(split[drawn], len(tokens), name, removed, drawn_from)


def _split(
    tokens: Int[Tensor, " tokens"], seq_len: int, begin: int | None
) -> Int[Tensor, "windows seq"]:
    """Consecutive windows; with `begin`, each starts with that token.

    It is not added to a window whose text starts with it, as rendered chats may.
    """
    if begin is None:
        return tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    windows, first, extra = [], 0, tokens.new_tensor([begin])
    while first < len(tokens):
        added = extra[: int(tokens[first] != begin)]
        text = tokens[first : first + seq_len - len(added)]
        if len(text) + len(added) == seq_len:
            windows.append(torch.cat([added, text]))
        first += len(text)
    return torch.stack(windows) if windows else tokens.new_empty(0, seq_len)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    others: Sequence[TextSource] = (),
    drawn_from: Mapping[str, float] | None = None,
    begin: int | None = None,
    key: str = "eval.perplexity",
) -> TokenWindows:
    """Splits held-out text, tokenised as one stream, into consecutive non-overlapping windows.

    Args:
        tokenizer: the model's tokenizer.
        source: the corpus.
        seq_len: tokens per window.
        max_tokens: maximum number of tokens, from the start of the text; None for all.
        others: the corpora that calibration and training use.
        drawn_from: those that an earlier run has used, see `TokenWindows`.
        begin: token that every window begins with, in addition to its text; None for none.
        key: config key of the evaluation's settings for error messages.

    Raises:
        ValueError: the corpus cannot be read or does not fill two windows, or its `part` overlaps
            the part that calibration draws from, or calibration draws from all of it.
    """
    own = {other.content: CALIBRATION_PART[1] for other in others}
    drawn = max(_drawn(source, own), _drawn(source, drawn_from or {}))
    if drawn == 1:
        raise ValueError(
            f"{key}: the model was calibrated or trained on windows from all of {source.name} "
            f"({source.identity}), so no part of it is unseen. Take another text, or merge again "
            "with this one in eval.perplexity.path, which keeps the last 40% of it apart"
        )
    if source.part and source.part[0] < drawn:
        raise ValueError(
            f"{key}.text_range={list(source.part)}: calibration or training draws from the first "
            f"{drawn:.0%} of the same text; begin at {drawn} or later"
        )
    text = _evaluation_text(source, tokenizer, drawn)
    if max_tokens:  # avoids tokenising all of a large corpus
        text = text[: _CHARS_PER_TOKEN * max_tokens]
    tokens = tokenize(tokenizer, text, special=begin is None)
    used = tokens[:max_tokens] if max_tokens else tokens
    windows = _split(used, seq_len, begin)
    if len(windows) < 2:
        length = f"{'.'.join(key.split('.')[:2])}.seq_len"  # extra texts share it
        raise ValueError(
            f"evaluation text too short: {source.name} ({source.identity}) gives {len(used)} "
            f"tokens, and two windows of {length}={seq_len} are the least for an interval. Lower "
            f"{length}, raise {key}.max_tokens, or give more text"
        )
    return TokenWindows(windows, len(tokens), f"{source.name} ({source.identity})")


def begin_token(asked: bool | None, needed: bool, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that every window begins with; None for none.

    Args:
        asked: `model.begin_token`; None for what the family needs.
        needed: whether the family needs it.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: the tokenizer has no begin token.
    """
    if not (needed if asked is None else asked):
        return None
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "model.begin_token=true: the tokenizer has no begin token; take model.begin_token=false"
        )
    return int(tokenizer.bos_token_id)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool
) -> Int[Tensor, " tokens"]:
    """Token ids of a text, int64; `special` adds the tokenizer's special tokens, if it has any."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def check_length(key: str, tokens: int, longest: int | None) -> None:
    """Raises ValueError if `tokens` exceeds the model's maximum sequence length, if it has one.

    The message begins with `key`, the setting, and with its value unless `key` has one already.
    """
    if longest is not None and tokens > longest:
        shown = key if "=" in key else f"{key}={tokens}"
        raise ValueError(f"{shown}: the model reads at most {longest} tokens")


def check_token_ids(
    windows: Int[Tensor, "windows seq"],
    rows: int,
    what: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Checks that the model's embedding has a row for every token.

    Args:
        windows: token ids.
        rows: number of rows of the embedding.
        what: description of the tokens for the error message.
        tokenizer: used to name the token in the error message.

    Raises:
        ValueError: a token has no row, for example because tokens were added to the tokenizer and
            the model was not resized.
    """
    if not windows.numel():
        return
    largest = int(windows.max())
    if largest >= rows or int(windows.min()) < 0:
        name = f" {tokenizer.convert_ids_to_tokens(largest)!r}" if tokenizer else ""
        raise ValueError(
            f"{what} has the token{name} with id {largest}, and the model's embedding has {rows} "
            f"rows (ids 0 to {rows - 1}): the tokenizer has tokens that the model was not resized "
            "for. Remove the token from the text or the tokenizer, or resize the model "
            "(resize_token_embeddings)"
        )


def _evaluation_text(source: TextSource, tokenizer: PreTrainedTokenizerBase, drawn: float) -> str:
    text = corpus_text(source, tokenizer=tokenizer)
    part = source.part or (EVALUATION_PART if drawn else None)
    return text_part(text, part) if part else text


def _drawn(source: TextSource, drawn_from: Mapping[str, float]) -> float:
    """The share of a text, from its beginning, that calibration or training draws from."""
    least = CALIBRATION_PART[1] if source.always_split else 0.0
    return max(least, drawn_from.get(source.content, 0.0))
