"""Complete merges on every family: plans, checkpoints, generation, resuming."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan, SolvedTensors
from come.merge.saving import check_cache
from come.merge.schedules.optimal_partition import OptimalPartition
from come.models.adapter import ModelAdapter
from come.report.figures import unit_origins
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import paper


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("operator", "sensitivity"), [("concat", "come"), ("concat", "random"), ("average", "come")]
)
@pytest.mark.parametrize("norms", ["mean", "fold"])
def test_merging_on_every_family(family, operator, sensitivity, norms, windows, tmp_path):
    model = pico(family)
    recipe = paper(operator=operator, sensitivity=sensitivity, norms=norms)
    plan = compress(model, windows, recipe, target_layers=LAYERS - 2, progress=False)
    assert len(ModelAdapter(model).layers) == model.config.num_hidden_layers == LAYERS - 2
    assert [layer for span in plan.history for layer in span] == list(range(LAYERS))
    assert check_cache(model) < 1e-4
    assert same(weights(apply(plan, pico(family))), weights(model))

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(windows).logits, model(windows).logits)
    generated = loaded.generate(windows[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == windows.shape[1] + 5


@pytest.mark.parametrize("m", [2, 3, 4])
def test_every_group_size_reaches_the_target(m, windows):
    for target in (5, 4, 3):
        plan = compress(
            pico("llama_gqa"), windows, paper(m=m), target_layers=target, progress=False
        )
        assert plan.num_layers == len(plan.history) == target
        assert all(len(step.spans) <= m for step in plan.steps)
        assert all(len(span) == 1 for step in plan.steps for span in step.spans)


def test_remerging_reaches_smaller_depths(windows):
    with pytest.raises(ValueError, match="smallest depth that can is 3"):
        compress(pico("llama_gqa"), windows, paper(), target_layers=2, progress=False)
    recipe = paper(allow_remerge=True)
    plan = compress(pico("llama_gqa"), windows, recipe, target_layers=1, progress=False)
    assert plan.history == [list(range(LAYERS))]
    sources = unit_origins(plan, "channel")
    assert sum(sources[0].values()) == 24


def test_plan_json_round_trip(windows, tmp_path):
    model = pico("qwen3_gqa")
    plan = compress(model, windows, paper(norms="fold"), target_layers=4, progress=False)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.steps == plan.steps
    assert loaded.hash == plan.hash
    assert same(weights(apply(loaded, pico("qwen3_gqa"))), weights(model))


def test_plans_with_the_keys_of_earlier_versions(windows, tmp_path):
    method = paper(operator="drop", refit="ridge", downstream=0.5)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    path, tensors = tmp_path / "plan.json", tmp_path / "refit.safetensors"
    plan.save(path)
    data = json.loads(path.read_text())
    data["finish"] = data.pop("downstream")
    for step in data["steps"]:
        step["keeper"] = step.pop("kept_layer")
    path.write_text(json.dumps(data))
    found = load_file(tensors)
    save_file({k.replace("downstream/", "finish/"): v for k, v in found.items()}, tensors)
    assert plan.downstream.hashes
    assert {step.kept_layer for step in plan.steps} == {0}
    assert Plan.load(path) == plan


@pytest.mark.parametrize("done", [1, 2])
def test_interrupted_compression_resumes_to_the_same_model(done, windows):
    class Interrupt(Exception):
        pass

    whole = pico("llama_gqa")
    expected = compress(whole, windows, paper(), target_layers=3, progress=False)
    saved: list[Plan] = []

    def interrupt(plan: Plan) -> None:
        saved.append(plan)
        if len(saved) == done:
            raise Interrupt

    with pytest.raises(Interrupt):
        compress(
            pico("llama_gqa"), windows, paper(), target_layers=3, on_step=interrupt, progress=False
        )
    model = pico("llama_gqa")
    plan = compress(model, windows, paper(), target_layers=3, plan=saved[-1], progress=False)
    assert plan.steps == expected.steps
    assert same(weights(model), weights(whole))


def test_planning_ahead_measures_only_up_to_the_next_span(windows, monkeypatch):
    plans = []
    for ahead in (True, False):
        monkeypatch.setattr(OptimalPartition, "plans_ahead", ahead)
        recipe = paper(schedule="optimal_partition", refit="ridge", retention="adaptive")
        plans.append(compress(pico("llama_gqa"), windows, recipe, target_layers=3, progress=False))
    (first, *later), all_measured = plans[0].steps, plans[1].steps
    assert later
    assert len(first.bi) == LAYERS
    for step, whole in zip(later, all_measured[1:], strict=True):
        assert step.bi == whole.bi[: step.last + 1]
        assert replace(step, bi=[]) == replace(whole, bi=[])
    assert plans[0].provenance["layer_passes"] < plans[1].provenance["layer_passes"]


def test_counted_layer_passes(windows):
    """Every layer once, to measure all of them; a merge made earlier is added to the count."""
    method = paper(schedule="one_shot", selection="bi_sum", operator="drop")
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    assert plan.provenance["layer_passes"] == LAYERS


@pytest.mark.parametrize(
    "parts", [{"sensitivity": "taylor"}, {"retention": "mka"}, {"retention": "adaptive"}]
)
def test_planning_ahead_measures_what_the_parts_read(parts, windows):
    recipe = paper(schedule="optimal_partition", **parts)
    plan = compress(pico("llama_gqa"), windows, recipe, target_layers=3, progress=False)
    assert len(plan.steps) > 1


def test_merge_of_the_first_layers_does_not_embed_again(windows, monkeypatch):
    calls, embed = [], LayerStream.embed

    def counted(stream):
        calls.append(stream)
        embed(stream)

    monkeypatch.setattr(LayerStream, "embed", counted)
    recipe = paper(groups=[[0, 1], [3, 4]])
    compress(pico("llama_gqa"), windows, recipe, target_layers=LAYERS - 2, progress=False)
    assert len(calls) == 1


def test_blocks_before_a_merged_block_stay_valid(windows, monkeypatch):
    changed, invalidate = [], LayerStream.invalidate_from

    def counted(stream, index):
        changed.append(index)
        invalidate(stream, index)

    monkeypatch.setattr(LayerStream, "invalidate_from", counted)
    method = paper(operator="drop", sublayers=["ffn"], groups=[[0, 1], [3, 4]])
    compress(pico("llama_gqa"), windows, method, target_layers=LAYERS - 2, progress=False)
    assert changed == [0, 3]


def test_random_sensitivity_depends_only_on_its_seed(windows):
    plans = [
        compress(
            pico("llama_gqa"),
            windows,
            paper(sensitivity="random", seed=seed),
            target_layers=4,
            progress=False,
        )
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1]
    assert plans[0].steps[0].kept["channel"] != plans[2].steps[0].kept["channel"]


def test_plan_hash_covers_every_decision(windows):
    plan = compress(pico("llama_gqa"), windows, paper(), target_layers=4, progress=False)
    first, *rest = plan.steps
    changes = [{"kept_layer": 0}, {"output_scale": 0.5}, {"shares": [0.5, 0.5]}, {"kept": {}}]
    others = [replace(plan, steps=[replace(first, **change), *rest]) for change in changes]
    others += [replace(plan, block="ffn"), replace(plan, norms="fold"),
               replace(plan, operator="average"), plan.truncated(5)]  # fmt: skip
    assert len({plan.hash, *(other.hash for other in others)}) == 1 + len(others)
    assert replace(plan, provenance={}).hash == plan.hash
    assert replace(plan, base=replace(plan.base, name="x")).hash == plan.hash
    refits = [{}, *({"3/a": torch.full((2,), x)} for x in (1.0, 2.0))]
    found = {replace(plan, downstream=SolvedTensors(tensors)).hash for tensors in refits}
    assert len(found) == 3


@pytest.mark.parametrize("changes", [{"sublayers": ["ffn"]}, {"norms": "fold"}])
def test_loaded_plan_equals_the_saved_one(changes, windows, tmp_path):
    method = paper(operator="drop", **changes)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_truncated_and_invalid_plans(windows, tmp_path):
    plan = compress(pico("llama_gqa"), windows, paper(), target_layers=3, progress=False)
    assert plan.truncated(4).num_layers == 4
    with pytest.raises(ValueError, match=r"merge.target_layers=2: the plan passes through 5, 4, 3"):
        plan.truncated(2)
    with pytest.raises(ValueError, match="the plan is for .* this model has"):
        apply(plan, pico("llama_mha"))
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="cannot be read as a plan"):
        Plan.load(path)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="not a plan of format 1"):
        Plan.load(path)
    path.write_text(json.dumps({"format": 1, "steps": []}))
    with pytest.raises(ValueError, match="a field is missing or invalid"):
        Plan.load(path)


def test_unit_origins_sum_to_the_unit_count(windows):
    plan = compress(pico("llama_gqa"), windows, paper(), target_layers=4, progress=False)
    for unit, count in plan.base.units.items():
        sources = unit_origins(plan, unit)
        assert [sum(source.values()) for source in sources] == [count] * 4
        for source, span in zip(sources, plan.history, strict=True):
            assert set(source) <= set(span)
    average = compress(
        pico("llama_gqa"), windows, paper(operator="average"), target_layers=4, progress=False
    )
    step = average.steps[0]
    total = unit_origins(average.truncated(5), "channel")[step.first]
    assert total[step.first] == pytest.approx(24 * step.shares[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": 1}, "merge.m=1: must be a whole number of at least 2"),
        ({"norms": "max"}, "merge.norms='max': must be one of mean, fold"),
        ({"tokens": "first"}, "merge.tokens='first': must be one of all, last"),
        ({"sensitivity": "kome"}, r"merge.sensitivity='kome': unknown .* did you mean 'come'\?"),
        ({"operator": "avg"}, "merge.operator='avg'.*available: average, concat, drop"),
        (
            {"selection": {"name": "sbi", "alpha": 1}},
            "merge.selection.alpha: .* has no such setting",
        ),
    ],
)
def test_invalid_recipes(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(**settings)


@pytest.mark.parametrize("stop", [3, 6])
def test_stops_outside_the_path_are_rejected(stop, windows):
    """A stop below the target, and one at the depth of the dense model."""
    with pytest.raises(ValueError, match=f"merge.save_at.*{stop}"):
        compress(pico("llama_gqa"), windows, paper(), target_layers=4, stops=[stop], progress=False)
