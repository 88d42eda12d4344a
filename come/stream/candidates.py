"""Candidate models, which share one sweep over the layers of the stream's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from come.models.loss import window_nll
from come.stream.stream import LayerStream, Route

TOGETHER = 4  # candidates that share a sweep over layers on disk
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A candidate model: the stream's model with some adjacent layers replaced.

    Attributes:
        start: the last boundary that it shares with the model.
        route: its own layers after that boundary; may be empty.
        rest: the model's layer that follows `route`; all later layers follow it.
        states: the states after `route`, batch by batch, if they are known.
    """

    start: int
    route: Route
    rest: int
    states: Sequence[Tensor] | None = None


def together(stream: LayerStream, candidates: Sequence[T], processes: int = 1) -> list[Sequence[T]]:
    """Groups of candidates that share a sweep; larger if layers are on disk.

    `processes`: number of processes that share a group, each with one candidate, or with four if
    layers are on disk.
    """
    size = processes * (TOGETHER if stream.adapter.on_disk is not None else 1)
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


@torch.no_grad()
def final_states(stream: LayerStream, candidates: Sequence[Candidate]) -> list[list[Tensor]]:
    """The states after the last layer of every candidate, batch by batch.

    Each of the model's own layers runs for all candidates before the next one.
    """
    found = [
        list(c.states or (after for _, after in stream.through(c.start, c.route)))
        for c in candidates
    ]
    for index in range(min(c.rest for c in candidates), stream.num_layers):
        for candidate, batches in zip(candidates, found, strict=True):
            if candidate.rest <= index:
                batches[:] = [stream.run(index, states) for states in batches]
    return found


@torch.no_grad()
def losses(stream: LayerStream, candidates: Sequence[Candidate]) -> list[float]:
    """Mean cross-entropy of every candidate, nats per predicted token."""
    adapter, found = stream.adapter, []
    for batches in final_states(stream, candidates):
        nll = []
        for rows, states in zip(stream.batches, batches, strict=True):
            ids = stream.windows[rows].to(states.device)
            nll.append(window_nll(adapter.head, adapter.final_norm(states), ids))
        found.append(torch.cat(nll).sum().item() / stream.predicted)
    return found
