"""FLAP: the mean of removed channels becomes a bias."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.combination import Combination
from come.merge.inside_layer import InsideLayer
from come.merge.reconstruction import ReconstructionTargets, Target
from come.merge.refit.base import REFITS, Refit
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState
from come.models.layout import Sublayer
from come.setting import setting
from come.statistics.layer_statistics import InputMoments

log = logging.getLogger(__name__)


@REFITS.register
@dataclass(eq=False)
class Flap(Refit):
    """Adds the mean output of the removed units to the bias of the output projection.

        b <- b + sum_{j removed} W_:j E_tokens[ f_j ]

    f_j: input j of the projection in the layer before it is narrowed, on the states of the current
    model. Sums are in float64. The weights stay as they are.

    Source: arXiv 2312.11983 (FLAP), baseline bias compensation. Differs from the paper in: only
    projections that have a bias get the compensation, and LLaMA and its relatives have none, since
    a new one would change the architecture; every layer keeps the same number of channels, so that
    the checkpoint has one intermediate_size, while the paper compares standardised scores of all
    layers; attention keeps all heads, or with `merge.width_attention` as many KV groups in every
    layer; a layer is measured after the layers before it are narrowed.
    """

    name = "flap"
    paper = "2312.11983"
    source = "FLAP, bias compensation"
    narrows_only = True

    target: Target = setting("current", "whose states are read", choices=("current",))
    _warned: bool = field(init=False, repr=False, default=False)

    def check(self, method: Combination) -> None:
        """Raises ValueError if no units are removed, or layers are merged."""
        super().check(method)
        if method.width == 1 and method.width_attention == 1:
            raise ValueError(
                f"merge.refit={self.name} makes up for units that a layer loses, and "
                "merge.width=1 keeps all of them; give a smaller merge.width, such as 0.8"
            )
        if method.groups:
            raise ValueError(
                f"merge.refit={self.name} narrows layers and merges none; leave "
                f"merge.groups={[list(group) for group in method.groups]} out"
            )

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The biases of the output projections that have one and lost units."""
        state, found = sources.state, dict[str, Tensor]()
        for sublayer in targets.stream.adapter.layer_layout(targets.place):
            kept = sources.kept.get(sublayer.unit, ())
            left = {unit for units in kept for unit in units}
            removed = [unit for unit in range(sublayer.count) if unit not in left]
            if not removed:
                continue
            if sublayer.bias not in state or sublayer.output_gate or sublayer.channel_gate:
                self._warn(sublayer)
                continue
            bias = state[sublayer.bias]
            lost = _mean_output(targets, sublayer, removed)
            found[sublayer.bias] = (bias.double() + lost.to(bias.device)).to(bias)
        return found

    def _warn(self, sublayer: Sublayer) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "merge.refit=%s: %s has no bias that could hold the mean of the removed channels, "
                "so nothing makes up for them",
                self.name,
                sublayer.output,
            )


@torch.no_grad()
def _mean_output(
    targets: ReconstructionTargets, sublayer: Sublayer, units: list[int]
) -> Float[Tensor, " hidden"]:
    """The mean over all calibration tokens of what units of a layer add, float64, on the CPU."""
    adapter, index = targets.stream.adapter, targets.place
    inside = InsideLayer(targets.with_units({}), adapter.layer(index), sublayer)
    moments = InputMoments(("mean",), sublayer.width)
    for batch in targets:
        moments.update(inside.features(batch, inside.streams(batch)[0]))
    moments.finish(targets.stream.processes)
    mean = moments.mean("mean")
    assert mean is not None
    columns = (
        torch.tensor(units)[:, None] * sublayer.columns + torch.arange(sublayer.columns)
    ).flatten()
    weight = adapter.output_weight(index, sublayer).double().cpu()
    return weight[:, columns] @ mean[columns]
