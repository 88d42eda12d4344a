"""The interface of channel metrics, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from come.registry import Registry
from come.setting import HasSettings


@dataclass(frozen=True)
class MapStatistics:
    """One linear map `y = W x` of a layer and the calibration statistics of its input.

    Attributes:
        weight: `W`, [d_out, d_in], in the model's dtype.
        tokens: number of calibration tokens in the moments.
        key: identifies the map ("3-4/channel": span of original layers, kind of unit).
        abs_mean: E|x_j|, [d_in] float64; None unless the metric needs the moment "abs".
        square_mean: E[x_j^2], [d_in] float64; None unless it needs "square".
        mean: E[x_j], [d_in] float64; None unless it needs "mean".
        output_norm: E|W_u x_u|_2 of every unit u over the tokens that it acts on, [units] float64;
            None unless it needs "output_norm".
        weight_gradient: dL/dW, [d_out, d_in] float32 or wider, L the mean loss over all calibration
            tokens; None unless the metric needs the gradient "weight".
        path: integrated gradients of L for a scale on each channel, [d_in] float64, nats, signed;
            None unless it needs the gradient "path".
    """

    weight: Float[Tensor, "out in"]
    tokens: int
    key: str
    abs_mean: Float[Tensor, " in"] | None = None
    square_mean: Float[Tensor, " in"] | None = None
    mean: Float[Tensor, " in"] | None = None
    output_norm: Float[Tensor, " units"] | None = None
    weight_gradient: Float[Tensor, "out in"] | None = None
    path: Float[Tensor, " in"] | None = None


@dataclass(eq=False)
class SensitivityMetric(HasSettings, ABC):
    """Scores the input channels of a layer's two output projections; higher is kept first.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula is defined, in words.
        moments: which of "abs", "square", "mean" of the inputs it needs, and "output_norm" of
            what every unit adds to the output.
        gradient: "weight", "path", or "" for none; gradients cost backward passes of the stream.
    """

    config_key = "merge.sensitivity"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    moments: ClassVar[tuple[str, ...]] = ()
    gradient: ClassVar[Literal["", "weight", "path"]] = ""

    @abstractmethod
    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """Sensitivity of every input channel, [d_in] float64, any range, higher is kept first."""


SENSITIVITY: Registry[SensitivityMetric] = Registry(
    "sensitivity metric", "come.merge.sensitivity", "merge.sensitivity"
)
