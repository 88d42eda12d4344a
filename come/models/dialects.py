"""Configuration files that transformers 4 and 5, and the tools built on either, read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from come.files import write_text
from come.models.companions import without_missing_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig


CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
TESTED_TRANSFORMERS = ("4.57", "5.23")
"""Versions that the tests load compressed models with."""

# What a configuration object has that no file should: its own path, the writer's version.
_OWN = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
_WEIGHTS = "transformers_weights"  # a name of the base's file, which the result's does not have
_OLD_PLAN = "come"  # an entry of earlier versions, which outlived fine-tuning of the weights
# Entries of rope_parameters that transformers 4 reads from the top of the file.
_ROPE_TOP = ("rope_theta", "partial_rotary_factor")


def derived_config(base: Path, config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """The base's `config.json` with what differs in `config`, and nothing else.

    Every reader then sees of the result what it sees of the base: keys that only some version
    knows, and defaults that versions disagree on, stay as the base has them.

    Args:
        base: folder of the base model.
        config: configuration of the model derived from it.
        folder: where the file will be; Python files that `auto_map` names must be in it.
    """
    from transformers import AutoConfig

    given: dict[str, Any] = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    before, after = _plain(AutoConfig.from_pretrained(base)), _plain(config)
    changed = {key: after[key] for key in after if after[key] != before.get(key)}
    for key in {*_OWN, _OLD_PLAN, _WEIGHTS}:
        changed.pop(key, None)
    given.pop(_OLD_PLAN, None)
    given.pop(_WEIGHTS, None)
    dtype = str(config.dtype).removeprefix("torch.")
    named = [key for key in ("dtype", "torch_dtype") if key in given] or ["dtype"]
    return without_missing_code(given | changed | dict.fromkeys(named, dtype), folder)


def both_dialects(config: dict[str, Any]) -> dict[str, Any]:
    """A model configuration with the keys of transformers 4 beside those of 5.

    `rope_parameters` becomes `rope_theta` and `rope_scaling` at the top, `dtype` also
    `torch_dtype`. Keys that are there already stay. Parameters by kind of layer (nested) have no
    form that all families of transformers 4 share, and are left as they are.
    """
    found = dict(config)
    if found.get("dtype"):
        found.setdefault("torch_dtype", found["dtype"])
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        for key in _ROPE_TOP:
            if key in rope:
                found.setdefault(key, rope[key])
        scaling = {key: value for key, value in rope.items() if key not in _ROPE_TOP}
        kind = scaling.get("rope_type", "default")
        found.setdefault("rope_scaling", None if kind == "default" else scaling)
    return found


def tokenizer_for_both(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer configuration without what transformers 4 cannot read.

    `TokenizersBackend` is what transformers 5 calls `PreTrainedTokenizerFast`, and still reads
    under that name; a list of `extra_special_tokens` was `additional_special_tokens`. All that
    transformers 4 may have written comes back as it is.
    """
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 wants names for these
        del found["extra_special_tokens"]
        found.setdefault("additional_special_tokens", extra)
    return found


def write_dialects(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Brings the configuration files of a folder into the form that both versions read.

    Args:
        folder: a model folder; a tokenizer configuration that needs no change is not touched.
        config: the model's configuration; that of the folder unless given.
    """
    path = folder / CONFIG
    config = config or json.loads(path.read_text(encoding="utf-8"))
    config.pop(_OLD_PLAN, None)
    write_text(path, json.dumps(both_dialects(config), indent=2, sort_keys=True) + "\n")
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        given = json.loads(path.read_text(encoding="utf-8"))
        found = without_missing_code(tokenizer_for_both(given), folder)
        if found != given:
            write_text(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values
