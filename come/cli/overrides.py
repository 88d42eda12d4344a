"""Translates command-line overrides for Hydra: components of a method are config groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from come.evaluate.base import EVALUATIONS
from come.merge.method import PARTS
from come.registry import load_plugin
from come.renamed import RENAMED

_OPTIONS = "merge.options"  # held the settings of all components
_LISTED = ("eval.perplexity", "eval.speed")  # former switches that hold settings now


def register_parts() -> None:
    """Adds every registered component and evaluation as a choice of its config group.

    `merge/refit=ridge` chooses a component. `eval=NAME` chooses a plugin's evaluation, or for
    built-in ones a file in conf/eval, which takes its defaults from `eval/settings`.
    """
    store = ConfigStore.instance()
    for group, registry in PARTS.items():
        for name in registry.names():
            node = {"name": name, **registry.get(name).defaults()}
            store.store(group=f"merge/{group}", name=name, node=node)
    for name in EVALUATIONS.names():
        chosen = EVALUATIONS.get(name)
        if chosen.__module__.startswith("come."):
            store.store(group="eval/settings", name=name, node=chosen.defaults())
        else:
            store.store(group="eval", name=name, node=chosen.defaults(), package=f"eval.{name}")


def load_plugins(overrides: Sequence[str]) -> None:
    """Loads the files in `plugins=[...]`, so that their components are available as choices.

    Raises:
        ValueError: a file does not exist or raises an exception.
    """
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "plugins":
            for path in value.strip("[]").split(","):
                if path:
                    load_plugin(path.strip().strip("'\""))


def model_of_run(overrides: Sequence[str]) -> list[str]:
    """For `from_run=FOLDER` without a model, overrides with the model settings of that run."""
    keys = {override.lstrip("+").partition("=")[0].split(".")[0] for override in overrides}
    folder = next((o.partition("=")[2] for o in overrides if o.startswith("from_run=")), "")
    if not folder or "model" in keys:
        return []
    root = Path(folder.strip("'\"")).expanduser()
    for place in (root, root.parent):
        if (place / "resolved.yaml").is_file():
            model = yaml.safe_load((place / "resolved.yaml").read_text())["model"]
            return [f"model.{key}={_quoted(value)}" for key, value in model.items()]
    return []


def _quoted(value: Any) -> str:
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def as_groups(overrides: Sequence[str]) -> list[str]:
    """Rewrites `merge.refit=ridge` to `merge/refit=ridge`; other overrides are unchanged.

    Raises:
        ValueError: a setting has been renamed; the message has its new key.
    """
    return [_as_group(override) for override in overrides]


def renamed(key: str, value: Any = None) -> str | None:
    """Message for a former key or a former value of a key; None for any other setting.

    Args:
        key: the key, such as "merge.refit_lambda" or "merge/operator".
        value: its value; the keys of a mapping are looked up too.
    """
    key = key.lstrip("+~").replace("/", ".")
    assigned = f"{key}={value}"
    if assigned in RENAMED:
        return f"{assigned} is now {RENAMED[assigned]}"
    if key in RENAMED and not (key in _LISTED and isinstance(value, Mapping)):
        return f"{key} is now {RENAMED[key]}"
    if isinstance(value, Mapping):
        found = (renamed(f"{key}.{name}", item) for name, item in value.items())
        line = next((line for line in found if line is not None), None)
        if line is not None:
            return line
    if key == _OPTIONS:
        new = [f"{old} is {RENAMED[old]}" for old in RENAMED if old.startswith(f"{key}.")]
        return f"{key} is now settings of the method's components: {', '.join(new)}"
    if key.startswith(f"{_OPTIONS}."):
        name = key.removeprefix(f"{_OPTIONS}.")
        return f"{key} is now a setting of a component of the method, as in merge.refit.{name}"
    return None


def _as_group(override: str) -> str:
    key, equals, value = override.partition("=")
    plain = key.lstrip("+~")
    line = renamed(plain, value)
    if line is not None:
        shown = f"{plain}={value}: " if equals and not line.startswith(f"{plain}=") else ""
        raise ValueError(f"{shown}{line}")
    head, _, part = plain.partition(".")
    if equals and head == "merge" and part in PARTS:
        return f"merge/{part}={value}"
    return override
