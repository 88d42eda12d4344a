"""Layers of several kinds: which spans may be merged, and the kind of the merged layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from come.merge.apply import apply
from come.merge.constraints import SpanConstraints, check_target
from come.merge.loop import compress
from come.models.families import layout_of
from tests.conftest import GQA, LAYERS, SHAPE, pico
from tests.methods import come_plus, dropped_layers, paper, recipe, same_weights

MIXED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
KINDS = ["full_attention"] * 3 + ["sliding_attention"] * 3


def mixed():
    """A small Qwen2 whose last three layers have windows."""
    return pico("qwen2_gqa", **MIXED)


def reachable(kinds, target, m, merged=()):
    """Brute force: whether spans of m layers of one kind, the last one smaller, reach a depth."""
    depth = len(kinds)
    if depth == target:
        return True
    size = min(m, depth - target + 1)
    for first in range(depth - size + 1):
        own = range(first, first + size)
        if len({kinds[i] for i in own}) > 1 or set(own) & set(merged):
            continue
        rest = [*kinds[:first], kinds[first], *kinds[first + size :]]
        shifted = [i if i < first else i - size + 1 for i in merged]
        if reachable(rest, target, m, [*shifted, first]):
            return True
    return False


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("kinds", ["aaabbb", "abbbba", "aabaab", "ababab"])
def test_smallest_depth_equals_brute_force(kinds, m):
    rules = SpanConstraints(m, kinds=tuple(kinds))
    least = min(depth for depth in range(1, 7) if reachable(kinds, depth, m))
    assert rules.smallest_depth(6) == least


@pytest.mark.parametrize("target", [3, 4, 5])
def test_spans_are_of_one_kind_and_reach_the_target(target):
    kinds, history = "aabbba", [[i] for i in range(6)]
    rules = SpanConstraints(2, kinds=tuple(kinds))
    if target == 3:
        with pytest.raises(ValueError, match=r"only layers of one kind .* that can is 4"):
            check_target(6, target, rules)
        return
    expected = [
        (first, first + 1)
        for first in range(5)
        if kinds[first] == kinds[first + 1]
        and reachable([*kinds[:first], *kinds[first + 1 :]], target, 2, [first])
    ]
    assert rules.spans(history, target) == expected


@pytest.mark.parametrize("method", [paper, come_plus])
def test_merges_stay_within_a_kind(method, windows):
    assert [layout.kind for layout in layout_of(mixed().config).layers] == KINDS
    model = mixed()
    plan = compress(model, windows, method(), target_layers=LAYERS - 2, progress=False)
    for step in plan.steps:
        assert len({KINDS[layer] for span in step.spans for layer in span}) == 1
    assert model.config.layer_types == [KINDS[span[0]] for span in plan.history]


@pytest.mark.parametrize(("kinds", "kept"), [("first", 2), ("last", 3)])
def test_merged_layer_takes_the_kind_of_a_chosen_layer(kinds, kept, windows, tmp_path):
    model = mixed()
    method = paper(kinds=kinds, groups=((2, 3),), refit="ridge", norms="fold")
    plan = compress(model, windows, method, target_layers=LAYERS - 1, progress=False)
    assert model.config.layer_types == [*KINDS[:2], KINDS[kept], *KINDS[4:]]
    assert plan.steps[0].slot == kept - 2
    assert same_weights(model, apply(plan, mixed()))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model(windows).logits)


def test_groups_of_several_kinds_are_refused(windows):
    with pytest.raises(ValueError, match=r"merge.groups has \[2, 3\], layers of several kinds"):
        compress(mixed(), windows, paper(groups=((2, 3),)), target_layers=LAYERS - 1)


def test_drops_keep_the_kind_of_the_kept_layer(windows):
    """Any layer can be dropped; the others run with their own windows."""
    model = mixed()
    plan = compress(model, windows, recipe("shortgpt"), target_layers=LAYERS - 3, progress=False)
    kept = set(range(LAYERS)) - set(dropped_layers(plan))
    assert model.config.layer_types == [KINDS[layer] for layer in sorted(kept)]
    expected = mixed()
    expected.config.layer_types = list(model.config.layer_types)
    layers = [layer for i, layer in enumerate(expected.model.layers) if i in kept]
    expected.model.layers = torch.nn.ModuleList(layers)
    expected.config.num_hidden_layers = len(layers)
    fresh = Qwen2ForCausalLM(Qwen2Config(**SHAPE | GQA | MIXED | {
        "num_hidden_layers": len(layers), "layer_types": expected.config.layer_types,
    })).eval()  # fmt: skip
    fresh.load_state_dict(expected.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(windows).logits, model(windows).logits)
