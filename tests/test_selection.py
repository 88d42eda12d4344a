"""Selection scores against plain float64 computations."""

import copy
import math

import pytest
import torch

from come.merge.selection.base import SELECTION
from come.statistics.manifold import diffusion_map, shared_information
from tests.methods import (
    SPANS,
    decoder_layers,
    loss,
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
