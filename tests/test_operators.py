"""Properties of operators, norm folding and unit allocation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from come.merge.norms import fold_norms
from come.merge.operators.average import Average
from come.merge.operators.concat import Concat
from come.merge.operators.drop import Drop
from come.merge.refit.none import NoRefit
from come.merge.retention.bi_power import BIPower
from come.merge.retention.mka import MKA
from come.merge.sensitivity.come import Come
from come.merge.span import LayerSpan
from come.merge.units import allocate_units, top_units
from come.models.adapter import ModelAdapter
from come.statistics.layer_statistics import LayerStatistics
from come.stream.stream import LayerStream
from tests.conftest import pico
from tests.methods import sublayer_of
from tests.reference import UNITS

ALL = {"kv_group": 0, "channel": 0}


def layer_output(adapter, index, state, windows):
    """Output of layer `index` with the tensors `state` on its inputs in the model."""
    states, kwargs = adapter.layer_inputs(windows)
    adapter.layers[index].load_state_dict(state)
    return adapter.layers[index](states, **kwargs[index])


def test_folding_norms_preserves_the_layer_output(family, windows):
    adapter = ModelAdapter(pico(family))
    state = {k: v.clone() for k, v in adapter.layer_state(1).items()}
    folded = fold_norms(state, adapter.roles())
    scale = f"{sublayer_of(adapter, 'kv_group').norm.module}.weight"
    assert torch.equal(folded[scale], torch.ones_like(folded[scale]))
    before = layer_output(adapter, 1, state, windows)
    after = layer_output(adapter, 1, folded, windows)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_layernorm_with_a_zero_scale_is_not_folded():
    adapter = ModelAdapter(pico("opt", enable_bias=False))
    state = {k: v.clone() for k, v in adapter.layer_state(1).items()}
    state["final_layer_norm.weight"][3] = 0
    folded = fold_norms(state, adapter.roles())
    assert torch.equal(folded["final_layer_norm.weight"], state["final_layer_norm.weight"])
    assert torch.equal(folded["fc1.weight"], state["fc1.weight"])


@pytest.mark.parametrize("which", [0, 1])
def test_one_hot_shares_with_folded_norms_reproduce_that_layer(family, windows, which):
    if family == "opt_nobias":
        return  # a LayerNorm bias that cannot be folded into a projection is averaged
    adapter = ModelAdapter(pico(family))
    layers = [{k: v.clone() for k, v in adapter.layer_state(i).items()} for i in (1, 2)]
    everything = {u: list(range(n)) for u, n in adapter.unit_counts.items()}
    kept = {u: [everything[u] if i == which else [] for i in range(2)] for u in UNITS}
    shares = [float(i == which) for i in range(2)]
    folded = [fold_norms(layer, adapter.roles()) for layer in layers]
    merged = Concat().merge(folded, adapter.roles(), shares, kept)
    expected = layer_output(adapter, 1, layers[which], windows)
    found = layer_output(adapter, 1, merged, windows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_averaging_identical_layers_gives_that_layer(family):
    adapter = ModelAdapter(pico(family))
    layer = adapter.layer_state(2)
    merged = Average().merge([layer, layer], adapter.roles(), [0.25, 0.75], {})
    for name, tensor in layer.items():
        torch.testing.assert_close(merged[name], tensor)


def test_complementary_units_of_identical_layers_give_that_layer(family, windows):
    adapter = ModelAdapter(pico(family))
    layer = {k: v.clone() for k, v in adapter.layer_state(2).items()}
    kept = {u: [list(range(1, n)), [0]] for u, n in adapter.unit_counts.items()}
    merged = Concat().merge([layer, layer], adapter.roles(), [0.5, 0.5], kept)
    expected = layer_output(adapter, 2, layer, windows)
    found = layer_output(adapter, 2, merged, windows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(merged[name], layer[name]) for name in layer)


def test_merged_tensors_keep_shape_and_dtype(family):
    adapter = ModelAdapter(pico(family).bfloat16())
    layers = [fold_norms(adapter.layer_state(i), adapter.roles()) for i in (0, 1)]
    kept = {
        u: [list(range(n // 2)), list(range(n // 2, n))] for u, n in adapter.unit_counts.items()
    }
    for operator in (Concat(), Average()):
        merged = operator.merge(layers, adapter.roles(), [0.4, 0.6], kept)
        for name, tensor in adapter.layer_state(0).items():
            assert merged[name].shape == tensor.shape
            assert merged[name].dtype == tensor.dtype == torch.bfloat16


@given(
    st.integers(1, 40),
    st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda w: sum(w) > 1e-3),
)
def test_allocation_gives_the_remaining_units_to_the_largest_share(count, weights):
    shares = [w / sum(weights) for w in weights]
    kept = allocate_units(count, shares)
    largest = shares.index(max(shares))
    assert sum(kept) == count
    assert all(k == int(count * s) for i, (k, s) in enumerate(zip(kept, shares)) if i != largest)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    assert top_units(scores, 2) == [1, 2]
    assert top_units(scores, 4) == [0, 1, 2, 4]
    assert top_units(scores, 0) == []


def span_with_influences(*influences):
    stream = LayerStream(ModelAdapter(pico("llama_gqa")), torch.zeros(1, 4, dtype=torch.long))
    statistics = [LayerStatistics(bi, {}) for bi in influences]
    spans = [[i] for i in range(len(influences))]
    layers = range(len(influences))
    return LayerSpan(stream, layers, spans, statistics, Drop(), "mean", NoRefit(), Come())


def test_bi_power_edge_cases():
    assert BIPower(p=0.0).shares(span_with_influences(0.1, 0.9)) == [0.5, 0.5]
    assert BIPower(p=1.0).shares(span_with_influences(0.0, 0.0)) == [0.5, 0.5]
    assert BIPower(p=400.0).shares(span_with_influences(0.001, 0.002))[1] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"merge.retention.p=-1.0: must be a number of at least 0"):
        BIPower(p=-1.0)


def test_mka_weights_of_three_layers_are_equal():
    assert MKA().shares(span_with_influences(0.1, 0.2, 0.3)) == [1 / 3] * 3
