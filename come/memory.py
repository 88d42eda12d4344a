"""Peak memory of a block of code."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType

import psutil
import torch

_MMAP_THRESHOLD = -3  # number of the option in glibc's malloc.h
_INTERVAL = 0.02  # seconds between samples


def return_freed_memory() -> None:
    """Lets glibc return every freed block of 4 MB or more to the system at once.

    By default this threshold grows to 32 MB, and smaller free blocks stay resident between blocks
    in use, so peaks depend on the history of allocations.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 4 << 20)


def trim_heap() -> None:
    """Returns the free pages between blocks in use to the system, with glibc.

    Sampling text leaves many of them, because the KV cache grows with every token.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from other libraries
        if malloc_trim is not None:
            malloc_trim(0)


class PeakMemory:
    """Context manager that measures the peak memory above the level at entry, in bytes.

    On the CPU, a thread samples the resident set size of this process 50 times a second. On CUDA,
    the peak is that of PyTorch's caching allocator.

    Attributes:
        peak: peak memory above the level at entry, in bytes; valid after exit.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = 0
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._start = torch.cuda.memory_allocated(self._cuda)
        else:
            self._start = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cuda is not None:
            self.peak = torch.cuda.max_memory_allocated(self._cuda) - self._start
        else:
            self._stop.set()
            self._thread.join()
            self._update()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._update()

    def _update(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss - self._start)
