"""The table of decoder types in docs/families.md: python -m tests.family_table writes it."""

from __future__ import annotations

from pathlib import Path

from come.models.families import FAMILIES, REFUSED, layout_of
from come.models.layout import LayerLayout, Sublayer
from tests.decoders import DECODERS, NOT_BUILT

FILE = Path(__file__).parents[1] / "docs" / "families.md"
UNITS = {
    "kv_group": "KV groups",
    "channel": "channels",
    "expert": "experts",
    "shared_channel": "channels of the shared expert",
    "ssm_group": "SSM groups",
}
HEAD = """# Decoder families

Every causal decoder type that transformers builds, and what `come` merges of it. **Units**: the
units of all sublayers are chosen freely from all layers of a span. **Opaque mixer**: the sublayer
that mixes tokens is kept from one layer as a whole, because its units are coupled, and its output
projection is refitted; the other units are chosen freely. Layers of different kinds (windows,
dense or sparse, attention or recurrence) are merged with their own kind; `merge.kinds=first` also
merges layers that differ in their kind but not in their tensors.

For every supported type, tests check on a small random model that the description reproduces each
layer, that a layer kept whole stays as it was, and that the model merged by `come` and `come_plus`
can be saved, loaded and used to generate. `python -m tests.family_table` makes this table.
"""


def supported() -> list[str]:
    """The supported types, by name."""
    return sorted(name for name in DECODERS if name in FAMILIES)


def status(model_type: str) -> tuple[str, str]:
    """How a type is supported, and the units of its layers or the reason against it."""
    if model_type in NOT_BUILT:
        return "not built", NOT_BUILT[model_type]
    if model_type not in FAMILIES:
        return "refused", REFUSED.get(model_type, "not described yet")
    try:
        layouts = layout_of(DECODERS[model_type]()).layers
    except ValueError as error:
        return "some forms", str(error)
    described = list(dict.fromkeys(describe(layout) for layout in layouts))
    opaque = any(sublayer.opaque for layout in layouts for sublayer in layout)
    return "opaque mixer" if opaque else "units", " or ".join(described)


def describe(layout: LayerLayout) -> str:
    """The units of one layer, sublayer by sublayer."""
    stages: dict[int, list[str]] = {}
    for sublayer in layout:
        stages.setdefault(sublayer.stage, []).append(describe_sublayer(sublayer))
    return ", then ".join(" beside ".join(names) for names in stages.values())


def describe_sublayer(sublayer: Sublayer) -> str:
    """The units of one sublayer."""
    name = UNITS.get(sublayer.unit, sublayer.unit.replace("_", " "))
    if sublayer.opaque:
        name = "mixer as a whole" if sublayer.kind == "attention" else "MLP as a whole"
    return f"{name} (norm after)" if sublayer.post_norm else name


def page() -> str:
    """The page of documentation."""
    types = sorted({*DECODERS, *NOT_BUILT})
    rows = [(name, *status(name)) for name in types]
    counts = {kind: sum(row[1] == kind for row in rows) for kind in ("units", "opaque mixer")}
    lines = [HEAD, f"{sum(counts.values())} of {len(types)} types are supported: "]
    lines[-1] += ", ".join(f"{number} with {kind}" for kind, number in counts.items()) + "."
    lines += ["", "| type | | units, or why not |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {about} |" for name, kind, about in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page())
