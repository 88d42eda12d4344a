"""experiments/subfit.py: free linear maps in place of dropped sublayers, against least squares."""

import itertools

import pytest
import torch

from come.merge.dropped import DroppedSublayer, SublayerDrops
from come.models.adapter import ModelAdapter
from come.models.layout import SUBLAYERS
from come.stream.stream import LayerStream
from tests.commands import ROOT, load_script
from tests.conftest import LAYERS, VOCAB, pico
from tests.decoders import pico_decoder
from tests.test_subfit import Watched

PLACES = [(1, "ffn"), (2, "attention"), (2, "ffn"), (5, "attention")]


@pytest.fixture
def subfit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return load_script("subfit")


def test_maps_in_place_of_sublayers(subfit):
    model = pico("llama_gqa").double()
    windows = torch.randint(3, VOCAB, (12, 16), generator=torch.Generator().manual_seed(3))
    dense = Watched(model, windows)
    drops = SublayerDrops(4, [DroppedSublayer(*place, 1, 0.0) for place in PLACES])
    with LayerStream(ModelAdapter(model), windows, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        stream.snapshot_dense()
        for _ in range(2):  # the second time on the model as it was
            with subfit.with_bypasses(stream, drops):
                found = Watched(model, windows)
            order = list(itertools.product(range(LAYERS), SUBLAYERS))
            for number, place in enumerate(order):
                x, after = found.streams[number : number + 2]
                y = dense.streams[number + 1]
                if place in PLACES:
                    root = y.square().mean(dim=1, keepdim=True).rsqrt()
                    change = torch.linalg.lstsq(root * x, root * (y - x)).solution
                    torch.testing.assert_close(after, x + x @ change, rtol=1e-3, atol=1e-3)
                else:
                    assert (after - x - (y - dense.streams[number])).abs().max() > 0 or number < 3
            assert not torch.allclose(found.logits, dense.logits)
    torch.testing.assert_close(Watched(model, windows).logits, dense.logits)


def test_the_bound_makes_the_choice_of_the_method(subfit):
    model = pico("llama_gqa")
    chosen = subfit.method()
    assert (chosen.schedule.name, chosen.refit.weights) == ("subfit", "relative")
    costs = [(1.0, 1.0), (1.0, 0.1), (0.1, 1.0), *[(1.0, 1.0)] * 3]
    drops = chosen.schedule.cheapest(ModelAdapter(model), costs, chosen, LAYERS - 1)
    assert [(each.layer, each.kind) for each in drops.sublayers] == [(1, "ffn"), (2, "attention")]


def test_sublayers_that_are_no_map_of_a_norm(subfit):
    adapter = ModelAdapter(pico_decoder("gemma2"))
    sublayer = adapter.layer_layout(0).last
    with (
        pytest.raises(ValueError, match="ffn is not a norm, then a map"),
        subfit.bypassed(adapter.layer(0), sublayer, torch.eye(2)),
    ):
        pass
