"""A decoder layer as data: its sublayers, in the order of the forward pass.

Algorithms know a model only through these descriptions; each family makes them from its
configuration (`come.models.families`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from come.models.roles import Part, Role, roles_of
from come.models.units import (
    SUBLAYERS,
    Block,
    Gate,
    Norm,
    Rows,
    Sublayer,
    SublayerKind,
    Unit,
)

__all__ = [
    "SUBLAYERS",
    "Block",
    "Gate",
    "LayerLayout",
    "ModelLayout",
    "Norm",
    "Part",
    "Role",
    "Rows",
    "Sublayer",
    "SublayerKind",
    "Unit",
]


@dataclass(frozen=True)
class LayerLayout:
    """The sublayers of one decoder layer, in the order of the forward pass.

    Attributes:
        sublayers: the sublayers; those of one stage are adjacent.
        kind: what distinguishes the layer from others with the same tensors, such as
            "sliding_attention".
        scale: name of the buffer c that multiplies the layer's output, y = c (x + sublayers); empty
            for none.
    """

    sublayers: tuple[Sublayer, ...]
    kind: str = ""
    scale: str = ""

    def __iter__(self) -> Iterator[Sublayer]:
        return iter(self.sublayers)

    def sublayer(self, name: str) -> Sublayer:
        """The sublayer with this name."""
        return next(sublayer for sublayer in self.sublayers if sublayer.name == name)

    @property
    def last(self) -> Sublayer:
        """The last sublayer."""
        return self.sublayers[-1]

    @property
    def routed(self) -> bool:
        """Whether features of a unit depend on which other units there are, as those of experts."""
        return any(part.experts for sublayer in self.sublayers for part in sublayer.parts)

    @property
    def unit_counts(self) -> dict[Unit, int]:
        """Number of units by kind."""
        return {sublayer.unit: sublayer.count for sublayer in self.sublayers}

    def of(self, block: Block) -> list[Sublayer]:
        """The sublayers that belong to a block."""
        return [sublayer for sublayer in self.sublayers if block in ("layer", sublayer.kind)]

    def before(self, sublayer: Sublayer) -> list[Sublayer]:
        """The sublayers that run before this one."""
        return list(self.sublayers[: self.sublayers.index(sublayer)])

    def after(self, sublayer: Sublayer) -> list[Sublayer]:
        """The sublayers that run after this one."""
        return list(self.sublayers[self.sublayers.index(sublayer) + 1 :])

    def read_after(self, sublayer: Sublayer) -> Sublayer | None:
        """The sublayer after which this one reads the residual stream; None for the layer's input.

        For sublayers side by side, it is the last one of the stage before.
        """
        earlier = [other for other in self.before(sublayer) if other.stage < sublayer.stage]
        return earlier[-1] if earlier else None

    def roles(self, names: Iterable[str]) -> dict[str, Role]:
        """The role of every tensor of the layer.

        Raises:
            ValueError: a tensor is not described.
        """
        found = roles_of(self.sublayers, (name for name in names if name != self.scale))
        return found | ({self.scale: Role(Part.SHARED, "")} if self.scale else {})


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of a causal language model are, and what its layers consist of.

    Attributes:
        layers: the layout of every decoder layer.
        stack: name of the list of decoder layers, relative to the model.
        final_norm: name of the norm between the last layer and the LM head.
        returns: number of values that a layer returns; 0 for a tensor instead of a tuple.
        before_head: the module between the final norm and the LM head; empty for none.
        logit_scale: multiplies the logits.
        logit_cap: c of c tanh(logits / c); 0 for none.
        begin_token: whether the family predicts well only after its begin token.
        one_sequence: whether transformers generates correctly with a cache only for one sequence at
            a time.
        float32_states: whether the residual stream is float32 even if weights are narrower.
    """

    layers: tuple[LayerLayout, ...]
    stack: str = "model.layers"
    final_norm: str = "model.norm"
    returns: int = 0
    before_head: str = ""
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    begin_token: bool = False
    one_sequence: bool = False
    float32_states: bool = False

    @property
    def decoder(self) -> str:
        """The module that embeds tokens and loops over the layers."""
        return self.stack.rpartition(".")[0]
