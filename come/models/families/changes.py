"""Changes of sublayers and models that several families share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from come.models.families.parts import Family, kv_groups
from come.models.layout import ModelLayout, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def per_head(config: PretrainedConfig, *names: str) -> tuple[Rows, ...]:
    """Parameters that hold one row for each query head."""
    _, queries, head_dim = kv_groups(config)
    return tuple(Rows(name, (queries // head_dim,), reads=False) for name in names)


def with_rows(sublayer: Sublayer, *rows: Rows) -> Sublayer:
    """A sublayer whose units have further rows."""
    return replace(sublayer, inputs=(*sublayer.inputs, *rows))


def opaque(sublayer: Sublayer, module: str) -> Sublayer:
    """A sublayer that is kept from one layer as a whole, with its module and norm."""
    modules = (module, sublayer.norm.module) if sublayer.norm else (module,)
    return replace(
        sublayer,
        unit="mixer" if sublayer.kind == "attention" else "ffn",
        count=1,
        columns=sublayer.width,
        inputs=tuple(Rows(name) for name in modules),
        shared=(),
        gates=(),
        opaque=True,
    )


def wrapped(family: Family, text_type: str, stack: str) -> Family:
    """The family of models that contain a text model of another family.

    Args:
        family: the family of the text model.
        text_type: the model type of the text model.
        stack: the module that corresponds to the text model's own "model".
    """

    def layout(config: PretrainedConfig) -> ModelLayout:
        text = config.get_text_config(decoder=True)
        if text.model_type != text_type:
            raise ValueError(
                f"model type {config.model_type!r} is described with a text model of type "
                f"{text_type}; text_config.model_type={text.model_type} is not supported"
            )
        own = family(text)
        layers, norm = (stack + name.removeprefix("model") for name in (own.stack, own.final_norm))
        return replace(own, stack=layers, final_norm=norm)

    return layout
