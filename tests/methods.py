"""Helpers for tests of methods: recipes, and reference computations on the whole model."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml

from come.merge.method import PARTS, Method
from come.merge.selection.base import SELECTION, SpanScore
from come.merge.span import LayerSpan
from come.models.adapter import ModelAdapter
from tests.conftest import pico
from tests.reference import UNITS, Reference

SELECTED_FAMILIES = ["llama_mha", "llama_bias", "qwen3_gqa", "opt"]  # for slow tests
CONF = Path(__file__).parents[1] / "conf" / "merge"


def read_recipe(name: str) -> dict:
    """A recipe of conf/merge as a dictionary, with the names of its parts filled in."""
    data = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    parts = [entry for entry in data.pop("defaults") if entry != "_self_"]
    for ((key, part),) in (entry.items() for entry in parts):
        data[key] = {"name": part, **data.get(key, {})}
    return data


def build_method(base: dict, changes: dict) -> Method:
    """A method with changes; `refit__lambda` is a setting of one part, `shortlist` of any part."""
    data = {key: value for key, value in base.items() if key in Method.__dataclass_fields__}
    changes = changes | changes.pop("options", {})
    own = [key for key in changes if key in Method.__dataclass_fields__]
    for key in [*own, *(key for key in changes if key not in own)]:
        value = changes[key]
        value = _lists(value)
        if key in own:
            data[key] = value
            continue
        *parts, short = key.split("__")
        parts = parts or list(PARTS)
        for part in parts:
            chosen = data[part] if isinstance(data[part], dict) else {"name": data[part]}
            if short in PARTS[part].get(chosen["name"]).settings():
                data[part] = chosen | {short: value}
                break
        else:
            raise AssertionError(f"no chosen part has {key}")
    return Method(**data)


def _lists(value):
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def paper(**changes) -> Method:
    """The method of the CoMe paper, with changes."""
    return build_method(read_recipe("come"), changes)


def come_plus(**changes) -> Method:
    """The default method, with changes."""
    return build_method(read_recipe("come_plus"), changes)


def recipe(name: str, **changes) -> Method:
    """The method of a recipe in conf/merge, with changes."""
    if name in ("magnitude_plus", "taylor_plus"):
        changes = {"protect_first": 1, "protect_last": 1} | changes  # a pico model has six layers
    return build_method(read_recipe(name), changes)


def scorer(name: str, tokens: str) -> SpanScore:
    """A selection score that uses the given tokens ("all" or "last")."""
    score = SELECTION.create(name)
    score.tokens = tokens
    return score


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def decoder_layers(model):
    return model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers


def loss(model, windows):
    """Mean cross-entropy of a whole model, in its dtype."""
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())


def without(model, dropped):
    """A float64 copy of a model without some layers."""
    other = copy.deepcopy(model).double()
    layers = decoder_layers(other)
    kept = [layer for i, layer in enumerate(layers) if i not in dropped]
    del layers[:]
    layers.extend(kept)
    return other


def states(model, *indices):
    return [ModelAdapter(model).layer_state(i) for i in indices]


def sublayer_of(adapter, unit):
    """The sublayer of the model's layers that has these units."""
    return next(each for each in adapter.layer_layout(0) if each.unit == unit)


def span_of(stream, method, layers=(2, 3)):
    """A span of dense layers."""
    return LayerSpan(
        stream, layers, [[i] for i in layers], [], method.operator, "fold", method.refit,
        method.sensitivity,
    )  # fmt: skip


def output_names(model, part):
    adapter = ModelAdapter(model)
    return adapter.output_tensors(0, adapter.layer_layout(0).sublayer(part))


def dropped_layers(plan):
    """The original layers that a plan dropped, in the order of its steps."""
    own, removed = list(range(plan.base.num_layers)), []
    for step in plan.steps:
        kept_layer = step.kept_layer
        span = own[step.first : step.last + 1]
        removed += [layer for i, layer in enumerate(span) if i != kept_layer]
        own[step.first : step.last + 1] = [span[kept_layer]]
    return removed


def come_scores(windows, layers):
    reference = Reference(pico("llama_gqa"), windows)
    return {unit: [reference.sensitivity(i, unit) for i in layers] for unit in UNITS}


def plain_units(scores, shares):
    """Kept units for given shares, directly from the formula."""
    kept = {}
    for unit, layers in scores.items():
        total = len(layers[0])
        counts = [math.floor(total * share) for share in shares]
        biggest = shares.index(max(shares))
        counts[biggest] = total - sum(c for i, c in enumerate(counts) if i != biggest)
        kept[unit] = [
            sorted(sorted(range(total), key=lambda j, s=s: (-s[j], j))[:n])
            for s, n in zip(layers, counts)
        ]
    return kept


SPANS = [(0, 1), (2, 2), (1, 4), (4, 5)]


def slowly(names, quick):
    """Parameters of which only the quick ones are part of the fast tests."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]
