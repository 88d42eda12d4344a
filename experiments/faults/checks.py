"""What must hold after every fault: whole models under final names, and the same result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jobs import results

TIMES = ("seconds", "tokens_per_second", "peak_bytes", "boundary_bytes", "resumed_at",
         "layer_passes")  # fmt: skip
"""Keys of the cost: they depend on time and memory, and on which session did the work."""


def digest(folder: Path) -> dict[str, str]:
    """Hashes of everything that a finished run leaves: its result, and each file of its models."""
    found: dict[str, str] = {}
    for path in results(folder):
        result = json.loads(path.read_text())
        place = path.parent.relative_to(folder).as_posix()
        found[f"{place}/result"] = _hash(json.dumps(_timeless(result), sort_keys=True).encode())
        found[f"{place}/plan"] = result["plan"]
        for model in sorted(path.parent.glob("model*")):
            if model.suffix == ".partial" or not model.is_dir():
                continue
            for file in sorted(p for p in model.rglob("*") if p.is_file()):
                name = file.relative_to(folder).as_posix()
                data = file.read_bytes()
                if file.name == "plan.json":
                    data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
                found[name] = _hash(data)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def half_written(folder: Path) -> list[str]:
    """Whatever is incomplete below `folder` under a final name, in words."""
    from safetensors import safe_open

    wrong: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.endswith(".partial") for part in path.parts) or "printed" in path.parts:
            continue
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        file.get_tensor(key)
            except Exception as error:
                wrong.append(f"{name}: {error}")
        elif path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                wrong.append(f"{name}: {error}")
        elif path.is_dir() and path.name.startswith("model") and path.parent.name != "cache":
            wrong += [f"{name}: {line}" for line in _incomplete(path)]
    return wrong


def _incomplete(model: Path) -> list[str]:
    from come.merge.plan import Plan
    from come.models.checkpoint import check_checkpoint

    if model.name == "models":
        return []
    try:
        check_checkpoint(model)
        Plan.load(model / "come" / "plan.json")
    except Exception as error:
        return [str(error)]
    if not (model / "tokenizer.json").is_file():
        return ["no tokenizer"]
    return []


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that a finished run did not remove."""
    partial = [
        path
        for path in folder.rglob("*.partial")
        if not any(parent.suffix == ".partial" for parent in path.parents)
    ]
    found = [*partial, *folder.rglob("trial-layers-*")]
    return sorted(path.relative_to(folder).as_posix() for path in found)
