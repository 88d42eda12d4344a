"""Describes a job's environment: versions of the packages, the code, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

import come
from come.files import package_hash

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
_GIT_SECONDS = 10  # a slow file system must not hold up a job


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that affect the numbers.

    "commit" is there only if the package runs from a git clone.
    """
    commit = code_commit(Path(come.__file__).parent)
    return {
        "python": platform.python_version(),
        "come": come.__version__,
        "code": package_hash()[:12],
        **({"commit": commit} if commit else {}),
        **{package: version(package) for package in _PACKAGES},
    }


@cache
def code_commit(folder: Path) -> str:
    """The git commit of the code in a folder: "1d810a9c0b5e", or "1d810a9c0b5e with changes".

    Changes are those of tracked files anywhere in the clone. The commit is for the report only:
    the hash of a job comes from the content of the code.

    Returns:
        "" if the folder is not tracked by git, or if git is missing or fails.
    """
    try:
        if not _git(folder, "ls-files", "__init__.py"):
            return ""  # an installed package inside some other clone
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit} with changes" if changes else commit


def _git(folder: Path, *words: str) -> str:
    """What a git command prints in a folder, without surrounding whitespace."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
    return ran.stdout.strip()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Describes the machine: "Linux x86_64, 2 cores, 24 GB of memory, NVIDIA H100, bfloat16"."""
    memory = psutil.virtual_memory().total / 1e9
    parts = [
        f"{platform.system()} {platform.machine()}",
        f"{os.cpu_count()} cores",
        f"{memory:.0f} GB of memory",
    ]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, str(dtype).removeprefix("torch.")])
