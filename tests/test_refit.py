"""Refits against plain float64 solutions, and properties of the refit for every operator."""

import pytest
import torch
from torch import nn

from come.linalg.equations import Map, choice_dtype, eliminate
from come.linalg.gram import BLOCK, Gram, best_lambda
from come.merge.loop import compress
from come.merge.reconstruction import ReconstructionTargets
from come.models.adapter import ModelAdapter
from come.models.sublayers import hidden_features, states_after
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import decoder_layers, paper
from tests.reference import Reference


def plain_ridge(features, targets, weights, start, bias, penalty):
    """Weighted ridge regression as one float64 least-squares problem; no penalty on the bias."""
    root = weights.double().sqrt()[:, None]
    columns = features.double()
    if bias is not None:
        columns = torch.cat([columns, torch.ones(len(columns), 1).double()], dim=1)
    width = features.shape[1]
    ridge = torch.zeros(width, columns.shape[1]).double()
    ridge[:, :width] = penalty**0.5 * torch.eye(width).double()
    left = torch.cat([columns * root, ridge])
    right = torch.cat([targets.double() * root, penalty**0.5 * start.double().T])
    solved = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    return solved[:, :width], solved[:, width] if bias is not None else None


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def problem(request):
    generator = torch.Generator().manual_seed(0)
    features, targets, start, bias = (
        torch.randn(shape, generator=generator).double()
        for shape in ((50, 8), (50, 3), (3, 8), (3,))
    )
    weights = torch.rand(50, generator=generator).double()
    initial = Map(start, bias if request.param else None)
    sums = Gram(8, 3, bias=request.param)
    for rows in torch.arange(50).split(7):
        sums.add(features[rows], targets[rows], weights[rows])
    return features, targets, weights, initial, sums


def residual(found, features, targets, weights):
    error = targets - features @ found.weight.T - (0 if found.bias is None else found.bias)
    return float((weights * error.square().sum(dim=1)).sum())


def test_gram_solves_the_weighted_ridge_problem(problem):
    features, targets, weights, initial, sums = problem
    penalty = 0.3 * sums.mean_diagonal()
    found = sums.solve(initial, penalty)
    weight, bias = plain_ridge(features, targets, weights, initial.weight, initial.bias, penalty)
    torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-6)
    if bias is not None:
        torch.testing.assert_close(found.bias, bias, rtol=1e-5, atol=1e-6)
    expected = residual(found, features, targets, weights)
    assert sums.error(found) == pytest.approx(expected, rel=1e-8)
    assert expected < sums.error(initial)


def test_wide_gram_matrix_is_symmetric_between_additions():
    features = torch.randn(40, 2 * BLOCK + 3, generator=torch.Generator().manual_seed(0)).double()
    sums = Gram(features.shape[1], 2, bias=False)
    for rows in torch.arange(40).split(20):
        sums.add(features[rows], torch.zeros(len(rows), 2), torch.full((len(rows),), 0.5))
        expected = 0.5 * features[: rows[-1] + 1].T @ features[: rows[-1] + 1]
        torch.testing.assert_close(sums.gram, expected)
    both = sums + sums
    torch.testing.assert_close(both.gram, 2 * expected)


@pytest.mark.parametrize("best", [0.01, 1.0, 100.0])
def test_lambda_minimises_the_held_out_error(best, problem):
    """The held-out targets are the outputs of the map that one lambda of the grid gives."""
    features, _, weights, initial, sums = problem
    exact = sums.solve(initial, best * sums.mean_diagonal())
    held_out = Gram(8, 3, bias=initial.bias is not None)
    outputs = nn.functional.linear(features.double(), exact.weight, exact.bias)
    held_out.add(features[:10], outputs[:10], weights[:10])
    assert best_lambda(sums, held_out, initial, (0.01, 1.0, 100.0)) == best


@pytest.mark.parametrize("size", [1, 2])
def test_elimination_minimises_the_penalised_error(problem, size):
    features, targets, weights, initial, sums = problem
    penalty = 0.1 * sums.mean_diagonal()

    def minimal_error(units):
        """The minimal penalised error with the columns of all other units at zero."""
        columns = torch.tensor([u * size + i for u in units for i in range(size)])
        weight, bias = plain_ridge(
            features[:, columns],
            targets,
            weights,
            initial.weight[:, columns],
            initial.bias,
            penalty,
        )
        whole = torch.zeros_like(initial.weight)
        whole[:, columns] = weight
        error = residual(Map(whole, bias), features, targets, weights)
        return error + penalty * float((whole - initial.weight).square().sum())

    alive = list(range(8 // size))
    while len(alive) > 2:
        alive = min(([u for u in alive if u != removed] for removed in alive), key=minimal_error)
    assert eliminate(sums, initial, penalty, keep=2, size=size, rate=1e-9)[0] == alive


@pytest.mark.parametrize("ratio", [0.01, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_elimination_in_float32_keeps_the_same_columns(bias, ratio):
    """On features of low rank with one large direction, as in language models."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 20, generator=generator) @ torch.randn(20, 120, generator=generator)
    features = mixed + 0.3 * torch.randn(500, 120, generator=generator) + 5
    targets = torch.randn(500, 4, generator=generator) + features[:, :4]
    initial = Map(torch.zeros(4, 120), torch.zeros(4) if bias else None)
    kept = []
    for dtype in (torch.float64, torch.float32):
        sums = Gram(120, 4, bias=bias, dtype=dtype)
        sums.add(features, targets, torch.ones(500))
        assert sums.gram.dtype == sums.moment.dtype == sums.columns(torch.arange(3)).gram.dtype
        assert sums.gram.dtype == dtype
        kept.append(eliminate(sums, initial, ratio * sums.mean_diagonal(), 60, 1, 0.3)[0])
    assert kept[0] == kept[1]


def test_choice_dtype():
    assert choice_dtype(4 * 1536, 0.1) == torch.float32
    assert choice_dtype(4 * 1536, 0.01) == torch.float64
    assert choice_dtype(4 * 1536, 0.1, bias=True) == torch.float64


def test_sublayers_compose_to_the_layer(family, windows):
    adapter = ModelAdapter(pico(family))
    reference = Reference(pico(family), windows)
    states, keywords = adapter.layer_inputs(windows)
    layer, layout, seen = adapter.layers[0], adapter.layer_layout(0), []
    attention, ffn = layout.sublayer("attention"), layout.sublayer("ffn")
    hook = layer.get_submodule(attention.output).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        expected = layer(states, **keywords[0])
    hook.remove()
    heads = hidden_features(layer, layout, attention, states, keywords[0])
    post_attention = states_after(layer, layout, attention, states, keywords[0])
    channels = hidden_features(layer, layout, ffn, post_attention, keywords[0])
    output = layer.get_submodule(ffn.output)
    with torch.no_grad():
        torch.testing.assert_close(post_attention + output(channels), expected)
    assert torch.equal(heads, seen[0].view(heads.shape))
    for features, unit in ((heads, "kv_group"), (channels, "channel")):
        torch.testing.assert_close(
            features.flatten(0, 1).double(), reference.inputs[0, unit], rtol=1e-3, atol=1e-4
        )


def activations(layer, post_attention):
    """FFN activations of a LLaMA or OPT layer."""
    if hasattr(layer, "fc1"):
        return torch.relu(layer.fc1(layer.final_layer_norm(post_attention)))
    mlp, normed = layer.mlp, layer.post_attention_layernorm(post_attention)
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


@pytest.mark.parametrize("weighting", ["relative", "equal"])
@pytest.mark.parametrize("family", ["llama_gqa", "llama_bias", "opt"])
@torch.no_grad()
def test_refit_of_a_drop_equals_the_formula(family, weighting, windows):
    """Layer 3 is refitted to the output of layers 3 and 4, in float64 from the dense states."""
    model, reference = pico(family), Reference(pico(family), windows)
    method = paper(
        operator="drop",
        groups=((3, 4),),
        refit="ridge",
        refit__lambda=0.2,
        refit__weights=weighting,
    )
    compress(model, windows, method, target_layers=LAYERS - 1, progress=False)
    layer, new = reference.layers[3], decoder_layers(model)[3]

    def added(index):
        return reference.output(index, "kv_group")(reference.inputs[index, "kv_group"])

    x, output = (reference.h[i].flatten(0, 1) for i in (3, 5))
    weights = 1 / output.square().mean(dim=1) if weighting == "relative" else torch.ones(len(x))
    heads = reference.inputs[3, "kv_group"]
    old = reference.output(3, "kv_group")
    penalty = 0.2 * (weights[:, None] * heads.square()).sum(dim=0).mean()
    target = added(3) + added(4)
    weight, bias = plain_ridge(heads, target, weights, old.weight, old.bias, float(penalty))
    found = new.self_attn.out_proj if reference.is_opt else new.self_attn.o_proj
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-2, atol=1e-4)
    post_attention = x + heads @ weight.T + (0 if bias is None else bias)
    channels = activations(layer, post_attention)
    old = reference.output(3, "channel")
    penalty = 0.2 * (weights[:, None] * channels.square()).sum(dim=0).mean()
    weight, bias = plain_ridge(
        channels, output - post_attention, weights, old.weight, old.bias, float(penalty)
    )
    found = new.fc2 if reference.is_opt else new.mlp.down_proj
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-2, atol=1e-3)
    if bias is not None:
        torch.testing.assert_close(found.bias.double(), bias, rtol=1e-2, atol=1e-3)


OPERATORS = [
    {"operator": "concat"},
    {"operator": "concat", "retention": "adaptive", "norms": "fold"},
    {"operator": "concat", "m": 3, "retention": "adaptive", "norms": "fold"},
    {"operator": "concat", "retention": "adaptive", "norms": "fold", "schedule": "one_shot"},
    {"operator": "concat", "retention": "leverage", "norms": "fold"},
    {"operator": "average"},
    {"operator": "laco"},
    {"operator": "average", "retention": "mka"},
    {"operator": "drop", "selection": "skip_loss"},
    {"operator": "drop", "selection": "bi_sum", "schedule": "one_shot"},
    {"operator": "drop", "groups": ((0, 1), (3, 4))},
    {"operator": "drop", "selection": "refit_error"},
    {"operator": "concat", "selection": "refit_error"},
]


def final_states(model, windows):
    """The hidden states before the final norm."""
    with torch.no_grad():
        return Reference(model, windows).h[-1]


@pytest.mark.parametrize("parts", OPERATORS, ids=lambda parts: "-".join(map(str, parts.values())))
@pytest.mark.parametrize(
    ("family", "target"),
    [("llama_bias", "current"), ("qwen3_gqa", "dense"), ("opt", "dense")],
)
def test_refit_improves_every_operator(family, parts, target, windows):
    dense = final_states(pico(family), windows)

    def distance(**more):
        model = pico(family)
        method = paper(**parts, target=target, **more)
        compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
        return float((final_states(model, windows) - dense).square().mean())

    plain, refitted = distance(), distance(refit="ridge")
    assert refitted < 0.7 * plain
    assert distance(refit="ridge", downstream=0.1) <= refitted


def test_large_penalty_keeps_the_output_maps(windows):
    plain, penalised = pico("llama_bias"), pico("llama_bias")
    compress(plain, windows, paper(), target_layers=4, progress=False)
    method = paper(refit="ridge", refit__lambda=1e12)
    compress(penalised, windows, method, target_layers=4, progress=False)
    for layer, other in zip(decoder_layers(plain), decoder_layers(penalised), strict=True):
        torch.testing.assert_close(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight)
        torch.testing.assert_close(layer.mlp.down_proj.weight, other.mlp.down_proj.weight)


def test_disk_store_gives_the_same_plan(windows, tmp_path):
    method = paper(refit="gauss_newton", retention="adaptive", downstream=0.3, align=None)
    plans = [
        compress(
            pico("llama_gqa"),
            windows,
            method,
            target_layers=4,
            store=store,
            folder=tmp_path,
            progress=False,
        )
        for store in ("memory", "disk")
    ]
    assert plans[0].hash == plans[1].hash
    assert not list(tmp_path.iterdir())


def test_refit_of_selected_sublayers(windows):
    plan = compress(
        pico("llama_bias"),
        windows,
        paper(refit="ridge", refit__sublayers=["ffn"]),
        target_layers=5,
        progress=False,
    )
    assert set(plan.steps[0].solved.hashes) == {"mlp.down_proj.weight", "mlp.down_proj.bias"}


def test_weights_reach_a_refit_that_is_computed_after_all_choices(windows):
    found = {
        compress(
            pico("llama_gqa"), windows,
            paper(schedule="one_shot", refit="ridge", refit__weights=weights),
            target_layers=4, progress=False,
        ).hash
        for weights in ("relative", "equal")
    }  # fmt: skip
    assert len(found) == 2


def test_dense_snapshot_is_kept_after_a_change(windows):
    adapter = ModelAdapter(pico("llama_gqa"))
    with LayerStream(adapter, windows, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1, StatisticsCollector(adapter))
        stream.snapshot_dense()
        before = stream.boundary(4, slice(0, 2)).clone()
        adapter.scale_outputs(1, 0.5)
        stream.invalidate_from(1)
        stream.advance(1, LAYERS - 1)
        assert torch.equal(stream.dense(4, slice(0, 2)), before)
        assert not torch.equal(stream.boundary(4, slice(0, 2)), before)
        now = {"states": stream.boundary(2, slice(0, 2)), "output": stream.boundary(4, slice(0, 2))}
        for target, output in (("dense", before), ("current", now["output"])):
            batch = next(iter(ReconstructionTargets(stream, 2, 3, original=3, target=target)))
            assert torch.equal(batch.output, output), target
            assert torch.equal(batch.states, now["states"])


@pytest.mark.parametrize("operator", ["concat", "drop"])
def test_refit_error_score_is_the_error_after_the_merge(operator, windows):
    """The score of a candidate is the error of a model with only that span merged."""
    shared = {"operator": operator, "refit": "ridge", "protect_first": 1}
    method = paper(selection="refit_error", options={"shortlist": 3}, **shared)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=5, progress=False)
    step, dense = plan.steps[0], Reference(pico("llama_gqa"), windows)
    assert len(step.candidates) == 3
    assert step.score == min(candidate.score for candidate in step.candidates)
    for candidate in step.candidates:
        first, last = candidate.first - (operator == "drop"), candidate.last
        model = pico("llama_gqa")
        separate = paper(groups=((first, last),), operator=operator, refit="ridge")
        compress(model, windows, separate, target_layers=5, progress=False)
        found, target = Reference(model, windows).h[first + 1], dense.h[last + 1]
        relative = (found - target).square().mean(dim=-1) / target.square().mean(dim=-1)
        assert candidate.score == pytest.approx(float(relative.mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit": "rigde"}, "merge.refit='rigde': unknown refit; did you mean 'ridge'"),
        ({"refit": "ridge", "refit__lambda": 0}, "merge.refit.lambda=0: must be a number above 0"),
        ({"refit": "ridge", "refit__lambda": "best"}, "must be a number above 0, or auto"),
        (
            {"refit": "ridge", "refit__sublayers": ["mlp"]},
            r"merge.refit.sublayers=\['mlp'\]: must be",
        ),
        (
            {"refit": "ridge", "target": "teacher"},
            "merge.refit.target='teacher': must be one of auto, dense",
        ),
        ({"refit__weights": "norm"}, "merge.refit.weights='norm': must be one of relative"),
        ({"downstream": -1.0}, "merge.refit.downstream=-1.0: must be a number above 0, or null"),
        ({"refit": "adam", "options": {"steps": 0}}, "merge.refit.steps=0: must be"),
        (
            {"refit": "replaceme", "target": "dense"},
            "merge.refit.target='dense': must be",
        ),
        (
            {"downstream": 1.0, "sublayers": ("ffn",)},
            "merge.refit.downstream reconstructs whole layers",
        ),
        (
            {"refit": "ridge", "sublayers": ("ffn",)},
            "merge.refit=ridge reconstructs whole layers",
        ),
        (
            {"refit": "replaceme", "operator": "drop", "protect_first": 1, "sublayers": ("ffn",)},
            "merge.refit=replaceme reconstructs whole layers",
        ),
        (
            {"retention": "adaptive", "options": {"rate": 0.0}},
            "merge.retention.rate=0.0: must be",
        ),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(**settings)
