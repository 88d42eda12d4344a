"""The tables of decoder types in docs/families.md: python -m tests.family_table writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from come.models.families import FAMILIES, REFUSED, layout_of
from come.models.layout import LayerLayout, Sublayer, SublayerKind
from tests.decoders import DECODERS, NOT_BUILT

FILE = Path(__file__).parents[1] / "docs" / "families.md"
UNITS = {
    "kv_group": "KV groups",
    "channel": "channels",
    "expert": "experts",
    "shared_channel": "shared channels",
    "group": "state space groups",
    "key_head": "key heads",
    "conv_channel": "convolution channels",
    "block": "recurrence blocks",
    "head": "recurrence heads",
}
HEAD = """# Decoder families

Every causal decoder type that transformers builds, and the units that `come` chooses from the
layers of a span. A **whole** mixer or MLP, or whole experts, are kept from one layer, because their
units are coupled; only their output projection is refitted, and not even that where each channel of
its output has a gate. Shared channels are those of an expert that every token reads; routed experts
are one unit if their router picks groups of them first. KV groups are key and value heads with the
query heads that read them, key heads those of linear attention with their value heads. Where layers
differ, in windows, experts or mixers, each is merged with others of its kind; `merge.kinds=first`
also merges layers that differ in their kind but not in their tensors. Some forms of a type are
refused, with the key of the configuration, such as Gemma 4 with inputs of its own for each layer or
shared keys and values (E2B, E4B), or with experts.

For every supported type, tests check on a small random model that the description reproduces each
layer, that a layer kept whole stays as it was, and that the model merged by `come` and `come_plus`
can be saved, loaded and used to generate. `python -m tests.family_table` makes these tables, and
[Add a family](extend.md#a-decoder-family) tells how to describe another type.
"""


def supported() -> list[str]:
    """The supported types, by name."""
    return sorted(name for name in DECODERS if name in FAMILIES)


def columns(model_type: str) -> tuple[str, str]:
    """The units of the sublayers that mix tokens, and of the others, of all layers of a type."""
    layouts = layout_of(DECODERS[model_type]()).layers
    mixers = listed(units(layout, "attention") for layout in layouts)
    others = listed(units(layout, "ffn") for layout in layouts)
    if any(len(layout.of("attention")) == 0 or len(layout.of("ffn")) == 0 for layout in layouts):
        return mixers, f"{others}; in layers of their own" if others else "none"
    same = all(layout.sublayers[0].stage == layout.last.stage for layout in layouts)
    return mixers, f"{others}, beside the mixer" if same else others


def listed(names: Iterable[str]) -> str:
    """Different names, each once."""
    return " or ".join(dict.fromkeys(name for name in names if name))


def units(layout: LayerLayout, kind: SublayerKind) -> str:
    """The units of the sublayers of one kind of a layer."""
    return " + ".join(describe(sublayer) for sublayer in layout.of(kind))


def describe(sublayer: Sublayer) -> str:
    """The units of one sublayer."""
    if not sublayer.opaque:
        return UNITS[sublayer.unit]
    if sublayer.joined:
        return "whole experts"
    return "whole mixer" if sublayer.kind == "attention" else "whole MLP"


def is_whole(model_type: str) -> bool:
    """Whether any sublayer of a type is kept as a whole."""
    layouts = layout_of(DECODERS[model_type]()).layers
    return any(sublayer.opaque for layout in layouts for sublayer in layout)


def page() -> str:
    """The page of documentation."""
    types, names = sorted({*DECODERS, *NOT_BUILT}), supported()
    refused = [name for name in types if name not in names]
    whole = sum(map(is_whole, names))
    counts = f"{len(names)} of {len(types)} types are supported, {whole} of them with a whole "
    lines = [HEAD, f"{counts}mixer, MLP or whole experts.", "", "| type | mixer | MLP |"]
    lines += ["|---|---|---|", *(f"| `{n}` | {' | '.join(columns(n))} |" for n in names)]
    lines += ["", "## Not supported", "", "| type | why |", "|---|---|"]
    lines += [f"| `{name}` | {REFUSED.get(name, 'not described yet')} |" for name in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page())
