"""Storage for the hidden states at layer boundaries, in memory or on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from come.files import PARTIAL
from come.stream.processes import SINGLE, Processes

Store = Literal["memory", "disk"]


class BoundaryStore(ABC):
    """Hidden states of all windows at every layer boundary, [windows, seq, hidden] each.

    Boundary i is the input of layer i. The last boundary is the output of the last layer. A slot
    is allocated on first access and reused after a merge.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._slots: list[Float[Tensor, "windows seq hidden"]] = []
        self._allocated = 0
        self._shared: set[int] = set()

    def __getitem__(self, index: int) -> Float[Tensor, "windows seq hidden"]:
        while index >= len(self._slots):
            self._slots.append(self._new())
        return self._slots[index]

    def writable(self, index: int) -> Float[Tensor, "windows seq hidden"]:
        """Slot `index` for writing; a new slot if a snapshot shares it."""
        if index in self._shared:
            self._shared.remove(index)
            self._slots[index] = self._new()
        return self[index]

    def snapshot(self, count: int) -> list[Float[Tensor, "windows seq hidden"]]:
        """The first `count` slots, which keep their values: later writes go to new slots."""
        self._shared = set(range(count))
        return [self[index] for index in range(count)]

    def _new(self) -> Tensor:
        self._allocated += 1
        return self._allocate(self._allocated - 1)

    @abstractmethod
    def _allocate(self, number: int) -> Float[Tensor, "windows seq hidden"]: ...

    def trim(self, count: int) -> None:
        """Frees all slots except the first `count`."""
        del self._slots[count:]
        self._shared = {index for index in self._shared if index < count}

    def close(self) -> None:
        """Frees all slots."""
        self._slots.clear()


class MemoryStore(BoundaryStore):
    """Boundaries in main memory (CPU tensors).

    Args:
        shape: (windows, seq, hidden).
        dtype: dtype of the states.
        pinned: whether to page-lock the memory, which a GPU reads faster. Memory beyond the
            system's limit is ordinary memory.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, pinned: bool = False
    ) -> None:
        super().__init__(shape, dtype)
        self._pinned = pinned

    def _allocate(self, number: int) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(self.shape, dtype=self.dtype, pin_memory=True)
            except RuntimeError:  # the system's limit on page-locked memory
                self._pinned = False
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class MappedStates:
    """Hidden states in a memory-mapped file, [windows, seq, hidden]."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def open(self) -> Float[Tensor, "windows seq hidden"]:
        """Maps the file as a tensor; writes to the tensor change the file."""
        size = torch.Size(self.shape).numel()
        flat = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        return flat.view(self.shape)


class DiskStore(BoundaryStore):
    """Boundaries in memory-mapped files, removed at `close`.

    Args:
        shape: (windows, seq, hidden).
        dtype: dtype of the states.
        folder: parent of the folder `NAME.partial`, which replaces the one left by a killed run;
            None for a temporary folder.
        name: name of that folder.
        processes: the processes that share the files. The first creates them, and all call the
            same methods in the same order.

    Raises:
        OSError: the disk is full; raised when a slot is allocated, not when it is written.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path | None = None,
        name: str = "boundaries",
        processes: Processes = SINGLE,
    ) -> None:
        super().__init__(shape, dtype)
        self._processes = processes
        made = self._make_folder(folder, name) if processes.is_main else Path()
        self._folder = processes.broadcast(made)

    def _make_folder(self, parent: Path | None, name: str) -> Path:
        if parent is None:
            return Path(tempfile.mkdtemp(prefix=f"{name}-"))
        number = f"-{self._processes.rank}" if self._processes.rank else ""
        folder = parent / f"{name}{number}{PARTIAL}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _allocate(self, number: int) -> Tensor:
        size = torch.Size(self.shape).numel()
        mapped = self.mapped(number)
        if self._processes.is_main:
            with open(mapped.path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size * self.dtype.itemsize)
        self._processes.barrier()
        states = mapped.open()
        self._processes.barrier()  # no process may remove the file until all have opened it
        return states

    def mapped(self, number: int) -> MappedStates:
        """The file of the slot allocated as number `number`, which another process can open."""
        return MappedStates(self._folder / f"{number}.bin", self.shape, self.dtype)

    def close(self) -> None:
        """Frees all slots and removes their files."""
        super().close()
        if self._processes.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)


def mapped_zeros(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    """Zeros, float32, in an unlinked memory-mapped file, which is freed with the tensor."""
    size = torch.Size(shape).numel()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=PARTIAL) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * size)
        return torch.from_file(file.name, shared=True, size=size).view(shape)


def check_store(kind: str) -> Store:
    """Raises ValueError unless `kind` is "memory" or "disk"."""
    for allowed in get_args(Store):
        if kind == allowed:
            return allowed
    raise ValueError(f"calibration.store={kind!r}: allowed are {', '.join(get_args(Store))}")


def make_store(
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    folder: Path | None = None,
    name: str = "boundaries",
    processes: Processes = SINGLE,
    *,
    pinned: bool = False,
) -> BoundaryStore:
    """Creates a store of the given kind; `name` must be unique among the stores in a folder.

    With several processes, the states are in shared files, whatever the kind.

    Raises:
        ValueError: `kind` is neither "memory" nor "disk".
    """
    if check_store(kind) == "memory" and processes.group is None:
        return MemoryStore(shape, dtype, pinned)
    return DiskStore(shape, dtype, folder, name, processes)
