"""Refits of output projections that a norm follows, against plain float64."""

import pytest
import torch

from come.merge import normed_output
from come.merge.apply import source_layers_of
from come.merge.loop import compress
from come.merge.normed_output import OutputNorm, scaled_features, solve_normed_output
from come.merge.operators.base import OPERATORS
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.ridge import Ridge
from come.models.adapter import ModelAdapter
from come.models.layer_state import overlay
from come.models.sublayers import hidden_features, run_layer, states_after
from come.stream.stream import LayerStream
from tests.decoders import pico_decoder
from tests.methods import come_plus, paper

TYPES = ["gemma3_text", "gemma4_unified_text", "glm4", "hyperclovax", "olmo2"]


def windows_of(model, count=48, seq=16, seed=5):
    vocabulary = model.config.vocab_size
    return torch.randint(3, vocabulary, (count, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def opened():
    streams = []

    def make(model_type, windows=None):
        model = pico_decoder(model_type)
        stream = LayerStream(
            ModelAdapter(model),
            windows_of(model) if windows is None else windows,
            batch_size=4,
            progress=False,
        )
        streams.append(stream)
        stream.embed()
        stream.advance(0, stream.num_layers - 1)
        stream.snapshot_dense()
        return stream

    yield make
    for stream in streams:
        stream.__exit__(None, None, None)


def pair(stream, norms="fold"):
    """Targets and sources of the first two layers, merged by halves."""
    adapter = stream.adapter
    layout = adapter.layer_layout(0)
    kept = {
        each.unit: [[*range(each.count // 2)], [*range(each.count // 2, each.count)]]
        for each in layout
    }
    sources = source_layers_of(adapter, [0, 1], OPERATORS.create("concat"), norms, [0.5, 0.5], kept)
    return ReconstructionTargets(stream, 0, 1, original=1), sources


def plain_norm(adapter, index, sublayer, outputs):
    """g * x / sqrt(mean x^2 + eps) in float64."""
    norm = adapter.layer(index).get_submodule(sublayer.post_norm.module)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    scale = norm.weight.double() + sublayer.post_norm.offset
    return scale * outputs / (outputs.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_output_is_linear_in_scaled_features(model_type, opened):
    """(diag(g) W)(s_t f_t) is the norm of W f_t."""
    stream = opened(model_type)
    adapter, states = stream.adapter, stream.boundary(0, stream.batches[0])
    layer, layout = adapter.layer(0), adapter.layer_layout(0)
    keywords = stream.keywords(len(states), 0)
    for sublayer in layout:
        read = states if sublayer.stage == 0 else states_after(
            layer, layout, layout.read_after(sublayer), states, keywords
        )  # fmt: skip
        features = hidden_features(layer, layout, sublayer, read, keywords)
        weight = adapter.output_weight(0, sublayer).double()
        expected = plain_norm(adapter, 0, sublayer, features.double() @ weight.T)
        scale = OutputNorm(layer, sublayer).scale.double()
        found = scaled_features(layer, sublayer, features).double() @ (scale[:, None] * weight).T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_one_round_is_the_ridge_solution(model_type, opened, monkeypatch):
    """Rows and targets of all tokens stacked with the penalty, in float64; then g by channel."""
    monkeypatch.setattr(normed_output, "ROUNDS", 1)
    stream = opened(model_type)
    targets, sources = pair(stream)
    adapter, sublayer, ratio = stream.adapter, stream.adapter.layer_layout(0).sublayers[0], 0.3
    layer = adapter.copy_layer(0, sources.state)
    found = solve_normed_output(targets, layer, sublayer, ratio, None)

    states = torch.cat([batch.states for batch in targets])
    keywords = stream.keywords(4, 0)
    features = torch.cat(
        [
            hidden_features(layer, adapter.layer_layout(0), sublayer, part, keywords)
            for part in states.split(4)
        ]
    ).flatten(0, 1).double()  # fmt: skip
    missing = torch.cat([batch.missing(sublayer, batch.states) for batch in targets])
    missing = missing.flatten(0, 1).double()
    weights = torch.cat([batch.weights for batch in targets]).double()
    weight = adapter.output_weight(0, sublayer)
    weight = layer.get_submodule(sublayer.output).weight.double()
    norm = layer.get_submodule(sublayer.post_norm.module)
    scale = norm.weight.double() + sublayer.post_norm.offset
    eps = getattr(norm, "eps", None) or norm.variance_epsilon

    def inverse(outputs):
        return (outputs.square().mean(dim=-1, keepdim=True) + eps).rsqrt()

    rows = features * inverse(features @ weight.T)
    gram = (rows * weights[:, None]).T @ rows
    penalty = ratio * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    start = scale[:, None] * weight
    solved = torch.linalg.solve(
        gram + penalty, (rows * weights[:, None]).T @ missing + penalty @ start.T
    ).T
    expected = solved / scale[:, None]
    torch.testing.assert_close(
        found[f"{sublayer.output}.weight"].double(), expected, rtol=1e-3, atol=1e-4
    )
    outputs = features @ expected.T
    normed = outputs * inverse(outputs)
    best = (weights[:, None] * missing * normed).sum(0) / (weights[:, None] * normed**2).sum(0)
    stored = found[f"{sublayer.post_norm.module}.weight"].double() + sublayer.post_norm.offset
    torch.testing.assert_close(stored, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_layer_that_hits_its_target_stays(model_type, opened):
    """Fitted to its own output with its own units, a layer gives the same output."""
    stream = opened(model_type)
    targets = ReconstructionTargets(stream, 0, 0, original=0)
    sources = source_layers_of(stream.adapter, [0], OPERATORS.create("drop"), "mean", [1.0], {})
    found = Ridge().solve(targets, sources)
    layer = stream.adapter.copy_layer(0, overlay(sources.state, found))
    for batch in targets:
        output = run_layer(layer, batch.states, stream.keywords(len(batch.states), 0))
        torch.testing.assert_close(output, batch.output, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_refit_helps_on_unseen_windows(model_type, opened):
    """The error of the merged layer, on windows that it was not fitted to."""
    stream = opened(model_type)
    targets, sources = pair(stream)
    found = Ridge().solve(targets, sources)
    unseen = opened(model_type, windows_of(stream.adapter.model, seed=9))
    errors = []
    for state in (sources.state, overlay(sources.state, found)):
        layer = stream.adapter.copy_layer(0, state)
        gaps = [
            run_layer(layer, unseen.boundary(0, rows), unseen.keywords(4, 0))
            - unseen.boundary(2, rows)
            for rows in unseen.batches
        ]
        errors.append(torch.cat(gaps).square().mean().item())
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (come_plus(refit__downstream=0.1), "merge.refit.downstream=0.1 solves for the last"),
    ],
)
def test_refits_of_the_last_projection_are_refused(method, message):
    model = pico_decoder("gemma3_text")
    with pytest.raises(ValueError, match=message):
        compress(model, windows_of(model), method, target_layers=3, progress=False)


@pytest.mark.parametrize("model_type", ["gemma3_text", "glm4", "hyperclovax", "olmo2"])
@torch.no_grad()
def test_replaceme_maps_what_the_norm_reads(model_type):
    """In float64: T by least squares with the norm's factors s_t held fixed, twice; then g."""
    model, dense = pico_decoder(model_type), ModelAdapter(pico_decoder(model_type))
    windows, sublayer = windows_of(model), dense.layer_layout(1).last
    norm = dense.layer(1).get_submodule(sublayer.post_norm.module)
    seen = {"m": [], "y": [], "h2": [], "h4": []}

    def record(name, module):
        def hook(module, inputs, output):
            seen[name].append((output[0] if isinstance(output, tuple) else output).detach())

        module.register_forward_hook(hook)

    record("m", dense.output_map(1, sublayer))
    record("y", norm)
    record("h2", dense.layer(1))
    record("h4", dense.layer(3))
    dense.model(windows, use_cache=False)
    m, y, h2, h4 = (torch.cat(seen[name]).flatten(0, 1).double() for name in seen)
    wanted = y + h4 - h2
    g = norm.weight.double() + sublayer.post_norm.offset
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    transform = torch.eye(m.shape[1], dtype=torch.float64)
    for _ in range(2):
        rows = m * ((m @ transform.T).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        transform = torch.linalg.lstsq(rows, wanted).solution.T / g[:, None]
    normed = m @ transform.T
    normed = normed * (normed.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    scale = (wanted * normed).sum(0) / normed.square().sum(0)

    method = paper(operator="drop", refit="replaceme", groups=((1, 2, 3),))
    compress(model, windows, method, target_layers=model.config.num_hidden_layers - 2)
    found = ModelAdapter(model)
    weight = transform @ dense.output_weight(1, sublayer).double()
    torch.testing.assert_close(
        found.output_weight(1, sublayer).double(), weight, rtol=1e-2, atol=1e-3
    )
    stored = found.layer(1).get_submodule(sublayer.post_norm.module).weight.double()
    torch.testing.assert_close(stored + sublayer.post_norm.offset, scale, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_scaled_outputs_scale_what_a_layer_adds():
    adapter = ModelAdapter(pico_decoder("gemma3_text"))
    states, keywords = adapter.layer_inputs(windows_of(adapter.model, 4))
    layer, layout = adapter.layer(0), adapter.layer_layout(0)
    first = layout.sublayers[0]
    before = states_after(layer, layout, first, states, keywords[0]) - states
    scaled = adapter.copy_layer(0, overlay(adapter.layer_state(0), adapter.scaled_outputs(
        0, adapter.layer_state(0), 0.5
    )))  # fmt: skip
    after = states_after(scaled, layout, first, states, keywords[0]) - states
    torch.testing.assert_close(after, before / 2, rtol=1e-4, atol=1e-5)


def test_paper_merges_models_with_norms_after_sublayers():
    model = pico_decoder("gemma3_text")
    plan = compress(model, windows_of(model), paper(), target_layers=3, progress=False)
    assert plan.num_layers == model.config.num_hidden_layers == 3
