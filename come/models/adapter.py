"""The closed list of questions that an algorithm may ask of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.models.architectures import architecture_of
from come.models.surgery import check_layer_config, replace_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


Unit = Literal["kv_group", "channel"]
UNITS: tuple[Unit, ...] = ("kv_group", "channel")
Block = Literal["layer", "attention", "ffn"]
"""What is merged or dropped: whole layers, or one of their two parts."""
UNITS_OF: dict[Block, tuple[Unit, ...]] = {
    "layer": UNITS,
    "attention": ("kv_group",),
    "ffn": ("channel",),
}
LayerState = dict[str, Tensor]
"""All tensors of one decoder layer by their name inside the layer."""


class Part(Enum):
    """What merging does with a tensor of a layer."""

    UNITS = "units"  # cut along one axis into units that are kept or dropped whole
    NORM = "norm"  # scale or bias of a norm in front of a block
    SHARED = "shared"  # belongs to no unit: output biases, per-head norms


@dataclass(frozen=True)
class Role:
    """How one tensor of a layer is made up of units.

    Attributes:
        part: what kind of tensor it is.
        unit: the units it is cut into (`Part.UNITS` only).
        axis: 0 where a unit owns rows, 1 where it owns columns.
        size: rows or columns a unit owns; they are adjacent.
        norm: name of the norm module whose output these rows read (rows only).
    """

    part: Part
    unit: Unit | None = None
    axis: int = 0
    size: int = 1
    norm: str | None = None


class ModelAdapter:
    """A causal language model of a supported family, seen as a stack of layers made of units.

    A layer has `K` KV groups (a KV head with the query heads that read it) and `F` FFN channels.

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
        """The decoder layers, in depth order."""
        layers = self.model.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has now."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the embeddings, and so the hidden states, live."""
        return self.model.get_input_embeddings().weight.device

    @property
    def unit_counts(self) -> dict[Unit, int]:
        """How many units of each kind every layer has: `{"kv_group": K, "channel": F}`."""
        config = self.config
        heads = config.num_attention_heads
        return {
            "kv_group": getattr(config, "num_key_value_heads", None) or heads,
            "channel": getattr(config, self.architecture.ffn_size_key),
        }

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def layer_state(self, index: int) -> LayerState:
        """The tensors of layer `index`, not copied."""
        return dict(self.layers[index].state_dict())

    def output_map(self, index: int, unit: Unit) -> nn.Linear:
        """The linear map of layer `index` whose input channels are the units' outputs."""
        linear = self.layers[index].get_submodule(self._output_module(unit))
        assert isinstance(linear, nn.Linear)
        return linear

    def output_tensors(self, *units: Unit) -> list[str]:
        """Names of the output maps' weights and biases, of all units unless some are named."""
        modules = [self._output_module(unit) for unit in units or UNITS]
        return [name for name in self.roles if name.rpartition(".")[0] in modules]

    def block_tensors(self, block: Block) -> list[str]:
        """Names of the tensors of a layer that belong to a block, its norm among them."""
        arch = self.architecture
        ffn = {arch.ffn_norm, *arch.ffn_inputs, arch.ffn_output}
        own = {
            name: "ffn" if name.rpartition(".")[0] in ffn else "attention" for name in self.roles
        }
        return [name for name in self.roles if block in ("layer", own[name])]

    def linear_weights(self, index: int, block: Block = "layer") -> list[Tensor]:
        """The weights of all linear maps of a block of layer `index`, [d_out, d_in] each."""
        tensors = dict(self.layers[index].named_parameters())
        return [tensors[name] for name in self.block_tensors(block) if tensors[name].dim() == 2]

    def mlp_norm_module(self, index: int) -> nn.Module:
        """The norm of layer `index` whose input is the state between attention and FFN."""
        return self.layers[index].get_submodule(self.architecture.ffn_norm)

    def norm(self, unit: Unit) -> str:
        """Name, inside a layer, of the norm that the units of a kind read."""
        arch = self.architecture
        return arch.attention_norm if unit == "kv_group" else arch.ffn_norm

    def zeroed(self, index: int, block: Block) -> LayerState:
        """The tensors of layer `index` with a block that adds nothing to the residual stream."""
        state = self.layer_state(index)
        silenced = self.output_tensors(*UNITS_OF[block])
        return state | {name: torch.zeros_like(state[name]) for name in silenced}

    @torch.no_grad()
    def write(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Overwrites tensors of layer `index` in place."""
        tensors = self.layer_state(index)
        for name, tensor in state.items():
            tensors[name].copy_(tensor)

    def columns_per_unit(self, unit: Unit) -> int:
        """Input columns of `output_map` that belong to one unit."""
        return self.roles[f"{self._output_module(unit)}.weight"].size

    @torch.no_grad()
    def layer_inputs(
        self, tokens: Int[Tensor, "batch seq"]
    ) -> tuple[Float[Tensor, "batch seq hidden"], list[dict[str, Any]]]:
        """What the model hands to its first layer, and the keyword arguments of every layer.

        Asked of the model itself, with its layers replaced by a recorder for one call, so masks,
        positions and rotary embeddings are the family's own. Nothing of the cache is kept:
        repeated calls would grow it.

        Returns:
            `h_0` in the model's dtype, and one dict of keyword arguments a layer.
        """
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        decoder = self.model.get_submodule(self.architecture.decoder)
        with _recording(self.layers, calls):
            decoder(input_ids=tokens.to(self.device), use_cache=False)
        assert len(calls) == self.num_layers
        return calls[0][0], [kwargs for _, kwargs in calls]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        return self.model.get_submodule(self.architecture.final_norm)

    @property
    def head(self) -> nn.Module:
        """The map from normed hidden states to logits."""
        return self.model.get_output_embeddings()

    def copy_layer(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """A layer beside the model, like layer `index` but with the tensors `state`."""
        layer = copy.deepcopy(self.layers[index])
        layer.load_state_dict(dict(state))
        return layer

    def replace(self, first: int, last: int, state: Mapping[str, Tensor]) -> None:
        """Replaces layers first..last (inclusive) by one layer with the tensors `state`."""
        replace_layers(self.layers, self.config, first, last, state)

    @torch.no_grad()
    def scale_outputs(self, index: int, factor: float) -> None:
        """Multiplies the output maps of layer `index`, weights and biases, in place."""
        tensors = self.layer_state(index)
        for name in self.output_tensors():
            tensors[name].mul_(factor)

    def _output_module(self, unit: Unit) -> str:
        arch = self.architecture
        return arch.attention_output if unit == "kv_group" else arch.ffn_output

    def _roles(self) -> dict[str, Role]:
        """The role of every tensor of a layer.

        Query head h reads KV head h // (n_heads / n_kv_heads), so the query rows of one KV group
        are adjacent and a unit is a block of rows in every projection.
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
    """Makes every layer note its input and keyword arguments and pass its input on."""

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
