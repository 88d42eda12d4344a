"""Selection scores against plain float64 computations."""

import copy
import math

import pytest
import torch

from come.merge.loop import compress
from come.merge.selection.base import SELECTION
from come.models.adapter import ModelAdapter
from come.statistics.manifold import diffusion_map, shared_information
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, VOCAB, pico
from tests.methods import (
    SPANS,
    decoder_layers,
    loss,
    paper,
    scorer,
    without,
)
from tests.reference import Reference


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (y.T @ x).norm() ** 2
    return 1 - float(cross / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_scores_of_hidden_states(stream, windows, tokens):
    reference = Reference(stream.adapter.model, windows)
    for first, last in SPANS:

        def score(name, span=(first, last)):
            return scorer(name, tokens).score(stream, *span)

        influences = [reference.bi(i, tokens) for i in range(first, last + 1)]
        assert score("bi_sum") == pytest.approx(sum(influences), rel=1e-3)
        cosines = reference.cosines(first, last + 1, tokens)
        distance = sum(1 - c for c in cosines) / len(cosines)
        assert score("cosine") == pytest.approx(distance, rel=1e-3)
        angles = [math.acos(max(-1, min(1, c))) / math.pi for c in cosines]
        assert score("angular") == pytest.approx(sum(angles) / len(angles), rel=1e-3)
        states = (reference.h[i].flatten(0, 1) for i in (first, last + 1))
        assert score("cka") == pytest.approx(cka(*states), rel=1e-3, abs=1e-6)


def test_skip_loss_is_the_loss_without_the_span(stream, windows):
    for first, last in SPANS:
        smaller = without(stream.adapter.model, range(first, last + 1))
        with torch.no_grad():
            expected = float(loss(smaller, windows))
        found = SELECTION.create("skip_loss").score(stream, first, last)
        assert found == pytest.approx(expected, rel=1e-4)


def test_scores_of_weights(stream, windows):
    model = copy.deepcopy(stream.adapter.model).double().requires_grad_()
    loss(model, windows).backward()
    magnitude, taylor = SELECTION.create("magnitude"), SELECTION.create("taylor")
    taylor.prepare(stream)
    for first, last in SPANS:
        weights = [
            parameter
            for layer in decoder_layers(model)[first : last + 1]
            for parameter in layer.parameters()
            if parameter.dim() == 2
        ]
        expected = sum(float(w.detach().abs().sum()) for w in weights)
        assert magnitude.score(stream, first, last) == pytest.approx(expected, rel=1e-5)
        expected = sum(float((w * w.grad).detach().abs().sum()) for w in weights)
        assert taylor.score(stream, first, last) == pytest.approx(expected, rel=1e-3)


def test_npib_of_related_and_unrelated_states():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    other = torch.randn(64, 20, generator=generator, dtype=torch.float64)
    one, two = diffusion_map(points), diffusion_map(other)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0]
    assert one.shape == (64, 2)
    assert one.min() == 0
    assert one.max() < 1
    assert shared_information(one, one) == pytest.approx(1)
    assert shared_information(one, diffusion_map(points @ rotation)) > 0.8
    assert shared_information(one, two) < 0.3


def plain_diffusion_map(points):
    """Diffusion coordinates from loops and the eigenvectors of the transition matrix."""
    n = len(points)
    d = [[float((a - b).norm()) for b in points] for a in points]
    scale = [sorted(row)[8] for row in d]
    k = [[math.exp(-(d[i][j] ** 2) / (scale[i] * scale[j])) for j in range(n)] for i in range(n)]
    q = [sum(row) for row in k]
    k = [[k[i][j] / math.sqrt(q[i] * q[j]) for j in range(n)] for i in range(n)]
    p = torch.tensor([[value / sum(row) for value in row] for row in k], dtype=torch.float64)
    values, vectors = torch.linalg.eig(p)
    order = values.real.argsort(descending=True)
    return vectors.real[:, order[1:3]]


def test_diffusion_map_equals_the_plain_one():
    points = torch.randn(20, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, expected = diffusion_map(points), plain_diffusion_map(points)
    for axis in range(2):
        ranks = expected[:, axis].argsort().argsort().double() / 20
        flipped = (-expected[:, axis]).argsort().argsort().double() / 20
        assert torch.equal(found[:, axis], ranks) or torch.equal(found[:, axis], flipped)


@pytest.mark.parametrize(("count", "fitted", "validation"), [(1, 1, 1), (5, 3, 2), (40, 16, 8)])
def test_trials_are_not_fitted_to_validation_windows(count, fitted, validation):
    windows = torch.randint(3, VOCAB, (count, 4), generator=torch.Generator().manual_seed(0))
    score = SELECTION.create("trial_kl")
    with LayerStream(ModelAdapter(pico("llama_gqa")), windows, progress=False) as stream:
        stream.embed()
        score.prepare(stream)
        assert torch.equal(score.trial_stream(stream).windows, windows[:fitted])
        assert torch.equal(score._windows, windows[-validation:])
    assert score.trial_tokens(count, 4) == (4 * fitted, 4 * validation)
    assert SELECTION.create("refit_error").trial_tokens(8, 32) == (256, 0)


def test_taylor_scores_are_computed_again_after_a_merge(windows):
    model, seen = pico("llama_gqa"), []
    plan = compress(
        model, windows, paper(selection="taylor"), target_layers=4, progress=False,
        on_step=lambda plan: seen.append(copy.deepcopy(model)),
    )  # fmt: skip
    with LayerStream(ModelAdapter(seen[0]), windows, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 2)
        taylor = SELECTION.create("taylor")
        taylor.prepare(stream)
        for found in plan.steps[1].candidates:
            again = taylor.score(stream, found.first, found.last)
            assert found.score == pytest.approx(again, rel=1e-4)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_scores_of_the_weights_of_sublayers(part, windows):
    model = pico("llama_gqa")
    dense = copy.deepcopy(model).double().requires_grad_()
    loss(dense, windows).backward()
    own = [
        parameter
        for layer in decoder_layers(dense)[1:3]
        for name, parameter in layer.named_parameters()
        if parameter.dim() == 2 and ("mlp" in name) == (part == "ffn")
    ]
    magnitude, taylor = SELECTION.create("magnitude"), SELECTION.create("taylor")
    adapter = ModelAdapter(model)
    with LayerStream(adapter, windows, batch_size=2, progress=False, block=part) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        taylor.prepare(stream)
        expected = sum(float(p.detach().abs().sum()) for p in own)
        assert magnitude.score(stream, 1, 2) == pytest.approx(expected, rel=1e-5)
        expected = sum(float((p * p.grad).detach().abs().sum()) for p in own)
        assert taylor.score(stream, 1, 2) == pytest.approx(expected, rel=1e-3)


def test_scores_that_read_targets_need_whole_layers():
    paper(selection="angular", sublayers=["ffn"])
    with pytest.raises(ValueError, match="merge.selection=refit_error reconstructs whole layers"):
        paper(selection="refit_error", sublayers=["ffn"])


@pytest.mark.parametrize("family", ["llama_gqa"])
@pytest.mark.parametrize("name", SELECTION.names())
@torch.no_grad()
def test_local_scores_do_not_depend_on_later_layers(name, stream):
    """Scores of other selections are computed again after a merge of later layers."""
    found = []
    for change in (1.0, 3.0):
        stream.adapter.scale_outputs(LAYERS - 1, change)
        stream.invalidate_from(LAYERS - 1)
        stream.advance(LAYERS - 1, LAYERS - 1)
        selection = scorer(name, "all")
        selection.prepare(stream)
        found.append(selection.score(stream, 1, 2))
    assert (found[0] == found[1]) == selection.local
