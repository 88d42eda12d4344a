"""Reconstruction targets for the layer that replaces a span, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """One batch of a layer's input and reconstruction targets; tensors are computed on access.

    Attributes:
        targets: the targets of all windows.
        number: the batch's number, from 0.
    """

    targets: ReconstructionTargets
    number: int

    @property
    def windows(self) -> Int[Tensor, " batch"]:
        """Indices of the windows, counted from 0 over all batches."""
        return torch.arange(self.rows.start, self.rows.stop)

    @cached_property
    def states(self) -> States:
        """The layer's input: the residual stream of the current model."""
        return self.targets.stream.boundary(self.targets.first, self.rows)

    @cached_property
    def output(self) -> States:
        """The target after the MLP."""
        return self.targets.output(self.rows)

    @property
    def weights(self) -> Float[Tensor, " tokens"]:
        """Token weights, [batch * seq]."""
        return token_weights(self.output, self.targets.weighting)

    @property
    def post_attention(self) -> States:
        """The target after attention."""
        found = self.states.clone()
        pairs = zip(self.sublayer_inputs("kv_group"), self.sublayer_inputs("channel"), strict=True)
        for before, after in pairs:
            found += after - before
        return found

    def sublayer_inputs(self, unit: Unit) -> list[States]:
        """The input of every layer's attention (kv_group) or MLP (channel) in the current model."""
        targets, stream = self.targets, self.targets.stream
        if unit == "kv_group":
            layers = range(targets.first, targets.last + 1)
            return [stream.boundary(index, self.rows) for index in layers]
        device = stream.adapter.device
        return [states[self.number].to(device) for states in targets.source_post_attention]

    @property
    def rows(self) -> slice:
        """The windows of the batch in the stream."""
        return self.targets.stream.batches[self.number]


class ReconstructionTargets:
    """Reconstruction targets of a span of layers a..b of the current model.

        post_attention = h_{a-1} + sum_i Attention_i(h_{i-1})
        output         = h_b, of the current or of the dense model

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
        self.input_maps: dict[float, list[Tensor]] = {}  # cached, of attention, by lambda

    def __iter__(self) -> Iterator[TargetBatch]:
        """Batches of this process's windows, in order; sums over them need `all_reduce`."""
        return (TargetBatch(self, number) for number in self._numbers)

    @property
    def _numbers(self) -> Sequence[int]:
        """The numbers of this process's batches."""
        return self.stream.processes.shard(range(len(self.stream.batches)))

    @cached_property
    def source_post_attention(self) -> list[dict[int, States]]:
        """The residual stream after every layer's attention, by batch number, in main memory."""
        stream, adapter = self.stream, self.stream.adapter
        found: list[dict[int, States]] = []
        for index in range(self.first, self.last + 1):
            layer, after = adapter.layer(index), dict[int, States]()
            for number in self._numbers:
                states = stream.boundary(index, stream.batches[number])
                keywords = stream.keywords(len(states), index)
                after[number] = run_attention(adapter, layer, states, keywords)[1].cpu()
            found.append(after)
        adapter.release()
        return found

    def release(self) -> None:
        """Frees what only the fit of the attention reads; it is recomputed on access."""
        vars(self).pop("source_post_attention", None)
        self.input_maps.clear()

    def output(self, rows: slice) -> States:
        """The target output of one batch."""
        if self.target == "dense":
            return self.stream.dense(self.original + 1, rows)
        return self.stream.boundary(self.last + 1, rows)


def token_weights(output: States, weighting: Weighting) -> Float[Tensor, " tokens"]:
    """The weight of every token: 1 / mean_channels(output^2), or 1.

    A few tokens, above all the first of a window, have hidden states a hundred times larger than
    the rest. Downstream layers normalise them, so the relative error is what matters.
    """
    flat = output.flatten(0, -2).float()
    if weighting == "equal":
        return torch.ones_like(flat[:, 0])
    return flat.square().mean(dim=1).clamp_min(1e-12).reciprocal()
