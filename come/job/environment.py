"""Describes a job's environment: versions of the packages, the code, and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import psutil
import torch

import come
from come.files import package_hash

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that affect the numbers."""
    return {
        "python": platform.python_version(),
        "come": come.__version__,
        "code": package_hash()[:12],
        **{package: version(package) for package in _PACKAGES},
    }


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Description of the machine: "Linux x86_64, 2 cores, 24 GB of memory, NVIDIA H100, bfloat16".

    Args:
        device: where the model is.
        dtype: what it computes in.
    """
    memory = psutil.virtual_memory().total / 1e9
    parts = [
        f"{platform.system()} {platform.machine()}",
        f"{os.cpu_count()} cores",
        f"{memory:.0f} GB of memory",
    ]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, str(dtype).removeprefix("torch.")])
