"""What a compression will cost, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from come.merge.constraints import depths
from come.merge.recipe import Recipe
from come.models.loading import ModelShape
from come.report.numbers import duration, megabytes


@dataclass(frozen=True)
class Cost:
    """The cost of a progressive compression.

    Attributes:
        tokens: calibration tokens.
        num_layers: layers of the dense model.
        least: layer passes if every group is the last possible.
        most: layer passes if every group is the first possible.
        weight_bytes: the model's weights.
        boundary_bytes: hidden states at every boundary.
        store: where those are kept.
        extra: settings whose trials or gradients run passes of their own on top.
    """

    tokens: int
    num_layers: int
    least: int
    most: int
    weight_bytes: int
    boundary_bytes: int
    store: str
    extra: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to tell before the start."""
        extra = f"; the passes of {', '.join(self.extra)} come on top" if self.extra else ""
        places = "main memory" if self.store == "memory" else "memory-mapped files"
        return [
            f"cost: {self.tokens} calibration tokens, {self.least} to {self.most} layer passes "
            f"({self.least / self.num_layers:.1f} to {self.most / self.num_layers:.1f} forward "
            f"passes of the decoder){extra}",
            f"memory: weights {megabytes(self.weight_bytes)}, boundary states "
            f"{megabytes(self.boundary_bytes)} in {places}",
        ]

    def estimate(self, first_layer_seconds: float) -> str:
        """What to tell after the first layer's pass."""
        least, most = (duration(first_layer_seconds * n) for n in (self.least, self.most))
        more = ", and more for what comes on top" if self.extra else ""
        return (
            f"time: the first layer took {first_layer_seconds:.1f} s, so {least} to {most} in all"
            f"{more}"
        )


def compression_cost(
    shape: ModelShape, *, num_samples: int, seq_len: int, target: int, recipe: Recipe, store: str
) -> Cost:
    """The cost of merging a model of `shape` down to `target` layers."""
    layers, rules = shape.num_layers, recipe.rules(shape.num_layers, target)
    _, metric, selection, retention, schedule, refit = recipe.make()
    fewest = most = [target]
    if recipe.groups:
        fewest = most = [target] * len(recipe.groups)
    elif schedule.remeasures:
        fewest = depths(layers, target, rules.m)
        most = depths(layers, target, 2) if rules.variable_size else fewest
    extra = {
        f"merge.selection={recipe.selection}": not selection.local or selection.shortlist > 0,
        f"merge.sensitivity={recipe.sensitivity}": bool(metric.gradient),
        f"merge.retention={recipe.retention}": retention.trials,
        f"merge.schedule={recipe.schedule}": schedule.trials,
        f"merge.refit={recipe.refit}": refit.active,
        f"merge.finish_lambda={recipe.finish_lambda}": recipe.finish_lambda is not None,
    }
    tokens = num_samples * seq_len
    slots = layers + 1 if recipe.block == "layer" else 2 * layers + 1
    if metric.gradient == "path" or recipe.wants_dense:
        slots += layers + 1  # the second stream's, or the dense model's
    state = tokens * shape.config.hidden_size * shape.dtype.itemsize
    return Cost(
        tokens=tokens,
        num_layers=layers,
        least=layers + len(fewest) - 1,
        most=layers + sum(most[:-1]),
        weight_bytes=shape.weight_bytes,
        boundary_bytes=state * slots,
        store=store,
        extra=[name for name, costs in extra.items() if costs],
    )
