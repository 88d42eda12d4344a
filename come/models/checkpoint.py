"""Finds a model's files, and checks and hashes them without loading the model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from come.errors import one_line
from come.files import cache_folder, file_hash, read_again, write_text
from come.models.companions import companions_hash
from come.models.packaged import PACKAGED

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point dtypes of weights that are not quantised, by their names in safetensors files."""

MOST_LAYERS = 10_000

_QUANTISED = ("quantization_config", "compression_config")  # the latter of old versions
_UNQUANTISE = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def find_checkpoint(
    path: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """The local folder of a model: the given folder, or a local copy of a hub repository.

    A hub repository is read from the local cache if it is there, and downloaded otherwise.
    Pickles are never downloaded.

    Args:
        path: folder, hub id, or "pypi:PACKAGE" for the model inside that package.
        revision: branch, tag or commit of the hub repository.
        trust_remote_code: whether to download the repository's code too.

    Raises:
        ValueError: the path is not set, the folder or repository does not exist, or there is no
            network. The message says what to do.
    """
    if not path:
        raise ValueError("model.path is not set: give a folder, model=local model.path=FOLDER")
    if path in PACKAGED:
        return PACKAGED[path].checkpoint()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ValueError(f"model.path={path}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    patterns += ["tokenizer.model*", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=[*patterns, "*.py"] if trust_remote_code else patterns,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {path!r} is neither a folder nor to be had from the hub ({one_line(error)}). "
            "With a copy on disk, set model.path=FOLDER"
        ) from error


def local_checkpoint(path: str | None, revision: str | None = None) -> Path | None:
    """The folder of a model that is on this machine; None if it must be downloaded or converted."""
    if not path:
        return None
    if path in PACKAGED:
        return PACKAGED[path].existing()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def describe_source(path: str | None) -> str:
    """What the weights at `model.path` are, if the path does not say so; else ""."""
    return PACKAGED[path].description if path in PACKAGED else ""


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks that a folder contains a complete safetensors checkpoint; reads file headers only.

    Returns:
        The content of config.json.

    Raises:
        ValueError: the configuration or a shard is missing, a file is damaged, there are only
            pickles or GGUF files, the weights are quantised, or there is an adapter that the loader
            would add to the model.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model folder {folder} holds an adapter (adapter_config.json), whose layers cannot be "
            "merged: put it into the weights first, with peft's "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
            ".save_pretrained(OTHER) and the tokenizer next to it, or move the adapter's files away"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model folder {folder} has GGUF files ({', '.join(ggufs[:3])}), and only safetensors "
            "are read: take the model that they were made from, or convert one with "
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, quantization_config="
            "GgufConfig(dequantize=True)).save_pretrained(OTHER), and its tokenizer"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder} has no config.json: not a Hugging Face checkpoint")
    try:
        config: Any = json.loads((folder / "config.json").read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"model folder {folder}: config.json cannot be read: {one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"model folder {folder}: config.json holds no configuration")  # noqa: TRY004
    _check_unquantised(folder, config)
    for path in weight_files(folder):
        if not path.is_file():
            raise ValueError(f"checkpoint is incomplete: {path} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint is truncated or damaged: {path} ({error}); copy it again"
            ) from error
    return config


def _check_unquantised(folder: Path, config: dict[str, Any], place: str = "config.json") -> None:
    for key, value in config.items():
        if key in _QUANTISED and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else None
            reader = _UNQUANTISE.get(str(method))
            convert = f", or write one with transformers' {reader}(dequantize=True)"
            raise ValueError(
                f"model folder {folder}: quantised weights cannot be merged ({place} has {key}, "
                f"quant_method={method}): take the unquantised model{convert if reader else ''}; "
                f"if the weights are not quantised, remove {key}"
            )
        if isinstance(value, dict):
            _check_unquantised(folder, value, f"{place}, in {key},")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded from a checkpoint, in order; shards may be missing.

    As in transformers, a single file takes precedence over an index of shards.

    Raises:
        ValueError: there are no safetensors files, or the index of shards cannot be read.
    """
    named = _named_weights(folder)
    single = folder / _inside(folder, named or "model.safetensors")
    if single.is_file() and single.suffix == ".safetensors":
        return [single]
    index = folder / (named or "model.safetensors.index.json")
    if index.is_file():
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
            names = [str(name) for name in shards]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(
                f"checkpoint is damaged: {index} cannot be read: {one_line(error)}"
            ) from error
        return [folder / _inside(folder, name) for name in sorted(set(names))]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"it has only pickles ({', '.join(pickles[:3])})" if pickles else "none are there"
    if others:
        found = f"{', '.join(others[:3])} are not model.safetensors, nor in an index of shards"
    raise ValueError(
        f"checkpoint {folder} has no safetensors weights: {found}. Pickles are neither read "
        "nor downloaded. Where you trust their source, convert once: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER), then "
        "model.path=FOLDER; many hub repositories also have a "
        "converted branch: model.revision=refs/pr/NUMBER"
    )


def _inside(folder: Path, name: str) -> str:
    """The name of a file of a checkpoint.

    Raises:
        ValueError: it leads out of the folder, where a checkpoint of a stranger has no business.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"model folder {folder} names weights outside of it: {name}")
    return name


def _named_weights(folder: Path) -> str | None:
    """The value of `transformers_weights`, a file name that takes precedence, or None."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    name = named.get("transformers_weights") if isinstance(named, dict) else None
    return name if isinstance(name, str) else None


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's configuration and all of its weights; equal for copies.

    The hash of a weights file is cached under the file's path, size, times and inode, so that an
    unchanged file is read once.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        digest.update(f"{path.name} {_cached_hash(path.resolve())}".encode())
    return digest.hexdigest()[:16]


def identity(folder: Path) -> str:
    """Hash of all files of a checkpoint that can change a result, including the tokenizer."""
    return f"{fingerprint(folder)} {companions_hash(folder)}"


def weights_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype of most of a checkpoint's bytes, read from the file headers."""
    sizes: dict[str, int] = {}
    for _, _, entry in tensor_headers(folder):
        if entry["dtype"] in FLOATS:
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return FLOATS[max(sizes, key=lambda name: sizes[name])] if sizes else torch.float32


def tensor_headers(folder: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every tensor of a checkpoint: its file, its name, and its dtype, shape and data offsets."""
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield path, name, entry


def stored_tensor(folder: Path, name: str) -> Tensor | None:
    """The first tensor of a checkpoint whose name is, or ends in, `name`; None if there is none."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key == name or key.endswith(f".{name}"):
                    return file.get_tensor(key)
    return None


def _cached_hash(path: Path) -> str:
    status = path.stat()
    # A copied file may keep its modification time, but its inode and change time differ.
    key = f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    known = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    hashed = read_again(known, Path.read_text)
    if hashed is not None and re.fullmatch("[0-9a-f]{16}", hashed):
        return hashed
    found = file_hash(path)
    known.parent.mkdir(parents=True, exist_ok=True)
    write_text(known, found)
    return found
