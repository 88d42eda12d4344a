"""What a layer that takes the place of a group is to reproduce, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.models.adapter import Unit
from come.models.sublayers import States, run_attention
from come.stream.stream import LayerStream

Target = Literal["dense", "current"]
Weighting = Literal["relative", "equal"]


@dataclass(frozen=True)
class TargetBatch:
    """A batch: what goes into the layer, and what is wanted behind its two blocks.

    Attributes:
        states: the layer's input, the residual stream of the model as it is.
        middle: wanted behind the attention.
        output: wanted behind the FFN.
        weights: of every token, [batch * seq].
        windows: the numbers of the windows, counted from 0 over all batches.
        entering: the residual stream in front of the attention and of the FFN of every layer of the
            group, where those stand in the model as it is.
    """

    states: States
    middle: States
    output: States
    weights: Float[Tensor, " tokens"]
    windows: Int[Tensor, " batch"]
    entering: Mapping[Unit, Sequence[States]]


class ReconstructionTargets:
    """The goals of a group of layers a..b of the model as it is.

        middle = h_{a-1} + sum_i Attention_i(h_{i-1})      what the group's attention adds
        output = h_b                                       of the current or of the dense model

    h_{a-1} is what the merged model really has; the dense model's h_b takes up what earlier merges
    did wrong.

    Args:
        stream: boundaries a .. b + 1; for dense targets it must remember the dense model's.
        first: a.
        last: b.
        original: the original layer behind whose output h_b stands.
        target: "dense" or "current".
        weighting: of tokens, "relative" for 1 / mean_channels(output^2), or "equal".
    """

    def __init__(
        self,
        stream: LayerStream,
        first: int,
        last: int,
        *,
        original: int,
        target: Target = "dense",
        weighting: Weighting = "relative",
    ) -> None:
        self.stream = stream
        self.first = first
        self.last = last
        self.original = original
        self.target: Target = target
        self.weighting: Weighting = weighting

    def __iter__(self) -> Iterator[TargetBatch]:
        """Batches of all windows, in order."""
        stream, layers = self.stream, range(self.first, self.last + 1)
        for rows in stream.batches:
            states, output, weights = self.input_output(rows)
            middle = states.clone()
            entering: dict[Unit, list[States]] = {"kv_group": [], "channel": []}
            for index in layers:
                before = stream.boundary(index, rows)
                keywords = stream.keywords(len(before), index)
                layer = stream.adapter.layers[index]
                between = run_attention(stream.adapter, layer, before, keywords)[1]
                middle += between - before
                entering["kv_group"].append(before)
                entering["channel"].append(between)
            windows = torch.arange(rows.start, rows.stop)
            yield TargetBatch(states, middle, output, weights, windows, entering)

    def input_output(self, rows: slice) -> tuple[States, States, Float[Tensor, " tokens"]]:
        """Of one batch the layer's input, the output that is wanted, and the tokens' weights."""
        if self.target == "dense":
            output = self.stream.dense(self.original + 1, rows)
        else:
            output = self.stream.boundary(self.last + 1, rows)
        states = self.stream.boundary(self.first, rows)
        return states, output, token_weights(output, self.weighting)


def token_weights(output: States, weighting: Weighting) -> Float[Tensor, " tokens"]:
    """The weight of every token: 1 / mean_channels(output^2), or 1.

    A few tokens (the first of a window above all) have states a hundred times larger than the
    rest; every layer behind normalises them, so it is the relative error that counts.
    """
    flat = output.flatten(0, -2).float()
    if weighting == "equal":
        return torch.ones_like(flat[:, 0])
    return flat.square().mean(dim=1).clamp_min(1e-12).reciprocal()
