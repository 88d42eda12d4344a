"""The interface of refits, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from come.merge.combination import Combination
from come.merge.reconstruction import ReconstructionTargets, Target, Weighting
from come.merge.source_layers import SourceLayers
from come.merge.work import SpanSize, Work
from come.models.layer_state import LayerState
from come.models.layout import LayerLayout
from come.registry import Registry
from come.setting import HasSettings, setting

RefitTarget = Literal["auto", "dense", "current"]


@dataclass(eq=False)
class Refit(HasSettings, ABC):
    """Fits the layer that replaces a span to the span's reconstruction targets.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula is defined, in words.
        active: whether it changes anything.
        batchwise: whether the result depends on how windows are batched.
        narrows_only: whether it only fits layers that lose channels, so that none are merged.

    Attributes:
        target: the model whose hidden states are the target, also for components that choose units
            or spans by reconstruction error (see `target_of`).
        weights: token weighting, see `token_weights`.
        downstream: penalty of the refit of all layers after the first merge; None for none.
        lambda_: penalty of the output projections, also used by components that choose units by
            the refit.
        align: penalty of the input alignment; None for no alignment.
    """

    config_key = "merge.refit"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    active: ClassVar[bool] = True
    batchwise: ClassVar[bool] = False
    narrows_only: ClassVar[bool] = False
    target: RefitTarget = setting(
        "auto",
        "whose states are reconstructed; auto: those of the dense model in a merge, and of the "
        "current one where a layer only loses units",
        choices=get_args(RefitTarget),
    )
    weights: Weighting = setting("relative", "weights of tokens", choices=get_args(Weighting))
    downstream: float | None = setting(
        None,
        "penalty of a refit of all layers after the first merge; null for none",
        kind=float,
        above=0,
        optional=True,
    )
    lambda_: Any = field(init=False, repr=False, default=0.1)
    align: float | None = field(init=False, repr=False, default=None)

    def target_of(self, narrower: bool) -> Target:
        """The model whose hidden states are the target of a layer.

        Where every layer loses units, each would correct the errors of all layers before it, and
        most of what it fits of them is noise.

        Args:
            narrower: whether the layer only loses units, and replaces no span.
        """
        if self.target != "auto":
            return self.target
        return "current" if narrower else "dense"

    def check(self, method: Combination) -> None:
        """Raises ValueError if the refit cannot be combined with the method's components."""
        readers = method.uses_targets
        if self.downstream is not None:
            readers = [*readers, "merge.refit.downstream"]
        if readers and method.block != "layer":
            raise ValueError(
                f"{readers[0]} reconstructs whole layers; merge.sublayers="
                f"{list(method.sublayers)} is not possible with it"
            )

    def check_layers(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises ValueError if it cannot refit layers like these."""
        if self.downstream is not None:
            check_linear_output(f"merge.refit.downstream={self.downstream}", layouts)

    @abstractmethod
    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The tensors that change.

        Args:
            targets: the layer's inputs and its targets after attention and after the MLP.
            sources: the source layers of the merge; `sources.state` has all tensors of the merged
                layer.

        Returns:
            Tensors that replace those in `sources.state`, with the same shapes and dtypes.
        """

    def work(self, size: SpanSize) -> Work:
        """The work of solving for one merged layer; zero for refits without an estimate."""
        return Work()

    def trial_work(self, size: SpanSize, solved: bool) -> Work:
        """The work of a trial merge; `solved`: whether unit selection already solves for it."""
        return self.surrogate.work(size)

    def output_scale(self, targets: ReconstructionTargets, sources: SourceLayers) -> float:
        """Factor on the output projections and their biases of all layers after the merged one."""
        return 1.0

    @property
    def surrogate(self) -> Refit:
        """A cheaper refit for trial merges, which only have to rank spans."""
        return self


def check_linear_output(
    setting: str, layouts: Sequence[LayerLayout], *, norms: bool = False
) -> None:
    """Raises ValueError if the last output projection of a layer is not the last thing in it.

    Args:
        setting: the setting that solves for the projection, for the message.
        layouts: the layers.
        norms: whether norms may follow it.
    """
    for layout in layouts:
        follows, norm = "", layout.last.post_norm
        if norm and not norms:
            follows = f"norm follows it ({norm.module})"
        if layout.scale:
            follows = f"scale follows it ({layout.scale})"
        if layout.last.channel_gate:
            follows = f"gate multiplies its channels ({layout.last.channel_gate})"
        if follows:
            raise ValueError(
                f"{setting} solves for the last output projection of a layer, and in this model a "
                f"{follows}; choose merge.refit=ridge or none, without merge.refit.downstream"
            )


def check_drops(refit: Refit, method: Combination) -> None:
    """Raises ValueError if the method's operator is not a drop."""
    if not method.operator.drops:
        raise ValueError(
            f"merge.refit={refit.name} makes up for dropped layers, and merge.operator="
            f"{method.operator.name} drops none: choose merge.operator=drop"
        )


REFITS: Registry[Refit] = Registry("refit", "come.merge.refit", "merge.refit")
