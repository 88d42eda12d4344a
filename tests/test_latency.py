"""Times of layers at several FFN widths, for `merge.budget.latency`."""

from functools import partial

import pytest
import torch

from come.job import latency
from come.merge.shape_costs import LatencyShare
from come.models.adapter import ModelAdapter
from come.models.sublayers import run_layer
from tests.conftest import LAYERS, SEQ, pico
from tests.decoders import pico_decoder

CHANNELS = 24


def test_times_are_linear_between_measured_widths():
    table = LatencyShare(1.0, {24: 2.0, 6: 1.0}, LAYERS, CHANNELS)
    assert table.seconds(3, 15) == 1 + 3 * 1.5
    assert table(6, 6) == 7 / 13
    assert str(table) == (
        "2000.00 ms a layer with 24 FFN channels, 1000.00 ms a layer with 6 FFN channels, "
        "1000.00 ms for the rest; dense 13000.0 ms"
    )


def test_times_of_layers(monkeypatch):
    """A clock that counts FFN channels: medians without the warm-up, one of each kind of layer."""
    taken = []

    def seconds(model, work):
        work()
        layer = work.args[0] if isinstance(work, partial) else None
        width = layer.mlp.down_proj.in_features if layer else 0
        taken.append(width)
        return 100.0 if len(taken) <= 5 else 0.5 + width

    monkeypatch.setattr(latency, "seconds", seconds)
    model, window = pico("mistral_sliding"), torch.arange(3, 3 + SEQ)[None]
    found = latency.measure_latency(model, window, CHANNELS)
    assert found == LatencyShare(0.5, {24: 24.5, 18: 18.5, 12: 12.5, 6: 6.5}, LAYERS, CHANNELS)
    assert taken == [*taken[:5]] * 10
    assert latency.measure_latency(model, window, 0).times == {0: 24.5}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_a_measured_layer_has_the_first_channels(model_type):
    """It gives what the layer gives without the other columns of its output projection."""
    adapter = ModelAdapter(pico_decoder(model_type))
    states, keywords = adapter.layer_inputs(torch.arange(3, 11)[None])
    narrow = run_layer(latency._narrower(adapter, 1, 5), states, keywords[1])
    name = next(name for name in adapter.layer_layout(1).last.weights)
    adapter.layer_state(1)[name][:, 5:] = 0
    torch.testing.assert_close(narrow, run_layer(adapter.layer(1), states, keywords[1]))
