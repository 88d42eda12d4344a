"""GGUF files by llama.cpp's converter, which reads the model folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

log = logging.getLogger(__name__)

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""Weight formats that the converter writes. llama.cpp's `llama-quantize` makes others from them."""


def find_converter(given: str | None) -> Path:
    """The converter's script.

    Args:
        given: the script, or a folder of llama.cpp that contains it; None for the one on the PATH.

    Raises:
        ValueError: it is not there.
    """
    if given is None:
        found = shutil.which(SCRIPT)
        path = Path(found) if found else None
    else:
        path = Path(given).expanduser()
        path = path / SCRIPT if path.is_dir() else path
    if path is None or not path.is_file():
        where = "on the PATH" if given is None else f"at export.converter={given}"
        raise ValueError(
            f"export=gguf: {SCRIPT} is not {where}. It is part of llama.cpp and of the source "
            "distribution of llama-cpp-python; give its folder with export.converter=FOLDER"
        )
    return path.resolve()


def to_gguf(model: Path, path: Path, kind: str, converter: Path) -> Path:
    """Converts a model folder to a GGUF file, which gets its name once it is complete.

    Args:
        model: the model folder.
        path: the file to write; an existing one is replaced.
        kind: weight format, one of `TYPES`.
        converter: the converter's script.

    Returns:
        `path`.

    Raises:
        ValueError: the converter failed; the message ends with its last line.
    """
    partial = path.with_suffix(".partial")
    words = [sys.executable, str(converter), str(model), "--outfile", str(partial)]
    words += ["--outtype", kind]
    log.info("export: %s", path)
    done = subprocess.run(
        words, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode or not partial.is_file():
        partial.unlink(missing_ok=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise ValueError(f"export=gguf: {converter.name} failed: {last}")
    return partial.replace(path)
