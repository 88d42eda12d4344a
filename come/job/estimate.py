"""Estimates the cost of a compression before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from come.merge.constraints import depths
from come.merge.method import Method
from come.models.loading import ModelShape
from come.report.numbers import duration, megabytes


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a progressive compression.

    Attributes:
        tokens: number of calibration tokens.
        num_layers: layers of the dense model.
        least: number of layer passes if every merge takes the last possible span.
        most: number of layer passes if every merge takes the first possible span.
        weight_bytes: bytes of the model's weights.
        boundary_bytes: bytes of the hidden states stored at the layer boundaries.
        store: where the hidden states are stored, "memory" or "disk".
        extra: settings that need additional passes (trial merges, gradients, refits), which
            `least` and `most` do not include.
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
        """Lines to log before the compression starts."""
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
        """Estimate of the total time, extrapolated from the first layer's pass."""
        least, most = (duration(first_layer_seconds * n) for n in (self.least, self.most))
        more = ", and more for what comes on top" if self.extra else ""
        return (
            f"time: the first layer took {first_layer_seconds:.1f} s, so {least} to {most} in all"
            f"{more}"
        )


def compression_cost(
    shape: ModelShape, *, num_samples: int, seq_len: int, target: int, method: Method, store: str
) -> Cost:
    """Estimates the cost of merging a model of `shape` down to `target` layers."""
    layers, rules = shape.num_layers, method.constraints(shape.num_layers, target)
    metric, selection, schedule = method.sensitivity, method.selection, method.schedule
    fewest = most = [target]
    if method.groups:
        fewest = most = [target] * len(method.groups)
    elif schedule.remeasures:
        fewest = depths(layers, target, rules.m)
        most = depths(layers, target, 2) if rules.variable_size else fewest
    extra = {
        f"merge.selection={selection.name}": not selection.local or selection.num_trials > 0,
        f"merge.sensitivity={metric.name}": bool(metric.gradient),
        f"merge.retention={method.retention.name}": method.retention.trials,
        f"merge.schedule={schedule.name}": schedule.trials,
        f"merge.refit={method.refit.name}": method.refit.active,
        f"merge.refit.downstream={method.refit.downstream}": method.refit.downstream is not None,
    }
    tokens = num_samples * seq_len
    slots = layers + 1 if method.block == "layer" else 2 * layers + 1
    if metric.gradient == "path" or method.needs_dense:
        slots += layers + 1  # the boundaries of a second stream or of the dense model
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
