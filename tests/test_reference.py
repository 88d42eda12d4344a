"""Statistics, plans and merged weights against the float64 reference implementation."""

import copy

import pytest
import torch

from come.merge.loop import compress
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.merge.refit.none import NoRefit
from come.merge.retention.bi_power import BIPower
from come.merge.sensitivity.come import Come
from come.merge.span import LayerSpan
from come.merge.unit_scores import unit_scores
from come.models.adapter import ModelAdapter
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import paper, scorer
from tests.reference import Reference


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_statistics_and_allocations(family, windows, tokens):
    model = pico(family)
    reference = Reference(model, windows)
    adapter = ModelAdapter(model)
    collector = StatisticsCollector(adapter, Come.moments, tokens)
    with LayerStream(adapter, windows, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1, collector)
        found = collector.found
        for index in range(LAYERS):
            assert found[index].bi == pytest.approx(reference.bi(index, tokens), rel=1e-4)
            scores = unit_scores(stream, Come(), [found[index]], [[index]], [index])
            for unit in ("kv_group", "channel"):
                expected = torch.tensor(reference.sensitivity(index, unit), dtype=torch.float64)
                torch.testing.assert_close(scores[unit][0], expected, rtol=1e-4, atol=0)
        for first, last in [(0, 1), (2, 4), (1, 5)]:
            expected = reference.sbi(first, last, tokens)
            assert scorer("sbi", tokens).score(stream, first, last) == pytest.approx(
                expected, rel=1e-4
            )
    for first, last in [(0, 1), (2, 4)]:
        statistics = [found[i] for i in range(first, last + 1)]
        spans = [[i] for i in range(first, last + 1)]
        layers = range(first, last + 1)
        group = LayerSpan(stream, layers, spans, statistics, Concat(), "mean", NoRefit(), Come())
        scores = group.scores
        for p in (0.0, 1.0, 3.0):
            split = BIPower(p=p).split(group)
            assert split.shares == pytest.approx(reference.shares(first, last, p, tokens), rel=1e-3)
            for unit in ("kv_group", "channel"):
                assert split.kept[unit] == reference.kept(first, last, unit, p, tokens)


@pytest.mark.parametrize("norms", ["mean", "fold"])
@pytest.mark.parametrize("m", [2, 3])
def test_merged_weights(family, windows, norms, m):
    model = pico(family)
    reference = Reference(model, windows)
    plan = compress(
        model,
        windows,
        paper(m=m, norms=norms),
        target_layers=LAYERS - m + 1,
        batch_size=2,
        progress=False,
    )
    step = plan.steps[0]
    groups = [(first, first + m - 1) for first in range(LAYERS - m + 1)]
    scores = [reference.sbi(*group, "last") for group in groups]
    assert (step.first, step.last) == groups[scores.index(min(scores))]
    expected = reference.merged(step.first, step.last, 1.0, "last", norms == "fold")
    adapter = ModelAdapter(model)
    merged = adapter.layer_state(step.first)
    if norms == "fold":  # without the scales that norms get after the merge
        merged = fold_norms(merged, adapter.roles(step.first))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_second_step_measures_the_merged_model(family, windows):
    """Recomputing only the layers after a merge gives the statistics of the merged model."""
    model = pico(family)
    snapshots = []
    plan = compress(
        model,
        windows,
        paper(),
        target_layers=LAYERS - 2,
        on_step=lambda plan: snapshots.append(copy.deepcopy(model)),
        batch_size=3,
        progress=False,
    )
    reference = Reference(snapshots[0], windows)
    step = plan.steps[1]
    assert step.bi == pytest.approx([reference.bi(i, "last") for i in range(LAYERS - 1)], rel=1e-4)
    for candidate in step.candidates:
        expected = reference.sbi(candidate.first, candidate.last, "last")
        assert candidate.score == pytest.approx(expected, rel=1e-4)
    best = min(step.candidates, key=lambda c: reference.sbi(c.first, c.last, "last"))
    assert (step.first, step.last) == (best.first, best.last)
    for unit in ("kv_group", "channel"):
        assert step.kept[unit] == reference.kept(step.first, step.last, unit, 1.0, "last")
