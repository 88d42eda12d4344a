"""Unit scores of a span's layers: a channel metric applied to calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import MapStatistics, SensitivityMetric
from come.models.layout import Unit
from come.models.surgery import Span
from come.statistics.gradients import path_gradients, weight_gradients
from come.statistics.layer_statistics import LayerStatistics
from come.stream.stream import LayerStream

UnitScores = Mapping[Unit, Sequence[Float[Tensor, " units"]]]
"""For each kind of unit, one vector of scores per layer; higher scores are kept first."""


def unit_scores(
    stream: LayerStream,
    metric: SensitivityMetric,
    statistics: Sequence[LayerStatistics],
    spans: Sequence[Span],
    layers: Sequence[int],
) -> UnitScores:
    """Sensitivity of every unit of the given layers.

    An MLP channel has its own score; the score of a KV group is the mean over the head outputs of
    its query heads. If the metric needs gradients, they are computed here, for these layers only.

    Args:
        stream: has all boundaries of the current model (for gradients).
        metric: the channel metric.
        statistics: of each layer, in depth order, with the moments that the metric needs.
        spans: original layers merged into each layer; they identify it in random scores.
        layers: positions of the layers, ascending.

    Returns:
        For each kind of unit, one [units] float64 vector per layer.

    Raises:
        ValueError: a score is not finite.
    """
    adapter = stream.adapter
    weight_gradient, path = {}, {}
    if metric.gradient == "weight":
        weight_gradient = weight_gradients(stream, layers)
    elif metric.gradient == "path":
        path = path_gradients(stream, layers)
    layouts = [adapter.layer_layout(index) for index in layers]
    scores: dict[Unit, list[Tensor]] = {unit: [] for unit in layouts[0].unit_counts}
    for index, layout, layer, span in zip(layers, layouts, statistics, spans, strict=True):
        for sublayer in layout:
            unit = sublayer.unit
            moments = layer.moments[unit]
            columns = metric.score(
                MapStatistics(
                    weight=adapter.output_weight(index, sublayer).detach(),
                    tokens=moments.tokens,
                    key=f"{span[0]}-{span[-1]}/{unit}",
                    abs_mean=moments.mean("abs"),
                    square_mean=moments.mean("square"),
                    mean=moments.mean("mean"),
                    output_norm=layer.output_norms.get(unit),
                    weight_gradient=weight_gradient.get((index, unit)),
                    path=path.get((index, unit)),
                )
            )
            if not columns.isfinite().all():
                raise ValueError(
                    f"merge.sensitivity={metric.name} gives no number for some channels of layers "
                    f"{span[0]} to {span[-1]}; try model.dtype=float32 or bfloat16"
                )
            per_unit = columns.cpu().double().view(-1, sublayer.columns)
            scores[unit].append(per_unit.mean(dim=1))
    return scores
