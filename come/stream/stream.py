"""The layer stream: runs all calibration windows through one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.models.adapter import ModelAdapter
from come.models.layout import Block
from come.models.sublayers import run_layer, states_after
from come.progress import ProgressBar
from come.stream.boundaries import BoundaryStore, make_store, mapped_zeros
from come.stream.observer import LayerObserver, Meter
from come.stream.processes import SINGLE, Processes

Route = Sequence[tuple[int, nn.Module]]
"""Layers to run in sequence, each with the layer index whose keyword arguments it receives."""


class LayerStream:
    """Hidden states of all windows at every layer boundary of a model that is being merged.

    Boundary i is the input of layer i, so a span of layers a..b lies between boundaries a and
    b + 1. After a merge, only the boundaries after the merged layer's input are recomputed.

    Args:
        adapter: the model.
        windows: packed token windows without padding, [windows, seq] int64.
        batch_size: windows per batch.
        store: "memory", or "disk" for memory-mapped files.
        folder: folder for the files of the disk store; None for the system's temporary folder.
        progress: whether to show a progress bar.
        block: what a span consists of: whole layers, or only their sublayers of one kind. For
            "attention" and "ffn" the states after attention are stored too, which doubles the
            storage.
        name: name of the disk store's folder.
        meter: counts the layer passes of this process; a new one if None.
        processes: the processes that share the windows.

    Use it as a context manager: leaving the context frees the boundaries.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        windows: Int[Tensor, "windows seq"],
        *,
        batch_size: int = 4,
        store: str = "memory",
        folder: Path | None = None,
        progress: bool = True,
        block: Block = "layer",
        name: str = "boundaries",
        meter: Meter | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        self.adapter = adapter
        self.processes = processes
        self.block: Block = block
        self.windows = windows
        self.store = store
        self.progress = progress
        self.batch_size = batch_size
        self.folder = folder
        self.batches = [
            slice(start, min(start + batch_size, len(windows)))
            for start in range(0, len(windows), batch_size)
        ]
        shape, dtype = (*windows.shape, adapter.config.hidden_size), adapter.model.dtype
        pinned = adapter.device.type == "cuda"
        self._store = make_store(store, shape, dtype, folder, name, processes, pinned=pinned)
        self._middle: BoundaryStore | None = None  # states after attention, one slot a layer
        if block != "layer":
            self._middle = make_store(store, shape, dtype, folder, f"{name}-middle", processes)
        self._dense: list[Float[Tensor, "windows seq hidden"]] | None = None
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._meter = meter or Meter()
        self._valid = -1  # the last boundary that matches the current model

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._store.close()
        if self._middle:
            self._middle.close()
        self._dense = None

    @property
    def num_layers(self) -> int:
        """Number of layers of the current model."""
        return self.adapter.num_layers

    @property
    def tokens(self) -> int:
        """Total number of tokens in all windows."""
        return self.windows.numel()

    @property
    def predicted(self) -> int:
        """Number of predicted tokens: all but the first of each window. The loss is their mean."""
        return len(self.windows) * (self.windows.shape[1] - 1)

    @property
    def layer_passes(self) -> float:
        """Passes of all windows through one layer so far, by this process; forward only."""
        return self._meter.tokens / self.tokens

    @property
    def own_batches(self) -> Sequence[slice]:
        """The batches of this process's part of the windows; with one process, all."""
        return self.processes.shard(self.batches)

    @property
    def valid(self) -> int:
        """The last boundary that matches the current model; -1 before `embed`."""
        return self._valid

    def boundary(self, index: int, rows: slice) -> Float[Tensor, "batch seq hidden"]:
        """One batch of a boundary of the current model, on the model's device."""
        assert 0 <= index <= self._valid
        return self._store[index][rows].to(self.adapter.device)

    @property
    def has_dense(self) -> bool:
        """Whether the boundaries of the dense model are stored."""
        return self._dense is not None

    def snapshot_dense(self) -> None:
        """Keeps all boundaries as those of the dense model, without copying them."""
        assert self._valid == self.num_layers
        self._dense = self._store.snapshot(self.num_layers + 1)

    def dense(self, index: int, rows: slice) -> Float[Tensor, "batch seq hidden"]:
        """One batch of a boundary of the dense model, on the model's device."""
        assert self._dense is not None
        return self._dense[index][rows].to(self.adapter.device)

    def embed(self) -> None:
        """Computes boundary 0 and the keyword arguments of every layer."""
        first, own = self._store.writable(0), self.own_batches
        for rows in self.batches:
            if rows not in own and rows.stop - rows.start in self._kwargs:
                continue  # another process embeds it; its size's arguments are known
            states, kwargs = self.adapter.layer_inputs(self.windows[rows])
            self._kwargs[len(states)] = kwargs
            if rows in own:
                first[rows] = states
        self.processes.barrier()
        self._valid = 0

    @torch.no_grad()
    def advance(self, first: int, last: int, observer: LayerObserver | None = None) -> None:
        """Runs all windows through layers first..last, one layer at a time.

        Computes boundaries first + 1 .. last + 1. Boundary `first` must be valid. Each process
        runs its own windows, and the boundaries are complete when all have.
        """
        assert 0 <= first <= self._valid
        assert last < self.num_layers
        self.processes.barrier()  # others may still read what this overwrites
        own, middle = self.own_batches, self._middle
        total = (last - first + 1) * len(own)
        with ProgressBar(total=total, desc="layers", unit="batch", shown=self.progress) as bar:
            for index in range(first, last + 1):
                bar.set_postfix_str(f"layer {index + 1}/{self.num_layers}")
                following = self._store.writable(index + 1)
                if middle:
                    self._fill_middle(index, middle.writable(index))
                with observer.layer(index) if observer else nullcontext(_ignore) as update:
                    for rows in own:
                        before = self._store[index][rows].to(self.adapter.device)
                        after = self.run(index, before)
                        following[rows] = after
                        ends = self._ends(index, index, rows) if middle else (before, after)
                        update(*ends)
                        bar.update()
                self._valid = index + 1
        self.processes.barrier()

    def _fill_middle(self, index: int, middle: Float[Tensor, "windows seq hidden"]) -> None:
        """Computes the residual stream after the last sublayer of a layer that mixes tokens."""
        layout = self.adapter.layer_layout(index)
        last = layout.of("attention")[-1]
        for rows in self.own_batches:
            states = self._store[index][rows].to(self.adapter.device)
            layer, keywords = self.adapter.layer(index), self.keywords(len(states), index)
            middle[rows] = states_after(layer, layout, last, states, keywords)

    def span(
        self, first: int, last: int
    ) -> Iterator[tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"]]]:
        """Batches of (input, output) of the span of layers, attentions or MLPs first..last.

        For whole layers these are boundaries first and last + 1. A span of attentions ends at the
        state after its last attention; a span of MLPs starts at the state after attention of its
        first layer.
        """
        assert 0 <= first <= last < self._valid
        for rows in self.batches:
            yield self._ends(first, last, rows)

    def _ends(self, first: int, last: int, rows: slice) -> tuple[Tensor, Tensor]:
        start, end, middle = self._store[first], self._store[last + 1], self._middle
        start = middle[first] if middle and self.block == "ffn" else start
        end = middle[last] if middle and self.block == "attention" else end
        return start[rows].to(self.adapter.device), end[rows].to(self.adapter.device)

    def pairs(
        self, start: int, stop: int
    ) -> Iterator[tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"]]]:
        """Batches of (boundary `start`, boundary `stop`), in the model's dtype, on its device."""
        assert 0 <= start <= stop <= self._valid
        for rows in self.batches:
            yield self.boundary(start, rows), self.boundary(stop, rows)

    def keywords(self, batch: int, index: int) -> dict[str, Any]:
        """Keyword arguments of layer `index` for a batch of `batch` windows."""
        return self._kwargs[batch][index]

    def fork(
        self, windows: Int[Tensor, "windows seq"] | None = None, store: str | None = None
    ) -> LayerStream:
        """A second stream of the same model, with its own boundaries and whole layers as blocks.

        Its layer passes are added to this stream's count.

        Args:
            windows: the windows of the new stream; None for this stream's.
            store: the store of the new stream, "memory" or "disk"; None for this stream's.
        """
        return LayerStream(
            self.adapter,
            self.windows if windows is None else windows,
            batch_size=self.batch_size,
            store=store or self.store,
            folder=self.folder,
            progress=self.progress,
            name="fork",
            meter=self._meter,
            processes=self.processes,
        )

    def unshared(self) -> LayerStream:
        """A view of this stream for work that this process does alone."""
        view = copy(self)
        view.processes = self.processes.unshared
        return view

    def head(self, windows: int) -> LayerStream:
        """A view of this stream restricted to its first windows.

        The view shares the boundaries and is valid until they change. Only this stream may be
        closed.
        """
        assert windows > 0
        view = copy(self)
        view.windows = self.windows[:windows]
        view.batches = [
            slice(rows.start, min(rows.stop, windows))
            for rows in self.batches
            if rows.start < windows
        ]
        last = view.batches[-1]
        if last.stop - last.start not in self._kwargs:
            _, kwargs = self.adapter.layer_inputs(self.windows[last])
            self._kwargs[last.stop - last.start] = kwargs
        return view

    @contextmanager
    def scratch_boundary(self, name: str) -> Iterator[Float[Tensor, "windows seq hidden"]]:
        """An extra boundary in a store of the same kind, freed when the context exits.

        Each process writes and reads the rows of its own windows.
        """
        shape, dtype = self._store.shape, self._store.dtype
        store = make_store(self.store, shape, dtype, self.folder, name, self.processes)
        try:
            yield store[0]
        finally:
            store.close()

    def scratch(self, *shape: int) -> Tensor:
        """Zeros, float32, for this process only: in main memory, or in a file with a disk store."""
        if self.store == "memory":
            return torch.zeros(shape)
        return mapped_zeros(shape, self.folder)

    def route(self, first: int, last: int) -> list[tuple[int, nn.Module]]:
        """The model's own layers first..last as a route for `through`; may be empty."""
        return [(index, self.adapter.layers[index]) for index in range(first, last + 1)]

    def run(
        self,
        index: int,
        states: Float[Tensor, "batch seq hidden"],
        layer: nn.Module | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """One batch through layer `index` of the model, or through `layer` in its place."""
        self._meter.tokens += states.shape[:2].numel()
        layer = self.adapter.layer(index) if layer is None else layer
        return run_layer(layer, states, self.keywords(len(states), index))

    @torch.no_grad()
    def through(
        self, start: int, route: Route, batches: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "batch seq hidden"]]]:
        """Runs boundary `start` through a route of layers, batch by batch, storing nothing.

        Evaluates a candidate model: its route skips layers, or contains a layer that is not part
        of the model. `start` is the last boundary that the candidate shares with the model.

        Args:
            start: a valid boundary.
            route: the layers to run.
            batches: number of batches; None for all.

        Yields:
            The window indices of the batch, and the states after the last layer of the route.
        """
        assert 0 <= start <= self._valid
        chosen = self.batches[:batches]
        together = [chosen] if self.adapter.on_disk and len(route) > 1 else [[b] for b in chosen]
        for group in together:  # weights on disk are read once for all batches
            found = [self._store[start][rows].to(self.adapter.device) for rows in group]
            for index, layer in route:
                for number, states in enumerate(found):
                    found[number] = run_layer(layer, states, self.keywords(len(states), index))
                    self._meter.tokens += states.shape[:2].numel()
            yield from zip(group, found, strict=True)

    def merged(self, first: int, last: int, slot: int = 0) -> None:
        """Records that layers first..last were merged into one layer at index `first`.

        Boundary `first` stays valid. All later boundaries must be recomputed. The layer has the
        keyword arguments of layer first + slot.
        """
        for kwargs in self._kwargs.values():
            kwargs[first : last + 1] = [kwargs[first + slot]]
            assert len(kwargs) == self.num_layers
        self._store.trim(self.num_layers + 1)
        self._valid = first

    def invalidate_from(self, index: int) -> None:
        """Records that the weights of layer `index`, and possibly of later layers, have changed."""
        self._valid = min(self._valid, index)


def _ignore(before: Tensor, after: Tensor) -> None:
    """The update of a pass without an observer."""
