"""The residual stream inside the merged layer, outside the model."""

from __future__ import annotations

from torch import Tensor, nn

from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.models.layout import LayerLayout, Sublayer
from come.models.sublayers import States, hidden_features, states_after


class InsideLayer:
    """What a sublayer of the merged layer reads and should add, batch by batch.

    Args:
        targets: reconstruction targets of the layer.
        layer: the merged layer, outside the model; read at every call.
        sublayer: the sublayer.
    """

    def __init__(
        self, targets: ReconstructionTargets, layer: nn.Module, sublayer: Sublayer
    ) -> None:
        self.targets = targets
        self.layer = layer
        self.sublayer = sublayer
        self._layout: LayerLayout = targets.layout

    def streams(self, batch: TargetBatch) -> tuple[States, States]:
        """The residual stream that the sublayer reads, and the one that its output is added to."""
        before = self._after(self._earlier, batch)
        if self.reads_sum:
            return before, before
        return self._after(self._layout.read_after(self.sublayer), batch), before

    @property
    def reads_sum(self) -> bool:
        """Whether the sublayer reads the stream that its output is added to."""
        return self._layout.read_after(self.sublayer) == self._earlier

    @property
    def _earlier(self) -> Sublayer | None:
        earlier = self._layout.before(self.sublayer)
        return earlier[-1] if earlier else None

    def features(self, batch: TargetBatch, read: States) -> Tensor:
        """The input of the sublayer's output projection, [batch, seq, width]."""
        keywords = self.targets.keywords(len(read))
        return hidden_features(self.layer, self._layout, self.sublayer, read, keywords)

    def _after(self, sublayer: Sublayer | None, batch: TargetBatch) -> States:
        if sublayer is None:
            return batch.states
        keywords = self.targets.keywords(len(batch.states))
        return states_after(self.layer, self._layout, sublayer, batch.states, keywords)
