"""Output projections that a norm follows: y = c g * RMSNorm(W f), which is not linear in W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.linalg.equations import Map
from come.merge.inside_layer import InsideLayer
from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import ReconstructionTargets
from come.models.layer_state import LayerState
from come.models.layout import Sublayer
from come.stream.processes import Processes

HELD_BYTES = 1 << 29  # largest size of features and targets that is held between the rounds
ROUNDS = 2
SMALLEST = 1e-3  # of the mean scale; smaller scales are not divided by


class OutputNorm:
    """The norm after a sublayer, of one layer.

    With s_t = 1 / rms(W f_t) held fixed, y_t = (diag(g) W) (s_t f_t) is linear in W.

    Attributes:
        scale: g, [hidden], float32 or wider.
    """

    def __init__(self, layer: nn.Module, sublayer: Sublayer) -> None:
        assert sublayer.post_norm is not None
        self._norm = layer.get_submodule(sublayer.post_norm.module)
        self.scale = scale_of(dict(layer.state_dict()), sublayer)

    @property
    def divisor(self) -> Float[Tensor, " hidden"]:
        """g, without values that are too small to divide by."""
        mean = self.scale.abs().mean()
        return self.scale.where(self.scale.abs() > SMALLEST * mean, mean)

    def inverse_rms(self, outputs: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens 1"]:
        """s_t for the outputs W f_t of the projection.

        Read from the norm's own result n = s g * x, so that its epsilon counts:
        s = <n, g * x> / |g * x|^2.
        """
        normed = self._norm(outputs).to(self.scale)
        scaled = outputs.to(self.scale) * self.scale
        product = (normed * scaled).sum(dim=-1, keepdim=True)
        return product / scaled.square().sum(dim=-1, keepdim=True).clamp_min(1e-30)


def scale_of(state: LayerState, sublayer: Sublayer) -> Float[Tensor, " hidden"]:
    """g, the scale of the norm after a sublayer, in float32 or wider."""
    assert sublayer.post_norm is not None
    weight = state[f"{sublayer.post_norm.module}.weight"]
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + sublayer.post_norm.offset


def stored_scale(
    scale: Float[Tensor, " hidden"], sublayer: Sublayer, state: LayerState
) -> LayerState:
    """The scale g as the norm after a sublayer stores it, by name."""
    assert sublayer.post_norm is not None
    name = f"{sublayer.post_norm.module}.weight"
    return {name: (scale - sublayer.post_norm.offset).to(state[name])}


def scaled_features(
    layer: nn.Module, sublayer: Sublayer, features: Float[Tensor, "batch seq width"]
) -> Float[Tensor, "batch seq width"]:
    """s_t f_t, in which the sublayer's output is linear; f_t itself without a norm after it."""
    if sublayer.post_norm is None:
        return features
    found = OutputNorm(layer, sublayer)
    if sublayer.experts or sublayer.joined:  # no one module computes W f
        outputs = features @ output_map(layer.state_dict(), sublayer).weight.T.to(features)
    else:
        outputs = layer.get_submodule(sublayer.output)(features)
    return features * found.inverse_rms(outputs).to(features)


@torch.no_grad()
def solve_normed_output(
    targets: ReconstructionTargets,
    layer: nn.Module,
    sublayer: Sublayer,
    ratio: float,
    kept: list[int] | None,
) -> LayerState:
    """The output projection and the scale of the norm after it, by repeated ridge regression.

        V   = argmin sum_t w_t | y_t - V s_t f_t |^2 + mu |V - diag(g) W|^2
        W  <- diag(1 / g) V,   s_t <- 1 / rms(W f_t)      in two rounds
        g_j = sum_t w_t y_tj n_tj / sum_t w_t n_tj^2,     n_t = s_t W f_t

    y: what the sublayer should add. All outputs of a norm have the same length, so the sum of
    several is matched in direction, and on average in length. W is first rescaled: the columns of
    every source layer by one factor, the least-squares solution, because the norm hides how large
    the layers' outputs were.

    Source: this project.

    Args:
        targets: reconstruction targets of the layer.
        layer: the merged layer, outside the model; changed.
        sublayer: a sublayer with a norm after it.
        ratio: lambda, relative to the mean diagonal of sum_t w_t s_t^2 f_t f_t^T.
        kept: number of columns of every source layer; None if the columns are mixtures.
    """
    assert sublayer.post_norm is not None
    norm = OutputNorm(layer, sublayer)
    scale = norm.scale
    weight = output_map(layer.state_dict(), sublayer).weight.to(scale.dtype)
    batches = _Batches(targets, layer, sublayer, weight.dtype)
    if kept is not None:
        weight = _rescaled(batches, weight, scale, kept)
    for _ in range(ROUNDS):
        sums = equations(sublayer.width, targets.stream, bias=False)
        for features, missing, weights in batches:
            sums.add(features * norm.inverse_rms(features @ weight.T), missing, weights)
        sums.all_reduce(targets.stream.processes)
        initial = Map(scale[:, None] * weight)
        solved = sums.solve(initial, ratio * sums.mean_diagonal(), consume=True)
        weight = solved.weight.to(weight.dtype) / norm.divisor[:, None]
    state = dict(layer.named_parameters())
    scale = best_scale(batches, norm, weight)
    return {**as_tensors(sublayer, Map(weight), state), **stored_scale(scale, sublayer, state)}


@runtime_checkable
class Batches(Protocol):
    """Features [tokens, width], targets [tokens, hidden] and token weights, batch by batch."""

    processes: Processes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


class _Batches:
    """Features f_t, what the sublayer should add, and token weights, batch by batch.

    They are read several times, so they are held in main memory if they are small.
    """

    def __init__(
        self,
        targets: ReconstructionTargets,
        layer: nn.Module,
        sublayer: Sublayer,
        dtype: torch.dtype,
    ) -> None:
        self.processes = targets.stream.processes
        self._targets = targets
        self._inside = InsideLayer(targets, layer, sublayer)
        self._dtype = dtype
        hidden = targets.stream.adapter.config.hidden_size
        tokens = targets.stream.tokens / self.processes.count
        self._holds = tokens * (sublayer.width + hidden) * dtype.itemsize <= HELD_BYTES
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = self._targets.stream.adapter.device
        for batch in self._targets:
            if batch.number not in self._held:
                read, before = self._inside.streams(batch)
                features = self._inside.features(batch, read).to(self._dtype).flatten(0, 1)
                missing = batch.missing(self._inside.sublayer, before).flatten(0, 1)
                found = features, missing, batch.weights
                if self._holds:
                    self._held[batch.number] = _moved(found, torch.device("cpu"))
                yield found
            else:
                yield _moved(self._held[batch.number], device)


def _moved(
    tensors: tuple[Tensor, Tensor, Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = tensors
    return first.to(device), second.to(device), third.to(device)


def _rescaled(batches: _Batches, weight: Tensor, scale: Tensor, kept: list[int]) -> Tensor:
    """W with the columns of every source layer times the factor that fits the targets best."""
    parts = (weight * scale[:, None]).split(kept, dim=1)
    gram, rhs = weight.new_zeros(len(parts), len(parts)), weight.new_zeros(len(parts))
    for features, missing, weights in batches:
        root = weights.to(weight).sqrt()[:, None]
        columns = zip(features.split(kept, dim=1), parts, strict=True)
        added = torch.stack([(root * (own @ part.T)).flatten() for own, part in columns])
        gram += added @ added.T
        rhs += added @ (root * missing.to(weight)).flatten()
    batches.processes.all_reduce(gram, rhs)
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    factors = torch.linalg.solve(gram, rhs)
    factors = factors.where(factors > 0, 1.0)
    return weight * factors.repeat_interleave(torch.tensor(kept, device=factors.device))


def best_scale(batches: Batches, norm: OutputNorm, weight: Tensor) -> Float[Tensor, " hidden"]:
    """g, by least squares for every channel; the norm's own where a channel is silent."""
    sums = weight.new_zeros(2, len(weight), dtype=torch.float64)
    for features, missing, weights in batches:
        outputs = features @ weight.T.to(features)
        normed = (outputs * norm.inverse_rms(outputs)).double()
        sums[0] += weights.double() @ (missing.double() * normed)
        sums[1] += weights.double() @ normed.square()
    batches.processes.all_reduce(sums)
    found = sums[0] / sums[1].clamp_min(1e-30)
    return found.where(sums[1] > 0, norm.scale.double()).to(weight)
