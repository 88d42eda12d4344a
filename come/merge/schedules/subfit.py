"""Drops single attention and FFN sublayers, chosen apart, at the cost of whole layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from come.linalg.equations import Map
from come.linalg.gram import Gram
from come.linalg.subsets import cheapest_cover
from come.merge.combination import Combination
from come.merge.dropped import DroppedSublayer, SublayerDrops
from come.merge.reconstruction import Weighting, token_weights
from come.merge.schedules.base import SCHEDULES, SublayerSchedule
from come.models.adapter import ModelAdapter
from come.models.layout import SUBLAYERS, LayerLayout
from come.models.sublayers import States, states_after
from come.setting import setting
from come.stream.stream import LayerStream

log = logging.getLogger(__name__)

COSTS = ("bypass", "change")
PENALTY = 0.01  # of the linear map, relative to the mean diagonal of its Gram matrix


@SCHEDULES.register
@dataclass(eq=False)
class SubFit(SublayerSchedule):
    """Drops the attention and FFN sublayers that cost least, apart and from anywhere in the model.

        bypass: c_s = sum_t w_t |f_t - B x_t|^2 / (d T)     the error of a linear map of the input
        change: c_s = sum_t w_t |f_t|^2 / (d T)

    x_t: the residual stream before sublayer s, [hidden]; f_t: what the sublayer adds to it; w_t:
    the token weights of `merge.refit.weights`, by default 1 / mean_channels((x_t + f_t)^2), with
    which c_s is a share of the stream's energy, >= 0. B is fitted to one half of the calibration
    windows and the error measured on the other, and the reverse. All costs are those of the dense
    model. The set has the least sum of costs among all sets with at least the parameters of
    L - `merge.target_layers` average layers, so the overshoot is less than its smallest sublayer.
    Every depth of `merge.save_at` is searched separately.

    The dropped sublayers stay in the file with output projections of zero, so the checkpoint has
    all layers, no fewer bytes, and takes no less time in ordinary runtimes: the result is a bound
    at equal used parameters. `layers` of a result is the depth of the same cost, and `parameters`
    leaves the dropped sublayers out. With merge.refit=ridge the output projection of the sublayer
    before the dropped ones makes up for them (see `come.merge.sublayer_drops`).

    Source: arXiv 2606.02559 (SubFit), for sublayers chosen apart, not contiguous, at equal cost.
    Differs from the paper in the repair: there every dropped sublayer leaves a fitted bypass of low
    rank, which no tensor of an ordinary checkpoint holds (experiments/subfit.py has the bound); and
    in the score, there of rotation and magnitude of the residual stream.
    """

    name = "subfit"
    paper = "2606.02559"
    source = "SubFit, sublayers chosen apart"

    cost: str = setting(
        "bypass", "cost of a sublayer: error of a linear map, or relative change", choices=COSTS
    )

    def passes(self, num_layers: int, target: int) -> tuple[int, int]:
        """One more pass, for the states between the sublayers."""
        return num_layers, 0

    def check(self, method: Combination) -> None:
        """Raises ValueError for components that it would not use."""
        super().check(method)
        refit, reason = method.refit, None
        if not method.operator.drops:
            reason = f"drops sublayers, and merge.operator={method.operator.name} merges layers; "
            reason += "choose merge.operator=drop"
        elif method.m != 2:
            reason = f"drops single sublayers; merge.m={method.m} is not possible with it"
        elif method.block != "layer":
            reason = "chooses among attention and FFN sublayers; merge.sublayers="
            reason += f"{list(method.sublayers)} is not possible with it; choose [attention,ffn]"
        elif refit.active and refit.name != "ridge":
            reason = "refits output projections of the layers that stay; merge.refit="
            reason += f"{refit.name} is not possible with it; choose merge.refit=ridge or none"
        elif refit.active and refit.target_of(narrower=False) != "dense":
            reason = f"fits to the dense model; merge.refit.target={refit.target} is not possible "
            reason += "with it; choose merge.refit.target=dense"
        elif refit.align is not None:
            reason = f"changes no input projections; merge.refit.align={refit.align} is not "
            reason += "possible with it; choose merge.refit.align=null"
        elif refit.downstream is not None:
            reason = f"refits after every drop; merge.refit.downstream={refit.downstream} is not "
            reason += "possible with it; choose merge.refit.downstream=null"
        if reason:
            raise ValueError(f"merge.schedule={self.name} {reason}")

    def check_layers(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises ValueError unless each layer is attention, then an FFN, added to the stream."""
        for index, layout in enumerate(layouts):
            kinds, reason = tuple(sublayer.kind for sublayer in layout), None
            missing = [kind for kind in SUBLAYERS if kind not in kinds]
            if missing:
                reason = f"has no {' and no '.join(missing)} of its own"
            elif len(kinds) > 2:
                reason = f"has {len(kinds)} sublayers: {', '.join(kinds)}"
            elif kinds != SUBLAYERS or layout.sublayers[0].stage == layout.last.stage:
                reason = "has attention and FFN side by side on one input"
            elif layout.scale:
                reason = f"multiplies the residual stream ({layout.scale})"
            if reason:
                raise ValueError(
                    f"merge.schedule={self.name} drops attention or FFN of a layer, one after the "
                    f"other, and layer {index} of this model {reason}; choose whole layers, such "
                    "as merge.schedule=one_shot"
                )

    def dropped(self, stream: LayerStream, method: Combination, target: int) -> SublayerDrops:
        """The cheapest set; see the base class.

        Raises:
            ValueError: the unprotected layers have too few parameters, or a cost is not finite.
        """
        costs = sublayer_costs(stream, method.refit.weights, linear=self.cost == "bypass")
        drops = self.cheapest(stream.adapter, costs, method, target)
        log.info("SubFit at the cost of %d layers: %s", target, drops.described())
        return drops

    @staticmethod
    def cheapest(
        adapter: ModelAdapter, costs: Sequence[Sequence[float]], method: Combination, target: int
    ) -> SublayerDrops:
        """The cheapest set, from the costs of the sublayers of every layer.

        Raises:
            ValueError: the unprotected layers have too few parameters.
        """
        depth = adapter.num_layers
        free = range(method.protect_first, depth - method.protect_last)
        found = [
            DroppedSublayer(index, kind, adapter.block_size(index, kind), costs[index][number])
            for index in free
            for number, kind in enumerate(SUBLAYERS)
        ]
        least = (depth - target) * adapter.block_parameters["layer"]
        sizes = [each.parameters for each in found]
        if sum(sizes) < least:
            raise ValueError(
                f"merge.target_layers={target} removes {least} parameters, and the layers that "
                f"are not protected have {sum(sizes)}; lower merge.protect_first or "
                "merge.protect_last, or keep more layers"
            )
        chosen = cheapest_cover(sizes, [each.cost for each in found], least)
        return SublayerDrops(target, [found[item] for item in chosen])


@torch.no_grad()
def sublayer_costs(
    stream: LayerStream, weighting: Weighting, *, linear: bool
) -> list[tuple[float, ...]]:
    """The costs c_s of the sublayers of every layer, in their order (see `SubFit`).

    Args:
        stream: a model whose boundaries are all valid.
        weighting: the weights w of tokens.
        linear: whether the error of a linear map counts; otherwise all that a sublayer adds.

    Raises:
        ValueError: a cost is not finite.
    """
    hidden, found = stream.adapter.config.hidden_size, list[tuple[float, ...]]()
    for index in range(stream.num_layers):
        count = len(stream.adapter.layer_layout(index).sublayers)
        even, odd = (
            [Gram(hidden, hidden, bias=False, device=stream.adapter.device) for _ in range(count)]
            for _ in range(2)
        )
        for rows in stream.own_batches:
            is_odd = torch.arange(rows.start, rows.stop) % 2 == 1
            inside = pairwise(inner_streams(stream, index, rows, stream.boundary))
            for number, (before, after) in enumerate(inside):
                weights = token_weights(after, weighting).view(after.shape[:2])
                for half, chosen in ((even, ~is_odd), (odd, is_odd)):
                    x, y, w = before[chosen], after[chosen], weights[chosen]
                    half[number].add(x.flatten(0, 1), (y - x).flatten(0, 1), w.flatten())
        for sums in (*even, *odd):
            sums.all_reduce(stream.processes)
        scale = stream.tokens * hidden
        errors = [_error(*halves, linear) for halves in zip(even, odd, strict=True)]
        found.append(tuple(error / scale for error in errors))
    if not torch.tensor(found).isfinite().all():
        raise ValueError(
            "merge.schedule=subfit: the change by a sublayer is not finite; try "
            "model.dtype=float32 or bfloat16"
        )
    return found


def _error(even: Gram, odd: Gram, linear: bool) -> float:
    """sum_t w_t |f_t - B x_t|^2, B fitted to the other half; without a map, B = 0."""
    nothing = Map(torch.zeros_like(even.moment.T))

    def of(fit: Gram, held_out: Gram) -> float:
        penalty = PENALTY * fit.mean_diagonal()
        if not math.isfinite(penalty):
            return math.nan
        return held_out.error(fit.solve(nothing, penalty) if linear else nothing)

    error = of(even, odd) + of(odd, even)
    return error if math.isnan(error) else max(0.0, error)  # rounding can make it negative


def inner_streams(
    stream: LayerStream, index: int, rows: slice, boundary: Callable[[int, slice], States]
) -> list[States]:
    """The residual stream before layer `index` and after each of its sublayers.

    Args:
        stream: its model has the layer.
        index: the layer.
        rows: the windows.
        boundary: gives the states of a boundary, `stream.boundary` or `stream.dense`.
    """
    adapter, states = stream.adapter, boundary(index, rows)
    layer, layout = adapter.layer(index), adapter.layer_layout(index)
    keywords = stream.keywords(len(states), index)
    inside = [
        states_after(layer, layout, sublayer, states, keywords)
        for sublayer in layout.sublayers[:-1]
    ]
    return [states, *inside, boundary(index + 1, rows)]
