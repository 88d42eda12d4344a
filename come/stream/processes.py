"""The processes that share the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 26  # numbers that are exchanged at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a job on one machine; by default this one alone.

    All of them run the same code. Each takes a part of the windows, or of the trial merges. Sums
    over all windows are added up with `add_up`, so every process continues with the same numbers.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        group: the process group; None for a single process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def launched(cls) -> Processes:
        """Those that `accelerate launch` or torchrun has started; called once by each of them.

        They exchange tensors in main memory (gloo), so a GPU of each kind serves.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def alone(self) -> Processes:
        """This process without the others, under its number."""
        return replace(self, count=1, group=None)

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: adjacent ones, in the order of the processes."""
        if self.group is None:
            return items
        size = len(items)
        return items[self.rank * size // self.count : (self.rank + 1) * size // self.count]

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by the sum of those of all processes."""
        if self.group is None:
            return
        for tensor in tensors:
            row = max(1, tensor[0].numel()) if tensor.dim() and len(tensor) else 1
            for part in tensor.split(max(1, CHUNK // row)) if tensor.dim() else [tensor]:
                moved = part.cpu().contiguous()
                dist.all_reduce(moved, group=self.group)
                if moved is not part:
                    part.copy_(moved)

    def total(self, value: float) -> float:
        """The sum of the numbers of all processes."""
        found = torch.tensor([value], dtype=torch.float64)
        self.add_up(found)
        return found.item()

    def dealt(
        self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[float]]
    ) -> list[float]:
        """A number for each item, in order; each process makes those of every n-th item."""
        if self.group is None or not items:
            return list(do(items)) if items else []
        found = torch.zeros(len(items), dtype=torch.float64)
        if mine := items[self.rank :: self.count]:
            found[self.rank :: self.count] = torch.tensor(do(mine), dtype=torch.float64)
        self.add_up(found)
        return found.tolist()

    def first(self, value: T) -> T:
        """The first process's value."""
        if self.group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def agree(self, value: object) -> bool:
        """Whether all processes have the same value as the first one."""
        return self.total(self.first(value) == value) == self.count

    def wait(self) -> None:
        """Waits for the others."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = Processes()
"""A single process."""
