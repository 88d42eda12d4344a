"""LoRP: spreads dropped layers over clusters of similar layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.schedules.base import SCHEDULES, SetSchedule
from come.merge.search import Search
from come.setting import setting
from come.statistics.influence import TOKENS, check_tokens, chosen_tokens
from come.stream.stream import LayerStream

log = logging.getLogger(__name__)

_CHUNK = 64  # tokens whose states at all boundaries are multiplied at once, in float64
ALONE = -1.0  # redundancy of a layer without others to compare with, the least cosine


@SCHEDULES.register
@dataclass(eq=False)
class LoRP(SetSchedule):
    """Drops the most redundant layers, spread over clusters of similar layers.

        S_ij = mean_tokens cos(h_i, h_j),  h_i the input of layer i
        RLS  = -log2( mean_{i<j} S_ij ),   K = 2 if RLS >= 1, 3 if RLS >= 0.7, else 4

    The layers are clustered into K clusters by spectral clustering of the affinity (S + 1) / 2. In
    a cluster C, the layer with the largest mean_{j in C, j != i} S_ij goes first. First each
    cluster, in depth order, loses one layer; then always the cluster whose remaining layers have
    the largest mean similarity loses its next one.

    Source: arXiv 2605.27786 and its released code, for what the paper leaves open: S from the
    inputs of the layers, the first and the last layer protected (`merge.protect_first` and
    `merge.protect_last` in merge=lorp), and the order in a cluster not updated after a drop.
    Differs in that the mean over tokens is in float64, and that a mean similarity of at most 0,
    whose logarithm does not exist, counts as an infinite RLS.
    """

    name = "lorp"
    paper = "2605.27786"
    source = "LoRP, locality-aware redundancy pruning"
    reads_selection = False

    clusters: int | None = setting(
        None,
        "clusters of layers; null for the number that the locality score gives",
        kind=int,
        least=1,
        optional=True,
    )

    def removed(self, search: Search, count: int) -> list[tuple[int, float]]:
        """The layers with their mean cosine distance to the others of their cluster."""
        similar = similarity(search.stream, check_tokens(search.method.tokens))
        rls, depth = locality(similar), len(similar)
        number = min(self.clusters or num_clusters(rls), depth)
        members = clusters(similar, number)
        log.info("LoRP: locality score %.3f, %d clusters: %s", rls, number, members)
        free = range(search.rules.protect_first, depth - search.rules.protect_last)
        own = {layer: cluster for cluster in members for layer in cluster}
        return [
            (layer, 1 - redundancy(similar, layer, own[layer]))
            for layer in allocate(similar, members, free, count)
        ]


@torch.no_grad()
def similarity(stream: LayerStream, tokens: TOKENS) -> Float[Tensor, "layers layers"]:
    """Mean cosine between the inputs of all pairs of layers, float64, ones on the diagonal."""
    depth, count = stream.num_layers, 0
    sums = torch.zeros(depth + 1, depth, dtype=torch.float64)  # the last row counts tokens
    windows = [row for rows in stream.own_batches for row in range(rows.start, rows.stop)]
    for row in windows:  # window by window, so that the sums do not depend on the batch size
        states = [
            chosen_tokens(stream.boundary(index, slice(row, row + 1)), tokens)[0]
            for index in range(depth)
        ]
        for start in range(0, len(states[0]), _CHUNK):
            part = torch.stack([each[start : start + _CHUNK].double() for each in states])
            part = part / part.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            flat = part.flatten(1)
            sums[:depth] += (flat @ flat.T).cpu()
            count += part.shape[1]
    sums[depth] = count
    stream.processes.all_reduce(sums)
    found = sums[:depth] / sums[depth, 0]
    return ((found + found.T) / 2).fill_diagonal_(1.0)


def locality(similar: Float[Tensor, "layers layers"]) -> float:
    """RLS, the representation locality score; larger where only near layers are similar."""
    above = similar[tuple(torch.triu_indices(len(similar), len(similar), offset=1))]
    mean = above.mean().item()
    return -math.log2(mean) if mean > 0 else math.inf


def num_clusters(rls: float) -> int:
    """K, from the thresholds of the paper."""
    return 2 if rls >= 1 else 3 if rls >= 0.7 else 4


def clusters(similar: Float[Tensor, "layers layers"], number: int) -> list[list[int]]:
    """Spectral clusters of the layers, ascending, in the order of their first layers."""
    from sklearn.cluster import SpectralClustering  # takes a second to import

    if number == 1:
        return [list(range(len(similar)))]
    method = SpectralClustering(number, affinity="precomputed", random_state=0)
    labels = method.fit_predict(((similar + 1) / 2).numpy()).tolist()
    return [
        [layer for layer, label in enumerate(labels) if label == own]
        for own in dict.fromkeys(labels)
    ]


def redundancy(
    similar: Float[Tensor, "layers layers"], layer: int, cluster: Sequence[int]
) -> float:
    """Mean cosine of a layer with the others of its cluster, in [-1, 1]."""
    others = [other for other in cluster if other != layer]
    return similar[layer, others].mean().item() if others else ALONE


def allocate(
    similar: Float[Tensor, "layers layers"],
    members: Sequence[Sequence[int]],
    free: Sequence[int],
    count: int,
) -> list[int]:
    """The `count` layers to drop, in their order.

    Args:
        similar: mean cosines S of all pairs of layers.
        members: the layers of every cluster, in depth order of the clusters.
        free: the layers that may be dropped, at least `count`.
        count: number of layers to drop.
    """
    waiting = [
        sorted((i for i in own if i in free), key=lambda i: -redundancy(similar, i, own))
        for own in members
    ]
    dropped = [own.pop(0) for own in waiting if own][:count]

    def residual(cluster: int) -> float:
        left = [layer for layer in members[cluster] if layer not in dropped]
        if len(left) < 2:
            return ALONE
        total = similar[left][:, left].sum() - similar[left, left].sum()
        return total.item() / (len(left) * (len(left) - 1))

    while len(dropped) < count:
        open_clusters = [cluster for cluster, own in enumerate(waiting) if own]
        dropped.append(waiting[max(open_clusters, key=residual)].pop(0))
    return dropped
