"""Checks the fields of a plan's JSON, which may come from a stranger, before they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from come.merge.norms import Norms
from come.models.checkpoint import MOST_LAYERS
from come.models.units import SUBLAYERS, Block

_TENSOR = re.compile(r"[\w.]+")  # of a layer; solved tensors are stored under names of the plan
_BOOKED: dict[str, type | tuple[type, ...]] = {
    "job": str,
    "method": str,
    "dtype": str,
    "changes": list,
    "recipe": dict,
    "versions": dict,
    "layer_passes": (int, float),
    "seconds": (int, float),
}
"""Entries of the provenance that are read, and their types; others may hold anything."""
_CALIBRATION: dict[str, type] = {"source": str, "tokens": int}
_TRAINED: dict[str, type] = {
    "method": str, "source": str, "tokens": int, "trained_parameters": int,
}  # fmt: skip


def check_fields(data: Mapping[str, Any], path: Path) -> None:
    """Checks types, ranges and sizes of all fields that determine weights or go into reports.

    Fields that are not decisions, such as scores of candidates, are checked by their types only.

    Args:
        data: the JSON object of the plan.
        path: its file, for the message.

    Raises:
        ValueError: a field is missing or is not what a plan holds; the message names it.
    """
    try:
        _check(data)
    except ValueError as error:
        raise ValueError(f"{invalid(path)}: {error}") from None


def invalid(path: Path) -> str:
    """How the message about an invalid field begins."""
    return f"merge.plan={path}: a field is missing or invalid"


def _check(data: Mapping[str, Any]) -> None:
    base = _object(data, "base")
    for name in ("name", "fingerprint", "model_type"):
        _typed(base, name, str, "base.")
    layers = _whole(base.get("num_layers"), "base.num_layers", 1, MOST_LAYERS)
    units = _object(base, "units", "base.")
    for unit, count in units.items():
        _whole(count, f"base.units.{unit}", 1, 10**9)
    _typed(data, "operator", str)
    _among(data.get("norms"), "norms", (*get_args(Norms), "none"))
    _among(data.get("block", "layer"), "block", get_args(Block))
    left = layers
    for number, step in enumerate(_list(data.get("steps"), "steps")):
        place = f"steps[{number}]"
        if not isinstance(step, dict):
            raise _wrong(place, "a step", step)
        left -= _check_step(step, f"{place}.", left, units)
    last = "finish" if "finish" in data else "downstream"
    for key, value in _object({last: {}, **data}, last).items():
        layer, slash, name = key.partition("/")
        if not (slash and layer.isascii() and layer.isdigit() and int(layer) < left):
            raise _wrong(f"{last}: {key!r}", f"LAYER/TENSOR with a layer below {left}", key)
        _hash(f"{last}: {key!r}", name, value)
    _check_dropped(data.get("dropped"), layers)
    _check_provenance(_object(data, "provenance"))


def _check_step(step: Mapping[str, Any], at: str, left: int, units: Mapping[str, int]) -> int:
    """Checks one step on `left` layers; returns the number of layers that it removes."""
    first = _whole(step.get("first"), f"{at}first", 0, left - 1)
    size = _whole(step.get("last"), f"{at}last", first, left - 1) - first + 1
    for name in ("spans", "shares"):
        if len(_list(step.get(name), at + name)) != size:
            raise _wrong(at + name, f"one entry for each of {size} layers", step[name])
    for span in step["spans"]:
        for layer in _list(span, f"{at}spans"):
            _whole(layer, f"{at}spans", 0, MOST_LAYERS)
    for name in ("shares", "bi"):
        for value in _list(step.get(name), at + name):
            _number(value, at + name)
    _number(step.get("score"), f"{at}score", finite=False)
    _number(step.get("output_scale", 1.0), f"{at}output_scale")
    kept_layer = step.get("kept_layer", step.get("keeper"))
    if kept_layer is not None:
        _whole(kept_layer, f"{at}kept_layer", 0, size - 1)
    _whole(step.get("slot", 0), f"{at}slot", 0, size - 1)
    for unit, kept in _object(step, "kept", at).items():
        _check_kept(kept, f"{at}kept.{unit}", size, units.get(unit, 0))
    for candidate in _list(step.get("candidates"), f"{at}candidates"):
        if not isinstance(candidate, dict) or set(candidate) != {"first", "last", "score"}:
            raise _wrong(f"{at}candidates", "spans with first, last and score", candidate)
        for value in candidate.values():
            _number(value, f"{at}candidates", finite=False)
    for span in _list(step.get("ruled_out", []), f"{at}ruled_out"):
        if len(_list(span, f"{at}ruled_out")) != 2:
            raise _wrong(f"{at}ruled_out", "the first and last layer of each span", span)
        for layer in span:
            _whole(layer, f"{at}ruled_out", 0, MOST_LAYERS)
    for name, value in _object({"solved": {}, **step}, "solved", at).items():
        _hash(f"{at}solved", name, value)
    return size - 1


def _check_kept(kept: Any, at: str, size: int, count: int) -> None:
    """Checks the kept units of a span: indices in order, together at most one layer's."""
    if len(_list(kept, at)) != size:
        raise _wrong(at, f"the units of each of {size} layers", kept)
    for own in kept:
        before = -1
        for unit in _list(own, at):
            before = _whole(unit, f"{at} (ascending)", before + 1, count - 1)
    total = sum(map(len, kept))
    if total > count or (size > 1 and 0 < total < count):
        raise _wrong(at, f"{count} units in all", total)


def _check_dropped(dropped: Any, layers: int) -> None:
    if dropped is None:
        return
    if not isinstance(dropped, dict):
        raise _wrong("dropped", "the dropped sublayers", dropped)
    _whole(dropped.get("depth"), "dropped.depth", 1, layers)
    for each in _list(dropped.get("sublayers"), "dropped.sublayers"):
        if not isinstance(each, dict):
            raise _wrong("dropped.sublayers", "sublayers", each)
        _whole(each.get("layer"), "dropped.sublayers: layer", 0, layers - 1)
        _among(each.get("kind"), "dropped.sublayers: kind", SUBLAYERS)
        _whole(each.get("parameters"), "dropped.sublayers: parameters", 0, 10**15)
        _number(each.get("cost"), "dropped.sublayers: cost", finite=False)


def _check_provenance(provenance: Mapping[str, Any]) -> None:
    for name, kind in _BOOKED.items():
        if name in provenance:
            _typed(provenance, name, kind, "provenance.")
    for change in provenance.get("changes", []):
        if not isinstance(change, str):
            raise _wrong("provenance.changes", "overrides", change)
    for name, needed in (("calibration", _CALIBRATION), ("distillation", _TRAINED)):
        if provenance.get(name) is None:
            continue
        entry = _object(provenance, name, "provenance.")
        for key, kind in needed.items():
            _typed(entry, key, kind, f"provenance.{name}.")


def _hash(at: str, name: str, value: Any) -> None:
    if not _TENSOR.fullmatch(name) or not isinstance(value, str):
        raise _wrong(at, "the name of a tensor and its hash", f"{name}: {value}")


def _object(data: Mapping[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise _wrong(prefix + name, "a JSON object", value)
    return value


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(at, "a list", value)
    return value


def _typed(
    data: Mapping[str, Any], name: str, kind: type | tuple[type, ...], prefix: str = ""
) -> None:
    value = data.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = [own.__name__ for own in (kind if isinstance(kind, tuple) else (kind,))]
        raise _wrong(prefix + name, " or ".join(names), value)


def _whole(value: Any, at: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(at, f"a whole number from {low} to {high}", value)
    return value


def _number(value: Any, at: str, *, finite: bool = True) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or (finite and not (abs(value) < 1e300 and math.isfinite(value))):
        raise _wrong(at, "a finite number" if finite else "a number", value)


def _among(value: Any, at: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(at, " or ".join(allowed), value)


def _wrong(at: str, wanted: str, value: Any) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]} ..."
    return ValueError(f"{at[:100]} must be {wanted}, and is {shown}")
