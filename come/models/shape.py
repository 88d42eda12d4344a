"""The size of a model, determined without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from come.models.adapter import ModelAdapter
from come.models.layout import Block, LayerLayout, Unit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """The size of a model, determined without loading its weights.

    Attributes:
        config: the model's configuration.
        parameters: number of parameters of the model; tied parameters count once.
        block_parameters: number of parameters of one decoder layer, and of its sublayers of each
            kind, including their norms, on average.
        layer_parameters: number of parameters of every layer.
        dtype: dtype that the model is loaded in.
        heads: inputs of the output projections of the widest layer, without the last.
        channels: inputs of the last output projection of the widest layer.
        input_maps: number of input projections of one layer that a Gauss-Newton step can refit.
        unit_parameters: number of parameters of one FFN channel and one KV group of the first
            layer; 0 if it has none.
        layouts: the sublayers of every layer.
        begin_token: whether the family predicts well only after its begin token.
    """

    config: PretrainedConfig
    parameters: int
    block_parameters: dict[Block, int]
    layer_parameters: tuple[int, ...]
    dtype: torch.dtype
    heads: int
    channels: int
    input_maps: int
    unit_parameters: dict[Unit, int]
    layouts: tuple[LayerLayout, ...]
    begin_token: bool

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> ModelShape:
        """The shape of a model, also of one on the meta device."""
        adapter = ModelAdapter(model)
        widest = max(adapter.layout.layers, key=lambda each: sum(s.width for s in each))
        *others, last = widest
        return cls(
            model.config,
            sum(p.numel() for p in model.parameters()),
            adapter.block_parameters,
            tuple(sum(p.numel() for p in layer.parameters()) for layer in adapter.layers),
            dtype,
            heads=sum(sublayer.width for sublayer in others),
            channels=last.width,
            input_maps=len(last.gates),
            unit_parameters=adapter.unit_parameters,
            layouts=adapter.layout.layers,
            begin_token=adapter.layout.begin_token,
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.text_config.num_hidden_layers

    @property
    def text_config(self) -> PretrainedConfig:
        """The configuration of the decoder, which a model with other parts has inside its own."""
        return self.config.get_text_config(decoder=True)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.text_config.hidden_size

    @property
    def routed(self) -> bool:
        """Whether there are layers with experts."""
        return any(layout.routed for layout in self.layouts)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, as in the configuration."""
        return self.text_config.vocab_size

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence; None if the configuration does not limit them."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def weight_bytes(self) -> int:
        """Size of all weights in `dtype`, in bytes."""
        return self.parameters * self.dtype.itemsize
