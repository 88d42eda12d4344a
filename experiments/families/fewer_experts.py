"""Layers with fewer experts: which are kept or averaged, the smaller model, and its refit.

Every layer keeps the same number, because configurations have one number of experts. Rows of the
router go with their experts; the router then normalises over the experts that are left, as it does
over those of the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from come.merge.apply import source_layers_of
from come.merge.operators.base import OPERATORS
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.ridge import Ridge
from come.merge.retention.adaptive import Adaptive
from come.merge.sensitivity.base import SENSITIVITY
from come.merge.span import LayerSpan
from come.merge.unit_scores import unit_scores
from come.merge.units import top_units
from come.models.adapter import ModelAdapter
from come.models.layer_state import LayerState
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream

UNIT = "expert"


class Calibration(LayerStream):
    """The dense model's hidden states, and the statistics of REAP's score."""

    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "windows seq"]) -> None:
        super().__init__(ModelAdapter(model), windows, progress=False)
        collector = StatisticsCollector(self.adapter, ("output_norm",))
        self.embed()
        self.advance(0, self.num_layers - 1, collector)
        self.snapshot_dense()
        self.statistics = [collector.found[index] for index in range(self.num_layers)]

    def scores(self, metric: Any) -> Sequence[Float[Tensor, " experts"]]:
        """A metric of every expert, layer by layer; the metric by name, or as a mapping."""
        layers = range(self.num_layers)
        spans = [[index] for index in layers]
        chosen = SENSITIVITY.build(metric)
        return unit_scores(self, chosen, self.statistics, spans, layers)[UNIT]

    def best(self, metric: Any, count: int) -> list[list[int]]:
        """The experts with the highest scores in every layer, ascending."""
        return [top_units(scores, count) for scores in self.scores(metric)]

    def eliminated(self, count: int) -> list[list[int]]:
        """The experts that the default method's elimination keeps in every layer.

        It removes those whose removal increases the error of the layer's output after a refit
        least, with the routing of the dense model.
        """
        found = []
        for index in range(self.num_layers):
            span = LayerSpan(
                self, [index], [[index]], [self.statistics[index]], OPERATORS.create("concat"),
                "mean", Ridge(), SENSITIVITY.create("reap"), {UNIT: count},
            )  # fmt: skip
            found.append(Adaptive().split(span).kept[UNIT][0])
        return found


def narrowed(
    model: PreTrainedModel,
    kept: Sequence[Sequence[int]],
    change: Callable[[int, LayerState], LayerState] | None = None,
) -> PreTrainedModel:
    """A model of its own with the kept experts of every layer.

    Args:
        model: the model, which does not change.
        kept: positions of the kept experts, as many in every layer.
        change: given the index and the tensors of a layer, those that experts are taken from.
    """
    adapter, config = ModelAdapter(model), copy.deepcopy(model.config)
    config.num_experts = len(kept[0])
    if config.num_experts < config.num_experts_per_tok:
        raise ValueError(
            f"{config.num_experts} experts are fewer than the {config.num_experts_per_tok} that "
            "every token is routed to"
        )
    small = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    stack = f"{adapter.layout.stack}."
    outside = {k: v for k, v in model.state_dict().items() if not k.startswith(stack)}
    small.load_state_dict(outside, strict=False)
    concat = OPERATORS.create("concat")
    for index, own in enumerate(kept):
        units = {u: [range(n)] for u, n in adapter.layer_layout(index).unit_counts.items()}
        state = adapter.layer_state(index)
        state = change(index, state) if change else state
        merged = concat.merge([state], adapter.roles(index), [1.0], {**units, UNIT: [own]})
        ModelAdapter(small).layers[index].load_state_dict(dict(merged))
    return small


def refit(small: PreTrainedModel, dense: Calibration) -> None:
    """Refits the experts' output projections, from the first layer on, in place.

    The target is the dense model's hidden state after the layer. Features of an expert are zero
    for tokens that are not routed to it, so it is fitted on those that are.
    """
    with TowardsDense(small, dense) as stream:
        adapter = stream.adapter
        stream.embed()
        for index in range(adapter.num_layers):
            if stream.valid < index:
                stream.advance(stream.valid, index - 1)
            targets = ReconstructionTargets(stream, index, index, original=index)
            drop = OPERATORS.create("drop")  # of one layer: keeps it
            sources = source_layers_of(adapter, [index], drop, "mean", [1.0], {})
            adapter.write(index, Ridge(sublayers=["ffn"]).solve(targets, sources))
            stream.invalidate_from(index)


class TowardsDense(LayerStream):
    """The hidden states of a compressed model; the targets are another model's."""

    def __init__(self, small: PreTrainedModel, original: Calibration) -> None:
        super().__init__(ModelAdapter(small), original.windows, progress=False)
        self._original = original

    def dense(self, index: int, rows: slice) -> Float[Tensor, "batch seq hidden"]:
        """One batch of a boundary of the original model."""
        return self._original.boundary(index, rows)


@torch.no_grad()
def averaged(
    dense: Calibration, kept: Sequence[Sequence[int]]
) -> Callable[[int, LayerState], LayerState]:
    """Averages each expert that is not kept into the kept one with the most similar output.

    Similarity is the cosine of both outputs over calibration tokens, whichever way they are routed
    (as HC-SMoE, arXiv 2410.08589). Weights are the numbers of routed tokens. Channels of an expert
    are first permuted to match those of the kept one, by their weights (as REAM, arXiv 2604.04356,
    which also reads activations). Returns the `change` of `narrowed`.
    """

    def change(index: int, state: LayerState) -> LayerState:
        experts = dense.adapter.layer_layout(index).sublayer("experts").experts
        assert experts is not None
        assert len(experts.inputs) == 1
        similar, routed = _similarity(dense, index)
        rows, columns = state[experts.inputs[0]].clone(), state[experts.output].clone()
        own = kept[index]
        nearest = similar[own].argmax(dim=0).tolist()
        for place, home in enumerate(own):
            members = [e for e, found in enumerate(nearest) if found == place and e not in own]
            members = [home, *members]
            shares = routed[members].double().clamp_min(1)
            total = [torch.zeros_like(rows[home]), torch.zeros_like(columns[home])]
            for expert, share in zip(members, (shares / shares.sum()).tolist(), strict=True):
                pair = (state[experts.inputs[0]][expert], state[experts.output][expert])
                target = (state[experts.inputs[0]][home], state[experts.output][home])
                for sums, part in zip(total, matched(pair, target), strict=True):
                    sums += share * part
            rows[home], columns[home] = total
        return {**state, experts.inputs[0]: rows, experts.output: columns}

    return change


def matched(
    expert: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "hidden channels"]]:
    """The expert with its channels in the order that matches another expert's best.

    An expert is its gate and up rows, one below the other, and its output projection.
    """
    gates = [pair[0].chunk(2) for pair in (expert, target)]
    own, other = (
        torch.cat([*rows, pair[1].T], dim=1)
        for rows, pair in zip(gates, (expert, target), strict=True)
    )
    _, order = linear_sum_assignment((other @ own.T).cpu().numpy(), maximize=True)
    picked = torch.as_tensor(order)
    return torch.cat([rows[picked] for rows in gates[0]]), expert[1][:, picked]


def _similarity(dense: Calibration, index: int) -> tuple[Tensor, Tensor]:
    """Cosines of the experts' outputs, [experts, experts], and their numbers of routed tokens."""
    layer = dense.adapter.layer(index)
    experts = dense.adapter.layer_layout(index).sublayer("experts").experts
    assert experts is not None
    weights = experts.matrix(dense.adapter.layer_state(index)).split(experts.width, dim=1)
    products = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    routed = torch.zeros(experts.count, dtype=torch.long)
    for rows in dense.batches[:8]:
        with _called(layer.get_submodule(experts.module)) as given:
            dense.run(index, dense.boundary(index, rows))
        states, picked = given[0][:2]
        routed += torch.bincount(picked.flatten(), minlength=experts.count)
        every = torch.arange(experts.count).expand(len(states), -1)
        features = experts.features(layer, states, every, torch.ones(every.shape))
        parts = zip(features.split(experts.width, dim=1), weights, strict=True)
        outputs = torch.stack([(own @ weight.T).flatten() for own, weight in parts])
        products += (outputs @ outputs.T).double()
    sizes = products.diagonal().sqrt().clamp_min(1e-12)
    return products / torch.outer(sizes, sizes), routed


@contextmanager
def _called(module: torch.nn.Module) -> Any:
    """Records the arguments of calls of a module while open."""
    given: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(
        lambda module, inputs, keywords: given.append((*inputs, *keywords.values())),
        with_kwargs=True,
    )
    try:
        yield given
    finally:
        handle.remove()
