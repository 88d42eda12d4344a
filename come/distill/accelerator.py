"""Device, processes and precision of a training run, through accelerate."""

from __future__ import annotations

from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState


def make_accelerator(device: str, precision: str) -> Accelerator:
    """The accelerator of this process, which may be one of several launched together.

    Args:
        device: device type, "cpu" or "cuda".
        precision: "float32", or "bfloat16" for mixed precision.
    """
    AcceleratorState._reset_state()  # an earlier job of this process may use another precision
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
