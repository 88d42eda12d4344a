"""Translates command-line overrides for Hydra: components of a method are config groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from come.evaluate.base import EVALUATIONS
from come.merge.method import PARTS
from come.registry import load_plugin
from come.renamed import RENAMED


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


def _as_group(override: str) -> str:
    key, equals, value = override.partition("=")
    plain = key.lstrip("+~")
    if override in RENAMED:
        raise ValueError(f"{override} is now {RENAMED[override]}")
    if equals and plain in RENAMED:
        raise ValueError(f"{plain}={value}: {plain} is now {RENAMED[plain]}")
    head, _, part = plain.partition(".")
    if equals and head == "merge" and part in PARTS:
        return f"merge/{part}={value}"
    return override
