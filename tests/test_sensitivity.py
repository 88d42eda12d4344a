"""Sensitivity metrics against plain float64 computations."""

import copy
import itertools
import math

import pytest
import torch

from come.merge.sensitivity.base import SENSITIVITY
from come.merge.unit_scores import unit_scores
from come.models.adapter import ModelAdapter
from come.statistics.gradients import path_gradients
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import SELECTED_FAMILIES, loss, sublayer_of
from tests.reference import UNITS, Reference


def columns(reference: Reference, index: int, unit: str) -> dict[str, torch.Tensor]:
    """The metrics without gradients, per column of the output map, from inputs of the model."""
    weight, x = reference.output(index, unit).weight, reference.inputs[index, unit]
    tokens = len(x)
    rows = range(weight.shape[1])
    size = [math.sqrt(sum(float(w) ** 2 for w in weight[:, j])) for j in rows]
    mean = [float(x[:, j].sum()) / tokens for j in rows]
    return {
        "activation": [float(x[:, j].abs().sum()) / tokens for j in rows],
        "magnitude": [float(weight[:, j].abs().sum()) for j in rows],
        "wanda": [math.sqrt(float((x[:, j] ** 2).sum()) / tokens) * size[j] for j in rows],
        "fluctuation": [
            float(((x[:, j] - mean[j]) ** 2).sum()) / tokens * size[j] ** 2 for j in rows
        ],
    }


def per_unit(values, stream, unit):
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.view(-1, sublayer_of(stream.adapter, unit).columns).mean(dim=1)


def found_scores(stream, name, first, last):
    statistics = [stream.found[i] for i in range(first, last + 1)]
    spans = [[i] for i in range(first, last + 1)]
    return unit_scores(stream, SENSITIVITY.create(name), statistics, spans, range(first, last + 1))


@pytest.mark.parametrize("name", ["activation", "magnitude", "wanda", "fluctuation"])
def test_metrics_without_gradients(stream, name, windows):
    reference = Reference(stream.adapter.model, windows)
    scores = found_scores(stream, name, 0, LAYERS - 1)
    for unit, index in itertools.product(UNITS, range(LAYERS)):
        expected = per_unit(columns(reference, index, unit)[name], stream, unit)
        torch.testing.assert_close(scores[unit][index], expected, rtol=2e-4, atol=1e-12)


def test_reap_of_units_that_see_all_tokens(stream, windows):
    """The mean norm of what a unit adds to the output, in float64, token by token."""
    reference = Reference(stream.adapter.model, windows)
    scores = found_scores(stream, "reap", 0, LAYERS - 1)
    for unit, index in itertools.product(UNITS, range(LAYERS)):
        weight, x = reference.output(index, unit).weight.double(), reference.inputs[index, unit]
        size = sublayer_of(stream.adapter, unit).columns
        pairs = zip(x.double().split(size, dim=1), weight.split(size, dim=1), strict=True)
        expected = torch.stack([(own @ part.T).norm(dim=1).mean() for own, part in pairs])
        torch.testing.assert_close(scores[unit][index], expected.detach(), rtol=2e-4, atol=1e-12)


def output_map(adapter, index, unit):
    return adapter.output_map(index, sublayer_of(adapter, unit))


def output_weights(model, index):
    adapter = ModelAdapter(model)
    return {unit: output_map(adapter, index, unit).weight for unit in UNITS}


def test_taylor_uses_gradients_of_the_complete_model(stream, windows):
    model = copy.deepcopy(stream.adapter.model).double().requires_grad_()
    loss(model, windows).backward()
    for first, last in [(1, 2), (3, 5)]:
        scores = found_scores(stream, "taylor", first, last)
        for index in range(first, last + 1):
            for unit, weight in output_weights(model, index).items():
                expected = per_unit((weight * weight.grad).abs().sum(0).detach(), stream, unit)
                torch.testing.assert_close(
                    scores[unit][index - first], expected, rtol=2e-3, atol=1e-9
                )
    assert all(p.grad is None for p in stream.adapter.model.parameters())


def plain_path_attribution(model, windows, steps):
    """Integrated gradients of the scale of every column, from the complete float64 model."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    adapter = ModelAdapter(model)
    total = {}
    for step in range(steps):
        scales, handles = {}, []
        for index, unit in itertools.product(range(adapter.num_layers), UNITS):
            linear = output_map(adapter, index, unit)
            scale = torch.full((linear.in_features,), (step + 0.5) / steps, dtype=torch.float64)
            scales[index, unit] = scale.requires_grad_()
            handles.append(
                linear.register_forward_pre_hook(lambda m, a, s=scale: (a[0] * s, *a[1:]))
            )
        loss(model, windows).backward()
        for key, scale in scales.items():
            total[key] = total.get(key, 0) + scale.grad / steps
        for handle in handles:
            handle.remove()
    return total


@pytest.mark.parametrize("family", SELECTED_FAMILIES)
def test_path_attribution_uses_gradients_of_the_complete_model(stream, windows):
    expected = plain_path_attribution(stream.adapter.model, windows, 10)
    scores = found_scores(stream, "path_attribution", 2, 3)
    for index, unit in itertools.product((2, 3), UNITS):
        values = per_unit(expected[index, unit].abs(), stream, unit)
        torch.testing.assert_close(scores[unit][index - 2], values, rtol=5e-3, atol=1e-6)


def test_path_attributions_sum_to_the_loss_difference(windows):
    model = pico("llama_gqa")
    adapter = ModelAdapter(model)
    zeroed = copy.deepcopy(model)
    for index, unit in itertools.product(range(LAYERS), UNITS):
        output_map(ModelAdapter(zeroed), index, unit).weight.data.zero_()
    with LayerStream(adapter, windows, progress=False) as stream, torch.no_grad():
        stream.embed()
        stream.advance(0, LAYERS - 1)
        found = path_gradients(stream, range(LAYERS), steps=40)
        difference = float(loss(model, windows) - loss(zeroed, windows))
    assert sum(float(part.sum()) for part in found.values()) == pytest.approx(difference, rel=0.02)
