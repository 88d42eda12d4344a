"""What a finished job does with its model: `export=gguf` and `hub.push`."""

from __future__ import annotations

from pathlib import Path

from come.export.gguf import find_converter, to_gguf
from come.export.hub import push
from come.files import RESULT

MODEL = "model"
"""The folder of a job's last model."""


def export_gguf(folder: str | Path, kind: str = "f16", converter: str | None = None) -> Path:
    """Writes `model-KIND.gguf` to the folder of a finished run.

    Args:
        folder: the run's folder.
        kind: weight format: f32, f16, bf16, q8_0 or auto.
        converter: llama.cpp's convert_hf_to_gguf.py or its folder; None for the one on the PATH.

    Returns:
        The file.

    Raises:
        ValueError: the run has not finished, or the conversion failed.
    """
    model = finished_model(Path(folder), "export=gguf")
    return to_gguf(model, model.parent / f"model-{kind}.gguf", kind, find_converter(converter))


def push_to_hub(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Uploads the model of a finished run, with its card, to the Hugging Face hub.

    Args:
        folder: the run's folder.
        repo: "USER/NAME"; it is created if it does not exist.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the run has not finished, or the repository may not be overwritten.
    """
    return push(finished_model(Path(folder), f"hub.push={repo}"), repo, private=private)


def finished_model(folder: Path, purpose: str) -> Path:
    """The folder of a finished run's last model.

    Raises:
        ValueError: the run has not finished, or has not kept its weights.
    """
    if not (folder / RESULT).is_file():
        raise ValueError(f"{purpose}: {folder} has no {RESULT}; it is not a finished run")
    model = folder / MODEL
    if not any(model.glob("model*.safetensors")):
        raise ValueError(
            f"{purpose}: {folder} has no model with weights; the run needs a merge and "
            "merge.save_weights=true"
        )
    return model
