"""Compares the tensors of a checkpoint with its configuration; only file headers are read."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from come.errors import one_line
from come.models.checkpoint import FLOATS, tensor_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
_CONVERSION = re.compile(r"^(\S+) +\| \S*CONVERSION", re.MULTILINE)  # in transformers' report


def check_fit(folder: Path, model: PreTrainedModel, stack: str) -> None:
    """Checks that a checkpoint has exactly the tensors of its model, in floating-point numbers.

    transformers' own loader compares them, on the meta device, because it renames, splits and joins
    the tensors of many types. Where it loads weights, it initialises missing tensors at random,
    ignores unexpected ones, and converts integers to floating-point numbers.

    Args:
        folder: a checked checkpoint.
        model: its model, which may be on the meta device.
        stack: name of the list of decoder layers.

    Raises:
        ValueError: the tensors differ, or have integers or numbers of 8 bits.
    """
    shapes: dict[str, Tensor] = {}
    packed: dict[str, str] = {}
    for _, name, entry in tensor_headers(folder):
        shapes[name] = torch.empty(entry["shape"], device="meta")
        if entry["dtype"] not in FLOATS:
            packed[name] = entry["dtype"]
    dtypes = ", ".join(sorted(set(packed.values())))
    if found := _misfits(model, shapes):
        hint = f"; some are {dtypes}, as quantised weights are" if packed else ""
        remove = ", or remove the unexpected tensors" if found.keys() == {_KINDS[1]} else ""
        raise ValueError(
            f"{_listed(folder, found)}{_where(model, stack, found)}{hint}; take a checkpoint whose "
            f"weights and config.json belong together{remove}"
        )
    if not packed:
        return
    # Integers that the model does not need, such as masks in old checkpoints, are not missed.
    floats = {name: shape for name, shape in shapes.items() if name not in packed}
    own = model.state_dict()
    lost = [
        name
        for names in _misfits(model, floats).values()
        for name in sorted(names)
        if name not in own or own[name].is_floating_point()
    ]
    if lost:
        raise ValueError(
            f"model folder {folder}: weights are {dtypes}, as if they were quantised, and "
            f"config.json has no quantization_config: {_first(lost)}; take the unquantised model, "
            "or convert the weights with their scales to one of float32, bfloat16 and float16"
        )


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises ValueError if transformers' loader reports tensors that do not fit."""
    found = {kind: dict.fromkeys(map(str, info.get(kind) or ()), "") for kind in _KINDS}
    if any(found.values()):
        raise ValueError(_listed(folder, found))


def _misfits(model: PreTrainedModel, shapes: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """The tensors that do not fit, by kind and name, with their shapes in words."""
    with _silent() as reports:
        try:
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=shapes,
                dtype=model.dtype,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:  # tensors that the loader joins have different shapes
            names = _CONVERSION.findall("\n".join(reports))
            said = " (joined from several tensors, of different shapes)"
            return {_KINDS[2]: dict.fromkeys(names, said) or {one_line(error): ""}}
    found = {kind: dict.fromkeys(info.get(kind) or (), "") for kind in _KINDS[:2]}
    found[_KINDS[2]] = {
        name: f" {list(stored)} in place of {list(own)}" for name, stored, own in info[_KINDS[2]]
    }
    return {kind: names for kind, names in found.items() if names}


def _listed(folder: Path, found: Mapping[str, Mapping[str, str]]) -> str:
    kinds = [
        f"{kind.replace('_', ' ')}: {_first([n + said for n, said in sorted(names.items())])}"
        for kind, names in found.items()
        if names
    ]
    return f"model folder {folder}: its weights do not fit its configuration, {'; '.join(kinds)}"


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:3])} ({len(names)} in all)"


def _where(model: PreTrainedModel, stack: str, found: Mapping[str, Mapping[str, str]]) -> str:
    """The layers whose tensors do not fit, or how many layers there are; "" if it is not these."""
    described = len(list(model.get_submodule(stack).children()))
    own = Counter(_layer(name, stack) for name in model.state_dict())
    missing = Counter(_layer(name, stack) for name in found.get(_KINDS[0], ()))
    absent = [index for index in range(described) if missing[index] == own[index]]
    touched = {_layer(name, stack) for names in found.values() for name in names} - {-1}
    stored = max([described - len(absent), *(index + 1 for index in touched if index >= described)])
    if stored not in (0, described):
        return f"; config.json describes {described} layers, and the weights have {stored}"
    if stored and 0 < len(touched) < described:
        which, do = ", ".join(map(str, sorted(touched))), "does" if len(touched) == 1 else "do"
        return f"; of {described} layers, only {which} {do} not fit"
    return ""


def _layer(name: str, stack: str) -> int:
    """The index of the layer that a tensor belongs to; -1 for none."""
    index = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(index) if name.startswith(f"{stack}.") and index.isdigit() else -1


@contextmanager
def _silent() -> Iterator[list[str]]:
    """Keeps transformers from printing; yields the messages that it would have printed."""
    from transformers.utils import logging as printing

    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    library = logging.getLogger("transformers")
    handlers, propagate = library.handlers[:], library.propagate
    library.propagate = False  # with CI=true, transformers passes records to the root logger
    bars = printing.is_progress_bar_enabled()
    printing.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield messages
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
        library.propagate = propagate
        if bars:
            printing.enable_progress_bar()
