"""The processes that share the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 26  # numbers exchanged at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a job on one machine; by default a single one.

    All of them run the same code, on parts of the windows or of the trial merges. Sums over the
    windows go through `all_reduce` and decisions through `broadcast`, so all continue with the same
    numbers.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        group: the process group; None for a single process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def launched(cls) -> Processes:
        """The processes started by `accelerate launch` or torchrun; each calls this once.

        Tensors are exchanged in main memory (gloo), whatever the device.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def unshared(self) -> Processes:
        """This process alone, with its rank."""
        return replace(self, count=1, group=None)

    @property
    def is_main(self) -> bool:
        """Whether this process creates shared files: the first one, or one alone."""
        return self.rank == 0 or self.group is None

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: adjacent items, in order of rank."""
        if self.group is None:
            return items
        size = len(items)
        return items[self.rank * size // self.count : (self.rank + 1) * size // self.count]

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.group is None:
            return
        for tensor in tensors:
            row = max(1, tensor[:1].numel())
            for part in tensor.split(max(1, CHUNK // row)):
                moved = part.cpu().contiguous()
                dist.all_reduce(moved, group=self.group)
                if moved is not part:
                    part.copy_(moved)

    def reduced(self, value: int | float) -> float:
        """The sum of a number over all processes."""
        found = torch.tensor([value], dtype=torch.float64)
        self.all_reduce(found)
        return found.item()

    def map(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[float]]) -> list[float]:
        """A number for each item, in order; item i is computed by process i mod count."""
        if self.group is None or not items:
            return list(do(items)) if items else []
        found = torch.zeros(len(items), dtype=torch.float64)
        if mine := items[self.rank :: self.count]:
            found[self.rank :: self.count] = torch.tensor(do(mine), dtype=torch.float64)
        self.all_reduce(found)
        return found.tolist()

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        if self.group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Waits for all other processes."""
        if self.group is not None:
            dist.barrier(group=self.group)


SINGLE = Processes()
"""A single process."""
