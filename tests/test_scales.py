"""Layers that multiply the residual stream: the scale of a merged layer, its units and targets."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.merge.apply import apply, block_states, source_layers_of
from come.merge.constraints import SpanConstraints
from come.merge.input_map import InputMap
from come.merge.loop import compress
from come.merge.operators.base import OPERATORS
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import check_linear_output
from come.merge.refit.ridge import Ridge
from come.merge.scales import SpanScale
from come.merge.stacked_map import StackedMap
from come.models.adapter import ModelAdapter
from come.models.families import layout_of
from come.models.layer_state import overlay
from come.models.sublayers import run_layer, states_after
from come.stream.stream import LayerStream
from tests.conftest import pico
from tests.decoders import DECODERS, pico_decoder
from tests.methods import come_plus, dropped_layers, paper, recipe, same_weights

TYPE = "gemma4_unified_text"
SCALES = [0.25, 1.5, 0.75, 0.5, 2.0, 0.8]
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def tokens(count=16, seq=16):
    return torch.randint(3, 96, (count, seq), generator=torch.Generator().manual_seed(5))


def scaled(silent=()):
    """A model whose layers have the scales of `SCALES`; silent ones multiply by them only."""
    model = pico_decoder(TYPE)
    for index, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(SCALES[index])
        if index in silent:
            for name in SILENT:
                layer.get_parameter(name).data.zero_()
    return model


def opened(model, windows=None):
    stream = LayerStream(
        ModelAdapter(model), tokens() if windows is None else windows, batch_size=4, progress=False
    )
    stream.embed()
    stream.advance(0, stream.num_layers - 1)
    stream.snapshot_dense()
    return stream


def sources_of(adapter, operator, which):
    """Layers 0 and 1 as one layer with all units of one of them."""
    counts = adapter.layer_layout(0).unit_counts.items()
    kept = {unit: [range(n) if i == which else [] for i in range(2)] for unit, n in counts}
    shares = [float(i == which) for i in range(2)]
    return source_layers_of(
        adapter, [0, 1], OPERATORS.create(operator), "fold", shares, kept, which
    )


def outputs(stream, state):
    """The outputs of a layer like layer 0 on its input, batch by batch."""
    layer = stream.adapter.copy_layer(0, state)
    return [
        run_layer(layer, stream.boundary(0, rows), stream.keywords(4, 0)) for rows in stream.batches
    ]


def assert_span(stream, state):
    """A layer with these tensors gives the output of layers 0 and 1."""
    for rows, found in zip(stream.batches, outputs(stream, state), strict=True):
        torch.testing.assert_close(found, stream.boundary(2, rows), rtol=1e-3, atol=1e-4)


def test_scales_of_a_span():
    adapter = ModelAdapter(scaled())
    scale = SpanScale.of(adapter, [0, 1, 3])
    assert scale.whole == 0.25 * 1.5 * 0.75 * 0.5
    assert scale.factors == [1, 1 / 0.25, 1 / (0.25 * 1.5 * 0.75)]
    plain = ModelAdapter(pico("llama_mha"))
    assert SpanScale.of(plain, [0, 1]) == SpanScale(1.0, [1.0, 1.0])
    assert SpanScale.of(plain, [0]).tensors(plain, 0, plain.layer_state(0), 0) == {}


def test_whole_scale_is_what_a_narrow_layer_stores():
    adapter = ModelAdapter(scaled().to(torch.bfloat16))
    adapter.layers[0].layer_scalar.fill_(0.3)
    adapter.layers[1].layer_scalar.fill_(0.7)
    exact = adapter.layers[0].layer_scalar.double() * adapter.layers[1].layer_scalar.double()
    whole = SpanScale.of(adapter, [0, 1]).whole
    assert whole == exact.bfloat16().item() != exact.item()


@pytest.mark.parametrize("operator", ["concat", "average", "laco_released"])
@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_one_layer_of_a_span_counts_in_the_units_of_the_merged_layer(operator, which):
    """If the other layer adds nothing, the merged layer gives the span's output."""
    if operator == "laco_released" and which == 0:
        return  # it keeps the last layer
    stream = opened(scaled(silent=[1 - which]))
    assert_span(stream, sources_of(stream.adapter, operator, which).state)


@torch.no_grad()
def test_a_drop_keeps_its_layer_as_it_is():
    model, windows = scaled(), tokens()
    plan = compress(model, windows, recipe("shortgpt"), target_layers=4, progress=False)
    expected = scaled()
    dropped = dropped_layers(plan)
    states = expected.model.embed_tokens(windows)
    _, keywords = ModelAdapter(expected).layer_inputs(windows)
    for index, layer in enumerate(expected.model.layers):
        if index not in dropped:
            states = run_layer(layer, states, keywords[index])
    logits = ModelAdapter(expected).head(expected.model.norm(states))
    torch.testing.assert_close(model(windows, use_cache=False).logits, logits)
    assert same_weights(model, apply(plan, scaled()))


@torch.no_grad()
def test_targets_inside_the_merged_layer():
    """Attention should add what those of both layers do, each in the units of the merged layer."""
    stream = opened(scaled())
    adapter, targets = stream.adapter, ReconstructionTargets(stream, 0, 1, original=1)
    for batch in targets:
        first, last = targets.layout.sublayers
        added = [
            states_after(adapter.layer(i), targets.layout, first, states, stream.keywords(4, i))
            - states
            for i in (0, 1)
            for states in [stream.boundary(i, batch.rows)]
        ]
        expected = added[0] + added[1] / SCALES[0]
        torch.testing.assert_close(batch.missing(first, batch.states), expected)
        before = batch.states + expected
        rest = batch.missing(last, before)
        whole = SCALES[0] * SCALES[1]
        torch.testing.assert_close(whole * (before + rest), stream.boundary(2, batch.rows))


@pytest.mark.parametrize("operator", ["concat", "drop"])
@torch.no_grad()
def test_refit_of_a_layer_that_can_hit_its_target(operator):
    """If one layer adds nothing, a refit gives the span's output, also after a drop."""
    for which in (0, 1):
        stream = opened(scaled(silent=[1 - which]))
        targets = ReconstructionTargets(stream, 0, 1, original=1, place=which)
        sources = sources_of(stream.adapter, operator, which)
        found = overlay(sources.state, Ridge().solve(targets, sources))
        assert found["layer_scalar"].item() == pytest.approx(SCALES[0] * SCALES[1])
        assert_span(stream, found)


@torch.no_grad()
def test_stacked_map_is_in_the_units_of_the_merged_layer():
    stream = opened(scaled())
    targets = ReconstructionTargets(stream, 0, 1, original=1)
    for sublayer in targets.layout:
        norm = f"{sublayer.post_norm.module}.weight"
        states = [stream.adapter.layer_state(i) for i in (0, 1)]
        maps = [state[norm][:, None] * sublayer.output_weight(state) for state in states]
        expected = torch.cat([maps[0], maps[1] / SCALES[0]], dim=1)
        torch.testing.assert_close(StackedMap(targets, sublayer).read().weight, expected)


@torch.no_grad()
def test_stacked_map_without_norms():
    stream = opened(pico("llama_bias"))
    targets = ReconstructionTargets(stream, 0, 1, original=1)
    vars(targets)["scale"] = SpanScale(0.5, [1.0, 4.0])
    sublayer = targets.layout.sublayers[0]
    states = [stream.adapter.layer_state(i) for i in (0, 1)]
    weights, biases = zip(*((s[sublayer.weights[0]], s[sublayer.bias]) for s in states))
    found = StackedMap(targets, sublayer).read()
    torch.testing.assert_close(found.weight, torch.cat([weights[0], 4 * weights[1]], dim=1))
    torch.testing.assert_close(found.bias, (biases[0] + 4 * biases[1]).double())


@torch.no_grad()
def test_error_of_input_maps_is_that_of_the_layer():
    stream = opened(scaled())
    targets = ReconstructionTargets(stream, 0, 1, original=1)
    state = sources_of(stream.adapter, "concat", 0).state
    layer, last = stream.adapter.copy_layer(0, state), targets.layout.last
    before = torch.cat(
        [
            states_after(layer, targets.layout, targets.layout.sublayers[0], b.states, k)
            for b in targets
            for k in [targets.keywords(4)]
        ]
    )
    problem = InputMap(targets, layer, last, (before, before), last.gates[0])
    gaps = [
        (stream.boundary(2, b.rows) - found).flatten(0, 1).square().sum(dim=1) @ b.weights
        for b, found in zip(targets, outputs(stream, state), strict=True)
    ]
    whole = SCALES[0] * SCALES[1]
    expected = sum(gaps).item() / whole**2
    assert problem.error(torch.zeros_like(problem.weight)) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_merged_attention_alone():
    """The attention of a later layer goes into an earlier one, which keeps its own scale."""
    adapter = ModelAdapter(scaled())
    places, counts = [0, 3], adapter.layer_layout(0).unit_counts.items()
    kept = {unit: [[], range(n)] for unit, n in counts}
    operator = OPERATORS.create("concat")
    merged = source_layers_of(adapter, places, operator, "mean", [0.0, 1.0], kept).state
    states = block_states(adapter, places, None, merged, "attention")
    norm = "post_attention_layernorm.weight"
    between = SCALES[0] * SCALES[1] * SCALES[2]
    torch.testing.assert_close(states[0][norm], adapter.layer_state(3)[norm] / between)
    assert [states[i]["layer_scalar"].item() for i in places] == [SCALES[0], SCALES[3]]
    assert states[3]["self_attn.o_proj.weight"].count_nonzero() == 0


@pytest.mark.parametrize("method", [paper, come_plus])
def test_plan_rebuilds_the_merged_model(method):
    model = scaled()
    plan = compress(model, tokens(), method(), target_layers=5, progress=False)
    first, last = plan.steps[0].first, plan.steps[0].last
    found = model.model.layers[first].layer_scalar.item()
    expected = torch.tensor(SCALES[first : last + 1]).prod().item()
    assert found == pytest.approx(expected)
    assert same_weights(model, apply(plan, scaled()))


def test_refits_of_the_last_projection_are_refused():
    (layout, *_) = layout_of(pico("llama_mha").config).layers
    check_linear_output("merge.refit=replaceme", [layout])
    with pytest.raises(ValueError, match=r"a scale follows it \(layer_scalar\)"):
        check_linear_output("merge.refit=replaceme", [replace(layout, scale="layer_scalar")])


def test_values_of_each_layer_stay_with_it(tmp_path):
    """Heads of full attention keep their size when layers before them are dropped."""
    model = scaled()
    adapter = ModelAdapter(model)
    adapter.replace(0, 1, adapter.layer_state(1), slot=1)
    found = [adapter.config.per_layer_config[i] for i in range(5)]
    assert [own.head_dim for own in found] == [16, 24, 16, 16, 24]
    assert [own.num_key_value_heads for own in found] == [2, 1, 2, 2, 1]
    assert [layout.sublayers[0].count for layout in adapter.layout.layers] == [2, 1, 2, 2, 1]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert layout_of(again.config) == adapter.layout


def test_inputs_of_full_attention():
    """Its keys are also its values, and it is of a kind of its own even with the same heads."""
    same = {"global_head_dim": 16, "num_global_key_value_heads": 2, "attention_k_eq_v": False}
    for keys, full in (({}, ["q_proj", "k_proj"]), (same, ["q_proj", "k_proj", "v_proj"])):
        layouts = layout_of(DECODERS[TYPE](**keys)).layers
        inputs = [[rows.name for rows in own.sublayers[0].inputs] for own in layouts[1:3]]
        expected = ["q_proj", "k_proj", "v_proj"], full
        assert inputs == [[f"self_attn.{name}" for name in own] for own in expected]
        assert [own.kind for own in layouts[1:3]] == ["sliding_attention", "full_attention"]


def test_kinds_have_different_tensors():
    """`merge.kinds=first` does not merge full attention with attention in a window."""
    method = paper(groups=((1, 2),), kinds="first")
    with pytest.raises(ValueError, match=r"merge.groups has \[1, 2\], layers of several kinds"):
        compress(scaled(), tokens(), method, target_layers=5, progress=False)


def test_last_layer_keeps_its_kind():
    """Transformers loads the last layer as full attention, whatever the configuration says."""
    model = scaled()
    adapter = ModelAdapter(model)
    with pytest.raises(ValueError, match="removing layers 5 makes layer 4 the last one"):
        adapter.replace(4, 5, adapter.layer_state(4))
    adapter.replace(3, 4, adapter.layer_state(4), slot=1)
    adapter.replace(3, 4, adapter.layer_state(4), slot=1)
    assert adapter.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    adapter.replace(2, 3, adapter.layer_state(2))
    assert adapter.num_layers == 3


def test_drops_leave_a_last_layer_of_its_kind():
    needed = ModelAdapter(scaled()).needed_layers
    rules = SpanConstraints(2, drops=True, needed=needed, needs_last=True)
    history = [[index] for index in range(6)]
    assert rules.spans(history, 5) == [(i, i) for i in range(5)]
    late = replace(rules, protect_first=5)
    with pytest.raises(ValueError, match="would leave a last one of a kind"):
        late.spans(history, 5)
    model, method = scaled(), recipe("reverse")
    plan = compress(model, tokens(), method, target_layers=4, progress=False)
    assert 5 not in dropped_layers(plan)
    assert model.config.layer_types[-1] == "full_attention"


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 12}),
        ("gemma4_text", {"num_kv_shared_layers": 2}),
        ("gemma4_text", {"enable_moe_block": True}),
        ("gemma4", {"num_kv_shared_layers": 2}),
        ("gemma4_unified_text", {"use_bidirectional_attention": "all"}),
    ],
)
def test_other_forms_are_refused(model_type, keys):
    config = DECODERS[model_type](**keys)
    with pytest.raises(ValueError, match=f"config.{next(iter(keys))}="):
        layout_of(config)
