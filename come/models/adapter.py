"""The model adapter: the only interface through which algorithms access a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.models.architectures import architecture_of
from come.models.layer_state import LayerState, changed
from come.models.surgery import check_layer_config, remove_layers
from come.models.weights import LayersOnDisk, layers_on_disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


Unit = Literal["kv_group", "channel"]
UNITS: tuple[Unit, ...] = ("kv_group", "channel")
Block = Literal["layer", "attention", "ffn"]
"""What is merged or dropped: whole layers, or only their attention or MLP ("ffn")."""
UNITS_OF: dict[Block, tuple[Unit, ...]] = {
    "layer": UNITS,
    "attention": ("kv_group",),
    "ffn": ("channel",),
}


class Part(Enum):
    """How a merge treats a tensor of a layer."""

    UNITS = "units"  # split along one axis into units; each unit is kept or dropped as a whole
    NORM = "norm"  # scale or bias of the norm before attention or MLP
    SHARED = "shared"  # belongs to no unit: output biases, per-head norms


@dataclass(frozen=True)
class Role:
    """How one tensor of a layer is split into units.

    Attributes:
        part: how a merge treats the tensor.
        unit: kind of the units (`Part.UNITS` only).
        axis: 0 if a unit is a set of rows, 1 if it is a set of columns.
        size: number of rows or columns per unit; they are adjacent.
        norm: name of the norm module whose output the rows read (`axis` 0 only).
    """

    part: Part
    unit: Unit | None = None
    axis: int = 0
    size: int = 1
    norm: str | None = None


class ModelAdapter:
    """A causal language model of a supported family, as a stack of layers that consist of units.

    A layer has `K` KV groups (a KV head with its query heads) and `F` MLP channels.

    Raises:
        ValueError: the family, a variant of it, or a tensor of its layers is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.architecture = architecture_of(model.config)
        check_layer_config(model.config)
        self.roles = self._roles()

    @property
    def config(self) -> PretrainedConfig:
        """The model's own configuration."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, from first to last."""
        layers = self.model.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

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
        """Number of units of each kind per layer: `{"kv_group": K, "channel": F}`."""
        config = self.config
        heads = config.num_attention_heads
        return {
            "kv_group": getattr(config, "num_key_value_heads", None) or heads,
            "channel": getattr(config, self.architecture.ffn_size_key),
        }

    @property
    def head_dim(self) -> int:
        """Number of channels of one attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def layer_state(self, index: int) -> LayerState:
        """The tensors of layer `index`, without copying them; those on disk are read on access."""
        layer = self.layers[index]
        return dict(layer.state_dict()) if self.on_disk is None else self.on_disk.state(layer)

    def output_map(self, index: int, unit: Unit) -> nn.Linear:
        """The output projection of layer `index` whose input channels are the units' outputs."""
        linear = self.layer(index).get_submodule(self._output_module(unit))
        assert isinstance(linear, nn.Linear)
        return linear

    def output_tensors(self, *units: Unit) -> list[str]:
        """Names of the output projections' weights and biases, for `units`, or for all if none."""
        modules = [self._output_module(unit) for unit in units or UNITS]
        return [name for name in self.roles if name.rpartition(".")[0] in modules]

    @property
    def block_parameters(self) -> dict[Block, int]:
        """Parameters of one decoder layer, and of its attention and its MLP with their norms."""
        sizes = {name: p.numel() for name, p in self.layers[0].named_parameters()}
        return {block: sum(sizes[name] for name in self.block_tensors(block)) for block in UNITS_OF}

    def block_tensors(self, block: Block) -> list[str]:
        """Names of the tensors of a layer that belong to a block, including its norm."""
        arch = self.architecture
        ffn = {arch.ffn_norm, *arch.ffn_inputs, arch.ffn_output}
        own = {
            name: "ffn" if name.rpartition(".")[0] in ffn else "attention" for name in self.roles
        }
        return [name for name in self.roles if block in ("layer", own[name])]

    def linear_weights(self, index: int, block: Block = "layer") -> list[Tensor]:
        """The weights of all linear maps of a block of layer `index`, [d_out, d_in] each."""
        tensors = dict(self.layer(index).named_parameters())
        return [tensors[name] for name in self.block_tensors(block) if tensors[name].dim() == 2]

    def mlp_norm_module(self, index: int) -> nn.Module:
        """The norm of layer `index` before the MLP; its input is the state after attention."""
        return self.layers[index].get_submodule(self.architecture.ffn_norm)

    def norm(self, unit: Unit) -> str:
        """Name, relative to a layer, of the norm whose output the units of a kind read."""
        arch = self.architecture
        return arch.attention_norm if unit == "kv_group" else arch.ffn_norm

    def zeroed(self, index: int, block: Block) -> LayerState:
        """The tensors of layer `index`, changed so that a block adds 0 to the residual stream."""
        state = self.layer_state(index)
        silenced = self.output_tensors(*UNITS_OF[block])
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

    def columns_per_unit(self, unit: Unit) -> int:
        """Number of input columns of `output_map` per unit."""
        return self.roles[f"{self._output_module(unit)}.weight"].size

    @torch.no_grad()
    def layer_inputs(
        self, tokens: Int[Tensor, "batch seq"]
    ) -> tuple[Float[Tensor, "batch seq hidden"], list[dict[str, Any]]]:
        """The input of the first layer, and the keyword arguments of every layer.

        The model's own forward pass computes them, with recorders in place of its layers, so
        masks, positions and rotary embeddings are those of the family. The arguments contain no
        KV cache, because repeated calls would grow it.

        Returns:
            `h_0`, [batch, seq, hidden] in the model's dtype, and one dict of keyword arguments per
            layer.
        """
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        decoder = self.model.get_submodule(self.architecture.decoder)
        with _recording(self.layers, calls):
            decoder(input_ids=tokens.to(self.device), use_cache=False)
        assert len(calls) == self.num_layers
        return calls[0][0], [kwargs for _, kwargs in calls]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the LM head."""
        return self.model.get_submodule(self.architecture.final_norm)

    @property
    def head(self) -> nn.Module:
        """The LM head, which maps normalised hidden states to logits."""
        return self.model.get_output_embeddings()

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
        copied = copy.deepcopy(layer, blank)
        copied.load_state_dict(tensors, assign=True)
        return copied

    def copy_norm(self, unit: Unit, state: LayerState) -> nn.Module:
        """The norm before a kind of unit, as a module of its own with the tensors of `state`."""
        name = self.norm(unit)
        norm = copy.deepcopy(self.layers[0].get_submodule(name))
        own = {key: state[f"{name}.{key}"] for key in norm.state_dict()}
        norm.load_state_dict(own, assign=True)
        return norm

    @staticmethod
    def assign(layer: nn.Module, state: LayerState) -> None:
        """Sets tensors of a copied layer without overwriting the old ones, which may be shared."""
        layer.load_state_dict(dict(state), strict=False, assign=True)

    def replace(self, first: int, last: int, state: LayerState) -> None:
        """Replaces layers first..last (inclusive) by one layer with the tensors `state`."""
        assert first <= last
        assert state.keys() == self.layer_state(first).keys()
        self.write(first, state)
        if last > first:
            remove_layers(self.layers, self.config, first + 1, last)

    @torch.no_grad()
    def scale_outputs(self, index: int, factor: float) -> None:
        """Multiplies the output projections of layer `index`, weights and biases, by `factor`."""
        state = self.layer_state(index)
        self.write(index, {name: state[name] * factor for name in self.output_tensors()})

    def _output_module(self, unit: Unit) -> str:
        arch = self.architecture
        return arch.attention_output if unit == "kv_group" else arch.ffn_output

    def _roles(self) -> dict[str, Role]:
        """The role of every tensor of a layer.

        Query head h reads KV head h // (n_heads / n_kv_heads), so the query rows of one KV group
        are adjacent. A unit is therefore a block of rows in every input projection.
        """
        arch, head_dim = self.architecture, self.head_dim
        queries = self.config.num_attention_heads // self.unit_counts["kv_group"] * head_dim
        rows: dict[str, Role] = {
            arch.queries: Role(Part.UNITS, "kv_group", 0, queries, arch.attention_norm),
            arch.keys: Role(Part.UNITS, "kv_group", 0, head_dim, arch.attention_norm),
            arch.values: Role(Part.UNITS, "kv_group", 0, head_dim, arch.attention_norm),
        }
        for name in arch.ffn_inputs:
            rows[name] = Role(Part.UNITS, "channel", 0, 1, arch.ffn_norm)
        columns = {
            arch.attention_output: Role(Part.UNITS, "kv_group", 1, queries),
            arch.ffn_output: Role(Part.UNITS, "channel", 1, 1),
        }
        roles: dict[str, Role] = {}
        for module, role in rows.items():
            roles |= {f"{module}.weight": role, f"{module}.bias": role}
        for module, role in columns.items():
            roles |= {f"{module}.weight": role, f"{module}.bias": Role(Part.SHARED)}
        for module in (arch.attention_norm, arch.ffn_norm):
            roles |= {f"{module}.{kind}": Role(Part.NORM) for kind in ("weight", "bias")}
        for module in arch.head_norms:
            roles[f"{module}.weight"] = Role(Part.SHARED)
        tensors = self.layers[0].state_dict()
        for name in tensors:
            if name not in roles:
                raise ValueError(
                    f"layer tensor {name!r} of model type {arch.model_type!r} is not known, so "
                    "this model cannot be merged safely"
                )
        return {name: roles[name] for name in tensors}


@contextmanager
def _recording(layers: nn.ModuleList, calls: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Makes every layer record its input and keyword arguments and return its input, while open."""

    def recorder() -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            for cache in ("past_key_values", "use_cache"):
                kwargs.pop(cache, None)
            calls.append((hidden_states, kwargs))
            return hidden_states

        return forward

    try:
        for layer in layers:
            layer.forward = recorder()
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
