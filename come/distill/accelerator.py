"""Device, processes and precision of a training, by accelerate."""

from __future__ import annotations

from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Device, processes and precision of this process: alone, or one of several launched together.

    Args:
        device: kind of device, "cpu" or "cuda".
        precision: "float32", or "bfloat16" for mixed precision.
    """
    AcceleratorState._reset_state()  # an earlier job of this process may have had another precision
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
