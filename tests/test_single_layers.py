"""Spans of one layer: a refit after other merges, and layers with fewer units."""

import pytest
import torch

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.span import LayerSpan
from come.models.adapter import ModelAdapter
from come.models.layer_state import overlay
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.disk import on_disk
from tests.methods import come_plus, paper, recipe, sublayer_of

GROUPS = [[1, 2], [3], [4, 5]]


def outputs(model, windows, index):
    """Hidden states after a layer."""
    return model.model(windows, output_hidden_states=True).hidden_states[index + 1].double()


def unseen():
    return torch.randint(3, VOCAB, (64, SEQ), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_a_single_layer_is_refitted_to_the_dense_model():
    windows = torch.randint(3, VOCAB, (64, SEQ), generator=torch.Generator().manual_seed(7))
    errors = {}
    for groups in ([[1, 2]], [[1, 2], [3]]):
        merged = pico("llama_gqa")
        method = come_plus(groups=groups, refit="ridge", align=None)
        plan = compress(merged, windows, method, target_layers=LAYERS - 1, progress=False)
        wanted = outputs(pico("llama_gqa"), unseen(), 3)
        errors[len(groups)] = float((outputs(merged, unseen(), 2) - wanted).square().mean())
    assert errors[2] < 0.99 * errors[1]
    assert [(step.first, step.last) for step in plan.steps] == [(1, 2), (2, 2)]
    assert plan.history == [[0], [1, 2], [3], [4], [5]]


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize(
    "make", [come_plus, lambda **k: paper(operator="drop", refit="ridge", **k)]
)
def test_plans_with_single_layers(family, make, windows, tmp_path):
    """Saved, applied to the base model, interrupted after every step, and with weights on disk."""
    saved = []

    def keep(plan):
        plan.save(tmp_path / f"plan{len(saved)}.json")
        saved.append(tmp_path / f"plan{len(saved)}.json")

    model = pico(family)
    found = compress(
        model, windows, make(groups=GROUPS), target_layers=4, progress=False, on_step=keep
    )
    assert len(found.steps) == len(saved) == 3
    state = apply(Plan.load(saved[-1]), pico(family)).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for path in saved[:2]:
        again = compress(
            pico(family), windows, make(groups=GROUPS), target_layers=4, plan=Plan.load(path),
            progress=False,
        )  # fmt: skip
        assert again.hash == found.hash
    disk = compress(
        on_disk(pico(family)), windows, make(groups=GROUPS), target_layers=4, progress=False
    )
    assert disk.hash == found.hash


def test_a_depth_of_a_plan_has_its_refits(windows):
    plan = compress(
        pico("llama_gqa"), windows, come_plus(groups=GROUPS), target_layers=4, progress=False
    )
    assert len(plan.truncated(5).steps) == 2
    assert plan.truncated(4) is plan


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (come_plus, {"groups": [[3]]}, r"merge.groups=\[\[3\]\] merges nothing"),
        (paper, {"groups": [[1, 2], [3]]}, r"merge.groups has \[3\]: .*merge.refit=none"),
        (
            come_plus,
            {"groups": [[1, 2], [3]], "target": "current"},
            r"merge.groups has \[3\]: .*merge.refit.target=current",
        ),
        (come_plus, {"groups": [[1, 2], []]}, r"merge.groups has \[\]: a group is adjacent layers"),
    ],
)
def test_single_layers_that_cannot_be_refitted(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def narrower(stream, statistics, method, channels):
    """A span of layer 2 that becomes a layer with fewer channels."""
    return LayerSpan(
        stream, [2], [[2]], statistics, method.operator, "fold", method.refit,
        method.sensitivity, {"channel": channels},
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
def test_a_layer_with_fewer_channels(family, windows):
    """The refit of the kept units has a lower error on unseen windows than without it."""
    adapter = ModelAdapter(pico(family))
    full = adapter.unit_counts["channel"]
    collector = StatisticsCollector(adapter, ("abs", "square", "mean"), "all")
    errors = {}
    many = torch.randint(3, VOCAB, (64, SEQ), generator=torch.Generator().manual_seed(7))
    with LayerStream(adapter, many, batch_size=8, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1, collector)
        stream.snapshot_dense()
        for name, method in {
            "refit": recipe("come_plus", refit="ridge", align=None),
            "sensitivity": paper(norms="fold"),
        }.items():
            span = narrower(stream, [collector.found[2]], method, full // 2)
            split = method.retention.split(span)
            assert [len(layer) for layer in split.kept["channel"]] == [full // 2]
            assert [len(layer) for layer in split.kept["kv_group"]] == [
                adapter.unit_counts["kv_group"]
            ]
            assert split.shares == [1.0]
            sources = span.sources(split)
            state = sources.state
            assert state[f"{sublayer_of(adapter, 'channel').output}.weight"].shape[1] == full // 2
            if method.refit.active:
                state = overlay(state, method.refit.solve(span.targets, sources))
            layer = adapter.copy_layer(2, state)
            fresh = stream.fork(unseen())
            with fresh:
                fresh.embed()
                fresh.advance(0, 2)
                errors[name] = sum(
                    float((layer(before, **fresh.keywords(len(before), 2)) - after).square().sum())
                    for before, after in fresh.pairs(2, 3)
                )
    assert errors["refit"] < 0.9 * errors["sensitivity"]
