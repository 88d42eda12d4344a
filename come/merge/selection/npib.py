"""MKA's similarity of two layers."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, SpanScore
from come.statistics.manifold import MIN_WINDOWS, diffusion_map, last_states, shared_information
from come.stream.stream import LayerStream


@SELECTION.register
class NPIB(SpanScore):
    """One minus the normalised pairwise information of the first and the last layer's outputs.

        1 - S(diffusion map of h_a, diffusion map of h_b)     for a span of layers a..b

    computed on the last token of each window.

    Source: arXiv 2406.16330 (MKA). As in the paper, the most similar layers are merged. Differs
    from its published code, which merges the last two layers regardless of their similarity.
    """

    name = "npib"
    paper = "2406.16330"
    min_windows = MIN_WINDOWS
    source = "MKA, normalised pairwise information bottleneck"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance, about [0, 1]."""
        one, other = (diffusion_map(last_states(stream, i + 1)) for i in (first, last))
        return 1 - shared_information(one, other)
