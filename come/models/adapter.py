"""The model adapter: the only interface through which algorithms access a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.models.families import layout_of, prepare
from come.models.head import Head
from come.models.layer_state import LayerState, changed
from come.models.layout import SUBLAYERS, Block, LayerLayout, ModelLayout, Role, Sublayer, Unit
from come.models.recording import recording
from come.models.surgery import (
    check_layer_config,
    check_removal,
    needed_layers,
    needs_last,
    remove_layers,
)
from come.models.weights import LayersOnDisk, layers_on_disk
from come.models.width import SETTERS, record_sizes, resize, with_units

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelAdapter:
    """A causal language model of a supported family, as a stack of layers that consist of units.

    Raises:
        ValueError: the family, a variant of it, or a tensor of its layers is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._layout = layout_of(model.config)
        prepare(model)
        check_layer_config(self.config)
        self._roles: dict[LayerLayout, dict[str, Role]] = {}
        for layer, layout in zip(self.layers, self._layout.layers, strict=True):
            if layout not in self._roles:
                self._roles[layout] = layout.roles(layer.state_dict())

    @property
    def config(self) -> PretrainedConfig:
        """The model's own configuration, of its text model if it has others."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, from first to last."""
        layers = self.model.get_submodule(self._layout.stack)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def layout(self) -> ModelLayout:
        """The layout of the current model."""
        if len(self._layout.layers) != self.num_layers:
            self._layout = layout_of(self.model.config)
        return self._layout

    def layer_layout(self, index: int) -> LayerLayout:
        """The sublayers of layer `index`."""
        return self.layout.layers[index]

    @property
    def needed_layers(self) -> tuple[bool, ...]:
        """By layer, whether it is of the kind of which one must be left; empty if there is none."""
        return needed_layers(self.config)

    @property
    def needs_last(self) -> bool:
        """Whether the last layer must be of that kind."""
        return needs_last(self.config)

    def roles(self, index: int = 0) -> dict[str, Role]:
        """The role of every tensor of layer `index`."""
        return self._roles[self.layer_layout(index)]

    @property
    def on_disk(self) -> LayersOnDisk | None:
        """The loader of the layers if their weights are on disk; None if they are in memory."""
        return layers_on_disk(self.model)

    def layer(self, index: int) -> nn.Module:
        """Layer `index` with its weights; those on disk stay loaded until another layer is."""
        layer = self.layers[index]
        if self.on_disk is not None:
            self.on_disk.load(layer)
        return layer

    def release(self) -> None:
        """Frees the loaded layer if the weights are on disk."""
        if self.on_disk is not None:
            self.on_disk.free()

    @property
    def num_layers(self) -> int:
        """Current number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, and so of the hidden states."""
        return self.model.get_input_embeddings().weight.device

    @property
    def unit_counts(self) -> dict[Unit, int]:
        """Number of units of a layer, by kind, of all kinds in the model."""
        return {unit: n for layer in self.layout.layers for unit, n in layer.unit_counts.items()}

    def layer_state(self, index: int) -> LayerState:
        """The tensors of layer `index`, without copying them; those on disk are read on access."""
        layer = self.layers[index]
        return dict(layer.state_dict()) if self.on_disk is None else self.on_disk.state(layer)

    def scale(self, index: int) -> Tensor | None:
        """The number that multiplies the output of layer `index`, in one element; None for none."""
        name = self.layer_layout(index).scale
        return self.layer_state(index)[name] if name else None

    def output_map(self, index: int, sublayer: Sublayer) -> nn.Module:
        """The output projection of a sublayer, whose input channels are the units' outputs."""
        return self.layer(index).get_submodule(sublayer.output)

    def output_weight(self, index: int, sublayer: Sublayer) -> Float[Tensor, "out in"]:
        """The weight of the output projection of a sublayer, without its gradient."""
        layer = self.layer(index)
        return sublayer.output_weight(
            {name: layer.get_parameter(name) for name in sublayer.weights}
        )

    def output_tensors(self, index: int, *sublayers: Sublayer) -> list[str]:
        """Names of the output projections' weights and biases, of all if none is given."""
        chosen = sublayers or self.layer_layout(index)
        names = {name for each in chosen for name in (*each.weights, each.bias)}
        return [name for name in self.roles(index) if name in names]

    @property
    def block_parameters(self) -> dict[Block, int]:
        """Parameters of a layer, and of its sublayers of each kind with their norms, on average."""
        blocks: tuple[Block, ...] = ("layer", *SUBLAYERS)
        found = {
            block: sum(self.block_size(index, block) for index in range(self.num_layers))
            for block in blocks
        }
        return {block: total // self.num_layers for block, total in found.items()}

    def block_size(self, index: int, block: Block) -> int:
        """Parameters of a block of layer `index`, its norms included."""
        sizes = {name: p.numel() for name, p in self.layers[index].named_parameters()}
        return sum(sizes.get(name, 0) for name in self.block_tensors(index, block))

    @property
    def unit_parameters(self) -> dict[Unit, int]:
        """Parameters of one FFN channel and one KV group of the first layer; 0 if it has none."""
        tensors, found = dict(self.layers[0].named_parameters()), dict.fromkeys(SETTERS, 0)
        for name, role in self.roles().items():
            if role.unit in found:
                found[role.unit] += tensors[name].numel() // self.unit_counts[role.unit]
        return found

    def block_tensors(self, index: int, block: Block) -> list[str]:
        """Names of the tensors of layer `index` that belong to a block, including its norms."""
        own = {sublayer.name for sublayer in self.layer_layout(index).of(block)}
        return [name for name, role in self.roles(index).items() if role.sublayer in own]

    def linear_weights(self, index: int, block: Block = "layer") -> list[Tensor]:
        """The weights of all linear maps of a block of layer `index`; of experts, side by side."""
        tensors = dict(self.layer(index).named_parameters())
        own = (tensors[name] for name in self.block_tensors(index, block) if name in tensors)
        return [tensor for tensor in own if tensor.dim() >= 2]

    def zeroed(self, index: int, block: Block) -> LayerState:
        """The tensors of layer `index`, changed so that a block adds 0 to the residual stream."""
        state = self.layer_state(index)
        silenced = self.output_tensors(index, *self.layer_layout(index).of(block))
        return {**state, **{name: torch.zeros_like(state[name]) for name in silenced}}

    @torch.no_grad()
    def write(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Overwrites tensors of layer `index`, in place if they are in memory."""
        if self.on_disk is not None:
            given = {name: partial(state.__getitem__, name) for name in state}
            self.on_disk.write(self.layers[index], changed(self.layer_state(index), given))
            return
        tensors = self.layer_state(index)
        for name, tensor in state.items():
            assert not tensors[name].is_meta, "weights on the meta device cannot be changed"
            tensors[name].copy_(tensor)

    def layer_inputs(
        self, tokens: Int[Tensor, "batch seq"], *, gradients: bool = False
    ) -> tuple[Float[Tensor, "batch seq hidden"], list[dict[str, Any]]]:
        """The input of the first layer, and the keyword arguments of every layer.

        The model's own forward pass computes them, with recorders in place of its layers, so
        masks, positions and rotary embeddings are those of the family. The arguments contain no
        KV cache, because repeated calls would grow it.

        Args:
            tokens: token ids.
            gradients: whether gradients flow to the embeddings.

        Returns:
            `h_0`, [batch, seq, hidden] in the model's dtype, and one dict of keyword arguments per
            layer.
        """
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        decoder = self.model.get_submodule(self.layout.decoder)
        with (
            torch.set_grad_enabled(gradients),
            recording(self.layers, self.layout.returns, calls),
        ):
            decoder(input_ids=tokens.to(self.device), use_cache=False)
        assert len(calls) == self.num_layers
        return calls[0][0], [kwargs for _, kwargs in calls]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the LM head."""
        return self.model.get_submodule(self.layout.final_norm)

    @property
    def head(self) -> nn.Module:
        """The LM head, which maps normalised hidden states to logits."""
        linear, layout = self.model.get_output_embeddings(), self._layout
        converts = layout.float32_states and linear.weight.dtype != torch.float32
        plain = not layout.before_head and layout.logit_scale == 1 and not layout.logit_cap
        if plain and not converts:
            return linear
        before = self.model.get_submodule(layout.before_head) if layout.before_head else None
        return Head(linear, before, layout.logit_scale, layout.logit_cap)

    def copy_layer(self, index: int, state: LayerState) -> nn.Module:
        """A layer like `index` that is not part of the model and holds the tensors `state`.

        The tensors may have fewer units than the layer's own.
        """
        layer, tensors = self.layers[index], dict(state)
        blank: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(tensors[name], device="meta"), p.requires_grad)
            for name, p in layer.named_parameters()
        }
        blank[id(layer._forward_pre_hooks)] = OrderedDict()  # hooks that load weights from disk
        for module in layer.modules():  # states of recurrences, which may be part of a graph
            blank |= {id(t): t.detach() for t in vars(module).values() if isinstance(t, Tensor)}
        copied = copy.deepcopy(layer, blank)
        copied.load_state_dict(tensors, assign=True)
        for name, p in layer.named_parameters():
            if p.shape != tensors[name].shape:
                record_sizes(copied, name)
        return copied

    def copy_norm(self, index: int, sublayer: Sublayer, state: LayerState) -> nn.Module:
        """The norm before a sublayer, as a module of its own with the tensors of `state`."""
        assert sublayer.norm is not None
        name = sublayer.norm.module
        norm = copy.deepcopy(self.layers[index].get_submodule(name))
        own = {key: state[f"{name}.{key}"] for key in norm.state_dict()}
        norm.load_state_dict(own, assign=True)
        return norm

    @staticmethod
    def assign(layer: nn.Module, state: LayerState) -> None:
        """Sets tensors of a copied layer without overwriting the old ones, which may be shared."""
        layer.load_state_dict(dict(state), strict=False, assign=True)

    def replace(self, first: int, last: int, state: LayerState, slot: int = 0) -> None:
        """Replaces layers first..last (inclusive) by one layer with the tensors `state`.

        The new layer has the kind and the configuration of layer first + slot.

        Raises:
            ValueError: the layers that are left could not generate with a cache, or be loaded.
        """
        place = first + slot
        assert first <= place <= last
        assert state.keys() == self.layer_state(place).keys()
        expected = self.layout.layers[:first] + self.layout.layers[place : place + 1]
        expected += self.layout.layers[last + 1 :]
        removed = [index for index in range(first, last + 1) if index != place]
        check_removal(self.config, removed)
        self.write(place, state)
        if removed:
            remove_layers(self.layers, self.config, removed)
            assert self.layout.layers == expected, "the configuration describes other layers"

    @torch.no_grad()
    def narrow(self, index: int, state: LayerState, counts: Mapping[Unit, int]) -> None:
        """Replaces layer `index` by one with fewer units, by kind, and the tensors `state`.

        The configuration changes together with the last layer, when all are alike again. Until
        then, other adapters of this model describe it wrongly.
        """
        layer, before = self.layers[index], self.layer_layout(index)
        if self.on_disk is not None:
            self.on_disk.write(layer, state)
        resize(layer, state)
        layers = list(self.layout.layers)
        layers[index] = with_units(before, counts)
        self._roles.setdefault(layers[index], self.roles(index))
        self._layout = replace(self._layout, layers=tuple(layers))
        if self.on_disk is None:
            self.write(index, state)
        if all(counts.items() <= layout.unit_counts.items() for layout in layers):
            for unit, count in counts.items():
                SETTERS[unit](self.model.config, count)
            assert layout_of(self.model.config) == self._layout

    def scaled_outputs(self, index: int, state: LayerState, factor: float) -> LayerState:
        """The tensors that multiply all sublayer outputs of a layer like `index` by `factor`.

        These are the output projections, weights and biases, or the scales of norms after them.
        """
        found: dict[str, Tensor] = {}
        for sublayer in self.layer_layout(index):
            norm = sublayer.post_norm
            if norm is None:
                names = self.output_tensors(index, sublayer)
                found |= {name: state[name] * factor for name in names}
            else:
                name = f"{norm.module}.weight"
                found[name] = (state[name] + norm.offset) * factor - norm.offset
        return found

    @torch.no_grad()
    def scale_outputs(self, index: int, factor: float) -> None:
        """Multiplies all sublayer outputs of layer `index` by `factor`."""
        self.write(index, self.scaled_outputs(index, self.layer_state(index), factor))
