"""The other files of a checkpoint: tokenizer, chat templates, generation config, licence, code."""

from __future__ import annotations

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from come.files import file_hash

TOKENIZER = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "spiece.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "processor_config.json",
    "preprocessor_config.json",
)
GENERATION = "generation_config.json"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")
_CODE = "auto_map"  # configuration key that names Python files of the repository


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a tokenizer may be loaded from, relative to `folder`, sorted."""
    return _matching(folder, TOKENIZER)


def companion_files(folder: Path) -> list[Path]:
    """All files that a copy of a checkpoint needs in addition to weights and configuration.

    These are the tokenizer, chat templates, generation configuration, licence, and the
    repository's Python files if a configuration names any; relative to `folder`, sorted.
    """
    patterns = [*TOKENIZER, GENERATION, *LICENCES]
    if _names_code(folder / "config.json") or _names_code(folder / "tokenizer_config.json"):
        patterns.append("*.py")
    return _matching(folder, patterns)


def companions_hash(folder: Path) -> str:
    """Hash of the names and contents of all companion files except licences; equal for copies."""
    digest = hashlib.sha256()
    licences = _matching(folder, LICENCES)
    for name in (name for name in companion_files(folder) if name not in licences):
        digest.update(f"{name.as_posix()} {file_hash(folder / name)}\n".encode())
    return digest.hexdigest()[:16]


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the companion files byte for byte.

    A `generation_config.json` in `folder` is removed if the source has none, so that both models
    get the same default generation settings.
    """
    (folder / GENERATION).unlink(missing_ok=True)
    for name in companion_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def without_missing_code(values: dict[str, object], folder: Path) -> dict[str, object]:
    """A configuration without the `auto_map` entries whose Python files are not in `folder`.

    Entries of the form "USER/NAME--module.Class" name another repository and are kept.
    """
    entries = values.get(_CODE)
    if not isinstance(entries, dict):
        return values
    kept = {key: value for key, value in entries.items() if _exists(value, folder)}
    rest = {key: value for key, value in values.items() if key != _CODE}
    return rest | ({_CODE: kept} if kept else {})


def _exists(reference: object, folder: Path) -> bool:
    names = reference if isinstance(reference, list) else [reference]
    modules = [str(name).rpartition(".")[0] for name in names if name]
    return all("--" in module or (folder / f"{module}.py").is_file() for module in modules)


def _names_code(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get(_CODE))
    except (OSError, ValueError, AttributeError):
        return False


def _matching(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    """Files in `folder` and its subfolders that match a pattern, one level deep; no weights."""
    found = [path.relative_to(folder) for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return sorted(
        name
        for name in found
        if name.suffix not in _WEIGHTS
        and any(
            fnmatch(name.as_posix(), pattern) and name.as_posix().count("/") == pattern.count("/")
            for pattern in patterns
        )
        and (folder / name).is_file()
    )
