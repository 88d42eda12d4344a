"""Writes configuration files that transformers 4 and 5 read with the same meaning."""

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
"""Versions of transformers with which the tests load compressed models."""

# Attributes that are not copied from the configuration object to the file.
_OWN = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
_WEIGHTS = "transformers_weights"  # the base's weights file; the result does not have it
_OLD_PLAN = "come"  # written by earlier versions; stale once the weights are fine-tuned
# Entries of rope_parameters that are top-level keys in transformers 4.
_ROPE_TOP = ("rope_theta", "partial_rotary_factor")


def derived_config(base: Path, config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """The base model's `config.json`, updated with only the values that differ in `config`.

    Keys that only some versions of transformers know, and defaults on which versions disagree,
    stay as they are in the base, and so do names of kinds of layer. Every reader therefore treats
    the result like the base. If the base contains the model as its text model, only that part of
    its configuration is read.

    Args:
        base: folder of the base model.
        config: configuration of the model derived from it.
        folder: folder of the derived model; `auto_map` entries whose Python files are not in it
            are removed.
    """
    from transformers import AutoConfig

    given: dict[str, Any] = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    own = AutoConfig.from_pretrained(base)
    if own.model_type != config.model_type:  # the text model of a model with images, for example
        own, given = own.get_text_config(decoder=True), dict(given.get("text_config", {}))
    before, after = _plain(own), _plain(config)
    changed = {key: after[key] for key in after if after[key] != before.get(key)}
    if "per_layer_config" not in changed:  # transformers reads no older names beside it
        changed = {key: _as_named(changed[key], before.get(key), given.get(key)) for key in changed}
    for key in given.keys() - after.keys():  # keys that the configuration computes from others
        computed = getattr(own, key, None), getattr(config, key, None)
        if computed[0] == given[key] and computed[1] not in (None, given[key]):
            changed[key] = computed[1]
    for key in {*_OWN, _OLD_PLAN, _WEIGHTS}:
        changed.pop(key, None)
    given.pop(_OLD_PLAN, None)
    given.pop(_WEIGHTS, None)
    dtype = str(config.dtype).removeprefix("torch.")
    named = [key for key in ("dtype", "torch_dtype") if key in given] or ["dtype"]
    return without_missing_code(given | changed | dict.fromkeys(named, dtype), folder)


def _as_named(value: Any, before: Any, given: Any) -> Any:
    """A list of names with the base's own names, where this version of transformers has others."""
    lists = all(isinstance(one, list) for one in (value, before, given))
    if not lists or given == before or len(given) != len(before):
        return value
    own = {str(new): old for new, old in zip(before, given, strict=True)}
    return [own.get(str(entry), entry) for entry in value]


def both_dialects(config: dict[str, Any]) -> dict[str, Any]:
    """A model configuration with the keys of both transformers 4 and 5.

    `rope_theta`, `partial_rotary_factor` and `rope_scaling` are added from `rope_parameters`, and
    `torch_dtype` from `dtype`. Existing keys are not changed. Nested `rope_parameters` (per kind
    of layer) have no common form in transformers 4 and are not translated.
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
    """A tokenizer configuration that both transformers 4 and 5 can read.

    `TokenizersBackend` is the transformers 5 name of `PreTrainedTokenizerFast`, which it still
    accepts. A list of `extra_special_tokens` is `additional_special_tokens` in transformers 4. A
    configuration written by transformers 4 is returned unchanged.
    """
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 expects a dict
        del found["extra_special_tokens"]
        found.setdefault("additional_special_tokens", extra)
    return found


def write_dialects(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Rewrites the configuration files of a folder so that transformers 4 and 5 can read them.

    Args:
        folder: a model folder; its tokenizer configuration is only written if it changes.
        config: the model's configuration; None for that of the folder.
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
