"""Routed experts of a sublayer: their tensors, and the features of their output projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """MLPs side by side in a few tensors, of which a router picks some for every token.

        output = sum_e p_e (W_e f_e + b_e)

    f_e: hidden activations of expert e; p_e: its routing weight, 0 for tokens that are not routed
    to it. This is linear in W = [W_1 b_1 W_2 b_2 ...], the output projection; its features are
    [p_1 f_1, p_1, p_2 f_2, p_2, ...]. Without biases b, their columns are left out.

    Names are relative to the layer. Tensors are [experts, ...], or have the rows of all experts
    one below the other.

    Attributes:
        module: the module that is called with tokens, picked experts and routing weights.
        count: number of experts.
        channels: hidden activations of one expert.
        inputs: the tensors of the input projections, [experts, rows, hidden].
        output: the tensor of the output projections W_e, [experts, hidden, channels].
        input_biases: the biases of the input projections, [experts, rows]; empty for none.
        output_bias: the biases b_e, [experts, hidden]; None for none.
        transposed: whether the input projections are stored as [experts, hidden, rows].
        output_transposed: whether the output projections are stored as [experts, channels, hidden].
        stacked: whether tensors have one dimension less, the rows of all experts below each other.
        activation: name of the function, relative to the module, that maps the outputs of the
            input projections to hidden activations.
        halves: whether that function reads only the first half of them, and the second half is
            multiplied by what it returns.
        weighted: whether the module is called with the inputs of every expert, [experts * tokens,
            hidden], times the routing weights, which then are part of f_e.
    """

    module: str
    count: int
    channels: int
    inputs: tuple[str, ...]
    output: str
    input_biases: tuple[str, ...] = ()
    output_bias: str | None = None
    transposed: bool = False
    output_transposed: bool = False
    stacked: bool = False
    activation: str = "_apply_gate"
    halves: bool = False
    weighted: bool = False

    @property
    def width(self) -> int:
        """Features of one expert."""
        return self.channels + (self.output_bias is not None)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors of the output projection."""
        return (self.output,) if self.output_bias is None else (self.output, self.output_bias)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
        """The output projection W; `tensors` has those of `outputs`."""
        weight = tensors[self.output]
        weight = weight.view(self.count, -1, weight.shape[-1])
        rows = weight if self.output_transposed else weight.mT  # [experts, channels, hidden]
        if self.output_bias is not None:
            rows = torch.cat([rows, tensors[self.output_bias][:, None]], dim=1)
        return rows.reshape(-1, rows.shape[-1]).T

    def tensors(self, matrix: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """The tensors of an output projection W."""
        rows = matrix.T.reshape(self.count, self.width, -1)
        weight = rows[:, : self.channels]
        weight = weight if self.output_transposed else weight.mT
        found = {self.output: weight.flatten(0, 1) if self.stacked else weight}
        if self.output_bias is not None:
            found[self.output_bias] = rows[:, -1]
        return found

    def features(
        self,
        layer: nn.Module,
        states: Float[Tensor, "*tokens hidden"],
        picked: Int[Tensor, "tokens picks"] | None = None,
        weights: Float[Tensor, "tokens picks"] | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """The input of the output projection, from what the module is called with."""
        flat = states.reshape(-1, states.shape[-1])
        if self.weighted:
            each = flat.view(self.count, -1, flat.shape[-1])
            return torch.cat([self._activations(layer, e, own) for e, own in enumerate(each)], -1)
        assert picked is not None
        assert weights is not None
        found = flat.new_zeros(len(flat), self.count, self.width)
        for expert in range(self.count):
            tokens, place = (picked == expert).nonzero(as_tuple=True)
            if len(tokens):
                active = self._activations(layer, expert, flat[tokens])
                if self.output_bias is not None:
                    active = torch.cat([active, torch.ones_like(active[:, :1])], dim=-1)
                found[tokens, expert] = (active * weights[tokens, place, None]).to(found)
        return found.flatten(1)

    def _activations(
        self, layer: nn.Module, expert: int, states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens channels"]:
        """f_e of some tokens."""
        projected = []
        for number, name in enumerate(self.inputs):
            weight = layer.get_parameter(name)
            own = weight.view(self.count, -1, weight.shape[-1])[expert]
            found = states @ (own if self.transposed else own.T)
            if self.input_biases:
                found = found + layer.get_parameter(self.input_biases[number])[expert]
            projected.append(found)
        path, _, name = f"{self.module}.{self.activation}".rpartition(".")
        activation = getattr(layer.get_submodule(path), name)
        if not self.halves:
            active: Tensor = activation(torch.cat(projected, dim=-1))
            return active
        gate, up = torch.cat(projected, dim=-1).chunk(2, dim=-1)
        gated: Tensor = activation(gate) * up
        return gated
