"""Reconstruction targets for the layer that replaces a span, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """One batch of a layer's input and of the targets after attention and after the MLP.

    Attributes:
        states: the layer's input: the residual stream of the current model.
        middle: target after attention.
        output: target after the MLP.
        weights: token weights, [batch * seq].
        windows: indices of the windows, counted from 0 over all batches.
        entering: the residual stream before the attention (kv_group) and before the MLP (channel)
            of every layer of the span, in the current model.
    """

    states: States
    middle: States
    output: States
    weights: Float[Tensor, " tokens"]
    windows: Int[Tensor, " batch"]
    entering: Mapping[Unit, Sequence[States]]


class ReconstructionTargets:
    """Reconstruction targets of a span of layers a..b of the current model.

        middle = h_{a-1} + sum_i Attention_i(h_{i-1})      what the span's attention adds
        output = h_b                                       of the current or of the dense model

    h_{a-1} always comes from the current model. With h_b of the dense model, the fit also corrects
    the errors of earlier merges.

    Args:
        stream: has boundaries a .. b + 1; for dense targets also a snapshot of the dense model's.
        first: a.
        last: b.
        original: the original layer whose output is the dense model's h_b.
        target: "dense" or "current".
        weighting: token weighting, "relative" for 1 / mean_channels(output^2), or "equal".
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
        for number, rows in enumerate(self.stream.batches):
            states, output, weights = self.input_output(rows)
            middle = states.clone()
            before = [
                self.stream.boundary(index, rows) for index in range(self.first, self.last + 1)
            ]
            device = self.stream.adapter.device
            between = [states[number].to(device) for states in self._after_attention]
            for entering, leaving in zip(before, between, strict=True):
                middle += leaving - entering
            windows = torch.arange(rows.start, rows.stop)
            entering_units: dict[Unit, list[States]] = {"kv_group": before, "channel": between}
            yield TargetBatch(states, middle, output, weights, windows, entering_units)

    @cached_property
    def _after_attention(self) -> list[list[States]]:
        """The residual stream after the attention of every layer, in batches, in main memory."""
        stream, adapter = self.stream, self.stream.adapter
        found: list[list[States]] = []
        for index in range(self.first, self.last + 1):
            layer, after = adapter.layer(index), []
            for rows in stream.batches:
                states = stream.boundary(index, rows)
                keywords = stream.keywords(len(states), index)
                after.append(run_attention(adapter, layer, states, keywords)[1].cpu())
            found.append(after)
        adapter.release()
        return found

    def input_output(self, rows: slice) -> tuple[States, States, Float[Tensor, " tokens"]]:
        """The layer's input, the target output and the token weights of one batch."""
        if self.target == "dense":
            output = self.stream.dense(self.original + 1, rows)
        else:
            output = self.stream.boundary(self.last + 1, rows)
        states = self.stream.boundary(self.first, rows)
        return states, output, token_weights(output, self.weighting)


def token_weights(output: States, weighting: Weighting) -> Float[Tensor, " tokens"]:
    """The weight of every token: 1 / mean_channels(output^2), or 1.

    A few tokens, above all the first of a window, have hidden states a hundred times larger than
    the rest. Downstream layers normalise them, so the relative error is what matters.
    """
    flat = output.flatten(0, -2).float()
    if weighting == "equal":
        return torch.ones_like(flat[:, 0])
    return flat.square().mean(dim=1).clamp_min(1e-12).reciprocal()
