"""Every method on every family: runs, resumes, reloads and validates its settings."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.operators.base import OPERATORS
from come.merge.plan import Plan
from come.merge.retention.base import RETENTION
from come.merge.saving import check_cache
from come.merge.schedules.base import SCHEDULES
from come.merge.selection.base import SELECTION
from come.merge.sensitivity.base import SENSITIVITY
from tests.conftest import FAMILIES, LAYERS, VOCAB, pico
from tests.methods import (
    CONF,
    dropped_layers,
    loss,
    paper,
    read_recipe,
    recipe,
    same_weights,
    slowly,
    without,
)
from tests.reference import Reference

ELSEWHERE = ("from_plan", "none", "flap", "subfit")
"""The last two merge no layers (tests/test_flap.py, tests/test_subfit.py)."""
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in ELSEWHERE)


QUICK = ("llama_bias", "mistral_sliding", "qwen3_gqa", "opt")
"""Families that together have biases, windows, norms of heads, and an MLP without a gate."""


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", slowly(FAMILIES, QUICK))
def test_every_recipe_on_every_family(family, name, windows, tmp_path):
    model, method = pico(family), recipe(name)
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    assert model.config.num_hidden_layers == len(plan.history) == LAYERS - 2
    assert [layer for span in plan.history for layer in span] == list(range(LAYERS))
    assert check_cache(model) < 1e-4
    plan.save(tmp_path / "plan.json")
    assert same_weights(apply(Plan.load(tmp_path / "plan.json"), pico(family)), model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    generated = loaded.generate(windows[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == windows.shape[1] + 4


SETS = ("lorp", "pairwise", "swap")
"""Schedules that choose a set of layers to drop."""

PARTS = [
    *({"sensitivity": name} for name in SENSITIVITY.names()),
    *({"selection": name} for name in SELECTION.names()),
    *({"retention": name} for name in RETENTION.names()),
    *({"norms": "fold", "operator": name, "protect_first": 1} for name in OPERATORS.names()),
    *(
        {"norms": "fold", "operator": "drop", "refit": name, "protect_first": 1}
        for name in ("prune_comp", "replaceme")
    ),
    *({"schedule": name} for name in SCHEDULES.names() if name not in ("fixed", "subfit", *SETS)),
    *(
        {"schedule": name, "operator": "drop", "selection": "skip_loss", "protect_first": 1}
        for name in SETS
    ),
    {"groups": ((3, 4), (0, 1))},
    {"groups": ((3, 4), (0, 1)), "operator": "drop"},
    {"schedule": "progressive", "operator": "drop", "m": 3},
    *(
        {"sublayers": (part,), **more}
        for part in ("attention", "ffn")
        for more in (
            {},
            {"operator": "drop", "selection": "skip_loss"},
            {"operator": "drop", "selection": "bi_sum", "schedule": "one_shot"},
            {"operator": "average", "retention": "posterior", "selection": "taylor"},
            {"schedule": "laco", "operator": "laco", "allow_remerge": True, "m": 3},
        )
    ),
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(map(str, parts.values())))
@pytest.mark.parametrize("family", slowly(("llama_gqa", "qwen3_gqa", "opt"), ("llama_gqa", "opt")))
def test_every_part_in_the_paper_recipe(family, parts, windows):
    model = pico(family)
    plan = compress(model, windows, paper(**parts), target_layers=LAYERS - 2, progress=False)
    assert same_weights(apply(plan, pico(family)), model)
    if family == "llama_gqa":
        again = compress(pico(family), windows, paper(**parts), target_layers=4, progress=False)
        assert again == plan


def test_recipe_names_and_commands():
    for name in (*RECIPES, "flap", "subfit"):
        assert read_recipe(name)["name"] == name
        recipe(name)
        first = (CONF / f"{name}.yaml").read_text().splitlines()[0]
        assert f"python run.py merge={name}" in first
    used = {recipe(name).operator.name for name in RECIPES}
    assert used == set(OPERATORS.names())


@pytest.mark.parametrize(
    "parts",
    [
        *({"selection": name, "allow_remerge": True} for name in SELECTION.names()),
        *({"schedule": name} for name in ("one_shot", "block", "laco")),
        {"schedule": "optimal_partition", "selection": "trial_kl", "refit": "ridge"},
        {"schedule": "one_shot", "selection": "trial_kl"},
        {"sublayers": ("ffn",), "selection": "trial_kl"},
        {"operator": "drop", "selection": "trial_kl", "refit": "ridge"},
        {"operator": "drop", "refit": "prune_comp"},
        {"operator": "drop", "refit": "replaceme", "protect_first": 1},
        {"operator": "drop", "refit": "prune_comp", "selection": "bi_sum", "schedule": "one_shot"},
        {"groups": ((3, 4), (0, 1))},
        {"sublayers": ("ffn",), "allow_remerge": True},
        {"sublayers": ("attention",), "operator": "drop", "selection": "skip_loss"},
        {"refit": "ridge", "downstream": 0.5, "allow_remerge": True, "protect_last": 1},
        {"refit": "gauss_newton", "downstream": 0.5, "align": None},
        {"refit": "ridge", "operator": "drop", "selection": "bi_sum", "schedule": "one_shot"},
        {"refit": "ridge", "operator": "drop", "schedule": "lorp"},
        {"refit": "ridge", "target": "current", "refit__lambda": "auto", "allow_remerge": True},
    ],
    ids=lambda parts: "-".join(map(str, parts.values())),
)
def test_interrupted_search_resumes_to_the_same_plan(parts, windows, tmp_path):
    class Interrupt(Exception):
        pass

    whole, method = pico("llama_gqa"), paper(**parts)
    target = 4 if "groups" in parts else 3
    expected = compress(whole, windows, method, target_layers=target, progress=False)
    for done in range(1, len(expected.steps) + 1):

        def interrupt(plan, done=done):
            plan.save(tmp_path / "plan.partial.json")
            if len(plan.steps) == done:
                raise Interrupt

        with pytest.raises(Interrupt):
            compress(
                pico("llama_gqa"),
                windows,
                method,
                target_layers=target,
                on_step=interrupt,
                progress=False,
            )
        model, plan = pico("llama_gqa"), Plan.load(tmp_path / "plan.partial.json")
        plan = compress(model, windows, method, target_layers=target, plan=plan, progress=False)
        assert plan.hash == expected.hash
        assert same_weights(model, whole)


@pytest.mark.parametrize(
    "name", ["come", "come_plus", "replaceme", "prune_comp", "sleb", "taylor", "laco"]
)
def test_half_precision(name, windows):
    model = pico("qwen3_gqa").bfloat16()
    plan = compress(model, windows, recipe(name), target_layers=4, progress=False)
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())
    assert same_weights(apply(plan, pico("qwen3_gqa").bfloat16()), model)
    full = compress(pico("qwen3_gqa"), windows, recipe(name), target_layers=4, progress=False)
    scores = {(c.first, c.last): c.score for c in full.steps[0].candidates}
    for candidate in plan.steps[0].candidates:
        span = (candidate.first, candidate.last)
        if span in scores:
            assert candidate.score == pytest.approx(scores[span], rel=0.1, abs=0.05)


def test_shortgpt_uidl_and_sleb_drop_the_same_layers_as_plain_loops(family, windows):
    dense = pico(family)
    reference = Reference(dense, windows)

    plan = compress(pico(family), windows, recipe("shortgpt"), target_layers=3, progress=False)
    assert dropped_layers(plan) == sorted(range(LAYERS), key=lambda i: reference.bi(i, "all"))[:3]

    plan = compress(pico(family), windows, recipe("uidl"), target_layers=4, progress=False)
    angles = {}
    for first in range(LAYERS - 1):
        cosines = reference.cosines(first, first + 2, "last")
        angles[first] = sum(math.acos(max(-1, min(1, c))) for c in cosines)
    best = min(angles, key=lambda first: angles[first])
    assert dropped_layers(plan) == [best, best + 1]

    plan = compress(pico(family), windows, recipe("sleb"), target_layers=3, progress=False)
    removed: list[int] = []
    while len(removed) < 3:
        rest = [i for i in range(LAYERS) if i not in removed]
        with torch.no_grad():
            losses = {i: float(loss(without(dense, (*removed, i)), windows)) for i in rest}
        removed.append(min(losses, key=lambda i: losses[i]))
    assert dropped_layers(plan) == removed


def test_block_method_plans_each_depth_separately(windows):
    reference = Reference(pico("llama_gqa"), windows)
    for size in (2, 3):
        plan = compress(
            pico("llama_gqa"), windows, recipe("uidl"), target_layers=LAYERS - size, progress=False
        )
        angles = {}
        for first in range(LAYERS - size + 1):
            cosines = reference.cosines(first, first + size, "last")
            angles[first] = sum(math.acos(max(-1, min(1, c))) for c in cosines)
        best = min(angles, key=lambda first: angles[first])
        assert len(plan.steps) == 1
        assert dropped_layers(plan) == list(range(best, best + size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention": "joint", "operator": "average"}, "merge.retention=joint ranks units"),
        ({"operator": "drop", "refit": "replaceme"}, "set merge.protect_first=1 or more"),
        ({"refit": "replaceme"}, "merge.operator=concat drops none: choose merge.operator=drop"),
        ({"schedule": "one_shot", "allow_remerge": True}, "allow_remerge=true is not possible"),
        ({"schedule": "one_shot", "operator": "drop", "m": 3}, "drops single layers; merge.m=3"),
        (
            {"schedule": "laco", "operator": "drop", "refit": "prune_comp"},
            "merge.schedule=laco merges on trial without the factor of merge.refit=prune_comp",
        ),
        (
            {
                "schedule": "block",
                "operator": "drop",
                "refit": "prune_comp",
                "selection": "trial_kl",
            },
            "merge.selection=trial_kl merges on trial without the factor of merge.refit=prune_comp",
        ),
        ({"schedule": "fixed"}, "merge.schedule=fixed needs merge.groups"),
        ({"groups": [[3, 5]]}, r"merge.groups has \[3, 5\]: a group is adjacent layers"),
        ({"groups": [[3, 4], [4, 5]]}, "merge.groups: layer 4 is in two groups"),
        ({"sublayers": ("mlp",)}, r"merge.sublayers=\['mlp'\]: must be a list of attention, ffn"),
        (
            {"sublayers": ("ffn",), "operator": "drop", "refit": "prune_comp"},
            "merge.refit=prune_comp reconstructs whole layers",
        ),
        (
            {"operator": "drop", "refit": "prune_comp", "downstream": 1.0},
            "merge.refit.downstream=1.0 fits states that merge.refit=prune_comp scales",
        ),
        ({"refit": "prune_comp"}, "merge.operator=concat drops none: choose merge.operator=drop"),
        (
            {"schedule": "mixed", "selection": "trial_kl"},
            "schedule=mixed leaves it no choice",
        ),
        ({"retention": "adaptive", "operator": "average"}, "merge.retention=adaptive ranks units"),
        ({"retention": "leverage", "operator": "average"}, "merge.retention=leverage ranks units"),
        ({"protect_first": -1}, "merge.protect_first=-1: must be a whole number of at least 0"),
        ({"retention": "posterior", "options": {"granularity": 0}}, "granularity=0: must be"),
        (
            {"schedule": "laco", "options": {"interval": 0}},
            "merge.schedule.interval=0: must be",
        ),
    ],
)
def test_invalid_recipes(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(**settings)


@pytest.mark.parametrize(
    "name", ["come", "come_plus", "come_p", "laco", "mka", "shortgpt", "taylor_plus", "replaceme"]
)
def test_batches_of_any_size_give_the_same_plan(name):
    windows = torch.randint(3, VOCAB, (12, 100), generator=torch.Generator().manual_seed(7))
    plans = {
        compress(
            pico("llama_gqa"), windows, recipe(name), target_layers=4, batch_size=size,
            progress=False,
        ).hash
        for size in (1, 4, 6)
    }  # fmt: skip
    assert len(plans) == 1
