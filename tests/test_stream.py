"""The layer stream computes the hidden states of the model, in memory or on disk."""

import pytest
import torch

from come.merge.loop import compress
from come.models.adapter import ModelAdapter
from come.stream.boundaries import make_store
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import paper
from tests.reference import Reference


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_boundaries_equal_the_hidden_states(family, windows, store, tmp_path):
    model = pico(family)
    reference = Reference(model, windows)
    stream = LayerStream(
        ModelAdapter(model), windows, batch_size=2, store=store, folder=tmp_path, progress=False
    )
    with stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        for index in range(LAYERS + 1):
            found = torch.cat([after for _, after in stream.pairs(0, index)])
            torch.testing.assert_close(found.double(), reference.h[index], rtol=1e-4, atol=1e-5)
        logits = stream.adapter.head(stream.adapter.final_norm(found))
    torch.testing.assert_close(logits, model(windows).logits, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir())  # the disk store cleans up after itself


def test_only_layers_after_a_merge_are_recomputed(windows):
    model = pico("llama_gqa")
    calls: list[int] = []
    adapter = ModelAdapter(model)
    for index, layer in enumerate(adapter.layers):
        layer.mlp.register_forward_hook(lambda m, a, o, i=index: calls.append(i))
    plan = compress(model, windows, paper(), target_layers=LAYERS - 2, batch_size=5, progress=False)
    first = plan.steps[0].first
    removed = plan.steps[0].last
    suffix = [i for i in range(first, LAYERS) if i != removed]
    assert calls == [*range(LAYERS), *suffix]  # no pass after the last merge


def test_stores_give_the_same_plan(windows, tmp_path):
    plans = [
        compress(
            pico("qwen2_gqa"),
            windows,
            paper(tokens="all"),
            target_layers=3,
            store=store,
            folder=tmp_path,
            progress=False,
        )
        for store in ("memory", "disk")
    ]
    assert plans[0] == plans[1]


def test_layer_inputs_restores_forward(windows):
    model = pico("opt")
    before = model(windows).logits
    ModelAdapter(model).layer_inputs(windows)
    assert torch.equal(model(windows).logits, before)
    assert all("forward" not in vars(layer) for layer in ModelAdapter(model).layers)


def test_non_finite_hidden_states_are_an_error(windows):
    model = pico("llama_gqa")
    with torch.no_grad():
        ModelAdapter(model).layers[3].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layer 3 are not finite; try model.dtype"):
        compress(model, windows, paper(), target_layers=4, progress=False)


@pytest.mark.parametrize("pinned", [False, True])
def test_boundaries_use_page_locked_memory_if_available(pinned, monkeypatch):
    """Without a GPU, allocation falls back to ordinary memory."""
    tried, empty = [], torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, **how: tried.append("pin_memory" in how) or empty(*shape, **how),
    )
    store = make_store("memory", (2, 3, 4), torch.float32, pinned=pinned)
    assert store[0].shape == store[1].shape == (2, 3, 4)
    if not torch.cuda.is_available():
        assert tried == ([True, False, False] if pinned else [False, False])
