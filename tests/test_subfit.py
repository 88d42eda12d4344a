"""merge=subfit: attention and FFN sublayers dropped apart, at the cost of whole layers."""

import copy
import itertools
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.linalg.subsets import cheapest_cover
from come.merge.apply import apply
from come.merge.dropped import DroppedSublayer, SublayerDrops
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.saving import check_cache
from come.merge.schedules.subfit import PENALTY, SubFit, sublayer_costs
from come.models.adapter import ModelAdapter
from come.models.layout import SUBLAYERS
from come.stream.stream import LayerStream
from tests.bases import save_base
from tests.conftest import FAMILIES, LAYERS, SEQ, pico
from tests.decoders import pico_decoder
from tests.disk import all_tensors, on_disk
from tests.jobs import QUICK, job_settings, prepare_job, run_job
from tests.methods import recipe, same_weights, slowly

ORDER = list(itertools.product(range(LAYERS), SUBLAYERS))


class Watched:
    """The residual stream before every sublayer and after the last, and the features of each."""

    def __init__(self, model, windows):
        self.streams, self.features = [], []
        hooks = []
        for layer in model.model.layers:
            for norm, output in (
                (layer.input_layernorm, layer.self_attn.o_proj),
                (layer.post_attention_layernorm, layer.mlp.down_proj),
            ):
                hooks.append(norm.register_forward_pre_hook(partial(self.see, self.streams)))
                hooks.append(output.register_forward_pre_hook(partial(self.see, self.features)))
        hooks.append(model.model.norm.register_forward_pre_hook(partial(self.see, self.streams)))
        with torch.no_grad():
            self.logits = model(windows).logits
        for hook in hooks:
            hook.remove()

    @staticmethod
    def see(seen, module, inputs):
        seen.append(inputs[0].flatten(0, 1))


def output_weight(model, layer, kind):
    own = model.model.layers[layer]
    return (own.self_attn.o_proj if kind == "attention" else own.mlp.down_proj).weight


def dropping(monkeypatch, *places):
    """Makes the schedule drop these sublayers."""
    chosen = [DroppedSublayer(layer, kind, 1, 0.0) for layer, kind in places]
    monkeypatch.setattr(SubFit, "cheapest", lambda *given: SublayerDrops(given[-1], chosen))


def test_cheapest_cover_against_all_sets():
    generator = torch.Generator().manual_seed(5)
    for count in (1, 5, 9):
        for kinds in (2, 50):
            sizes = (torch.randint(1, kinds + 1, (count,), generator=generator) * 3).tolist()
            costs = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
            for least in range(0, sum(sizes) + 1, 4):
                sets = [
                    items
                    for size in range(count + 1)
                    for items in itertools.combinations(range(count), size)
                    if sum(sizes[i] for i in items) >= least
                ]
                best = min(sum(costs[i] for i in items) for items in sets)
                found = cheapest_cover(sizes, costs, least)
                assert tuple(found) in sets
                assert sum(costs[i] for i in found) == pytest.approx(best)


def test_costs_of_sublayers(windows):
    """Against least squares on each half of the windows, in float64; for any batch size."""
    streams = Watched(pico("llama_gqa").double(), windows).streams
    odd = torch.arange(len(windows) * SEQ) // SEQ % 2 == 1
    expected = {True: [], False: []}
    for x, y in itertools.pairwise(streams):
        root, errors = y.square().mean(dim=1, keepdim=True).rsqrt(), 0.0
        x, f = root * x, root * (y - x)
        for fit, held_out in ((odd, ~odd), (~odd, odd)):
            gram = x[fit].T @ x[fit]
            gram += PENALTY * gram.diagonal().mean() * torch.eye(len(gram))
            change = torch.linalg.solve(gram, x[fit].T @ f[fit])
            errors += (f[held_out] - x[held_out] @ change).square().sum().item()
        expected[True].append(errors / x.numel())
        expected[False].append(f.square().mean().item())
    for batch_size, linear in ((2, True), (5, False)):
        adapter = ModelAdapter(pico("llama_gqa").double())
        with LayerStream(adapter, windows, batch_size=batch_size, progress=False) as stream:
            stream.embed()
            stream.advance(0, LAYERS - 1)
            found = sublayer_costs(stream, "relative", linear=linear)
        flat = [cost for costs in found for cost in costs]
        assert flat == pytest.approx(expected[linear], rel=1e-6)


@pytest.mark.parametrize(
    "places",
    [
        [(0, "attention"), (2, "ffn"), (3, "attention"), (4, "ffn")],
        [(1, "attention"), (2, "attention"), (2, "ffn"), (3, "attention"), (5, "ffn")],
    ],
)
def test_refit_of_the_sublayers_before_the_dropped_ones(places, windows, monkeypatch):
    """The last one that is left before dropped ones is fitted to the dense states after them."""
    dropping(monkeypatch, *places)
    dense = pico("llama_gqa").double()
    reference = Watched(dense, windows)
    model = copy.deepcopy(dense)
    method = recipe("subfit", refit__lambda=0.3)
    plan = compress(model, windows, method, target_layers=4, batch_size=2, progress=False)
    found = Watched(model, windows)
    fitted = set()
    for number, place in enumerate(ORDER):
        weight, initial = output_weight(model, *place), output_weight(dense, *place)
        end = number
        while end + 1 < len(ORDER) and ORDER[end + 1] in places:
            end += 1
        if place in places:
            assert not weight.any()
            torch.testing.assert_close(found.streams[number + 1], found.streams[number])
        elif end == number:
            assert torch.equal(weight, initial)
        else:
            fitted.add(place[0])
            f, y = found.features[number], reference.streams[end + 1]
            w = 1 / y.square().mean(dim=1, keepdim=True)
            gram = f.T @ (w * f)
            penalty = 0.3 * gram.diagonal().mean()
            right = f.T @ (w * (y - found.streams[number])) + penalty * initial.T
            expected = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), right).T
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    assert {int(name.partition("/")[0]) for name in plan.downstream.tensors} == fitted
    assert len(plan.downstream.tensors) == len(fitted) > 1


def test_refits_of_one_kind_and_none(windows, monkeypatch):
    dropping(monkeypatch, (2, "ffn"), (4, "attention"), (5, "ffn"))
    for changes, names in (
        ({"refit": "none"}, []),
        ({"refit__sublayers": ["ffn"]}, ["3/mlp.down_proj.weight"]),
    ):
        model = pico("llama_gqa")
        plan = compress(model, windows, recipe("subfit", **changes), target_layers=5)
        assert list(plan.downstream.tensors) == names
        assert not output_weight(model, 2, "ffn").any()


@pytest.mark.parametrize("cost", ["bypass", "change"])
@pytest.mark.parametrize("family", slowly(FAMILIES, ("llama_gqa", "qwen3_gqa", "opt")))
def test_every_family_at_equal_cost(family, cost, windows, tmp_path):
    """As many parameters as two layers are unused, the layers stay, and plans rebuild the model."""
    model, method = pico(family), recipe("subfit", schedule__cost=cost)
    adapter = ModelAdapter(model)
    sizes = {place: adapter.block_size(*place) for place in ORDER}
    least = 2 * adapter.block_parameters["layer"]
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    drops = plan.dropped
    chosen = [sizes[each.layer, each.kind] for each in drops.sublayers]
    assert [each.parameters for each in drops.sublayers] == chosen
    assert least <= drops.parameters == sum(chosen) < least + min(chosen)
    assert plan.num_layers == LAYERS - 2
    assert model.config.num_hidden_layers == len(plan.history) == LAYERS
    assert check_cache(model) < 1e-4
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded, loaded.hash) == (plan, plan.hash)
    assert same_weights(apply(loaded, pico(family)), model)
    again = pico(family)  # a plan with drops, as a killed job leaves it, starts over
    compress(again, windows, method, target_layers=LAYERS - 2, plan=loaded, progress=False)
    assert same_weights(again, model)


def test_the_cheapest_sublayers_are_dropped(windows):
    """The set has the least sum of costs of all sets with the parameters of a layer."""
    for cost in ("bypass", "change"):
        adapter = ModelAdapter(pico("llama_gqa"))
        with LayerStream(adapter, windows, progress=False) as stream:
            stream.embed()
            stream.advance(0, LAYERS - 1)
            costs = sublayer_costs(stream, "relative", linear=cost == "bypass")
        method = recipe("subfit", schedule__cost=cost, protect_first=2, protect_last=1)
        free = [place for place in ORDER if 2 <= place[0] < LAYERS - 1]
        flat = {place: costs[place[0]][SUBLAYERS.index(place[1])] for place in free}
        sets = [
            places
            for size in range(len(free))
            for places in itertools.combinations(free, size)
            if sum(adapter.block_size(*p) for p in places) >= adapter.block_parameters["layer"]
        ]
        best = min(sets, key=lambda places: sum(flat[p] for p in places))
        plan = compress(adapter.model, windows, method, target_layers=5, progress=False)
        assert [(each.layer, each.kind) for each in plan.dropped.sublayers] == list(best)
        assert [each.cost for each in plan.dropped.sublayers] == pytest.approx(
            [flat[p] for p in best]
        )


@pytest.mark.parametrize("model_type", ["gemma2", "exaone4", "qwen3_moe"])
def test_norms_after_sublayers_and_experts(model_type, monkeypatch):
    """The refit brings the last states closer to the dense model's."""
    dropping(monkeypatch, (1, "ffn"), (2, "attention"))
    windows = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    errors = []
    with torch.no_grad():
        dense = pico_decoder(model_type)(windows, output_hidden_states=True).hidden_states[-2]
        for refit in ("ridge", "none"):
            model = pico_decoder(model_type)
            plan = compress(
                model, windows, recipe("subfit", refit=refit), target_layers=3, progress=False
            )
            states = model(windows, output_hidden_states=True).hidden_states[-2]
            errors.append((states - dense).square().mean())
            assert same_weights(apply(plan, pico_decoder(model_type)), model)
    assert errors[0] < 0.9 * errors[1]


def test_weights_on_disk(windows):
    model, other = pico("llama_gqa"), on_disk(pico("llama_gqa"))
    method = recipe("subfit")
    plans = [
        compress(each, windows, method, target_layers=4, progress=False) for each in (model, other)
    ]
    assert plans[0].hash == plans[1].hash
    tensors = all_tensors(other)
    assert all(torch.equal(tensors[name], own) for name, own in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "concat"}, "drops sublayers, and merge.operator=concat merges layers"),
        ({"m": 3}, "single sublayers; merge.m=3 is not possible"),
        ({"sublayers": ["ffn"]}, r"merge.sublayers=\['ffn'\] is not possible .*\[attention,ffn\]"),
        ({"refit": "replaceme", "protect_first": 1}, "merge.refit=replaceme is not .*=ridge or"),
        ({"refit": "gauss_newton"}, "merge.refit=gauss_newton is not possible with it"),
        ({"target": "current"}, "merge.refit.target=current .*choose merge.refit.target=dense"),
        ({"align": 0.5, "norms": "fold"}, "merge.refit.align=0.5 is not possible"),
        ({"downstream": 0.5}, "merge.refit.downstream=0.5 is not possible"),
    ],
)
def test_rejects_components_that_it_would_not_use(changes, message):
    with pytest.raises(ValueError, match=f"merge.schedule=subfit .*{message}"):
        recipe("subfit", **changes)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "layer 0 of this model has no ffn of its own"),
        ("gpt_neox", "layer 0 of this model has attention and FFN side by side on one input"),
        ("cohere", "attention and FFN side by side on one input"),
        ("gemma4_text", r"multiplies the residual stream \(layer_scalar\)"),
    ],
)
def test_rejects_layers_by_name(model_type, message):
    adapter = ModelAdapter(pico_decoder(model_type))
    with pytest.raises(ValueError, match=f"merge.schedule=subfit drops .*{message}; choose whole"):
        recipe("subfit").check_layers(adapter.layout.layers)


def test_rejects_models_that_it_cannot_drop_enough_of(windows):
    def compressed(model, **changes):
        compress(model, windows, recipe("subfit", **changes), target_layers=3, progress=False)

    model = pico("llama_gqa")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="change by a sublayer is not finite; try model.dtype"):
        compressed(model)
    with pytest.raises(ValueError, match="merge.protect_first=2 and merge.protect_last=2"):
        compressed(pico("llama_gqa"), protect_first=2, protect_last=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subfit") / "base"
    save_base(folder, "llama_gqa")
    return folder


METHOD = ("merge=subfit", "merge.target_layers=4", "merge.save_at=[5]")


def test_a_job_counts_used_parameters(base, tmp_path):
    folder, adapter = tmp_path / "out", ModelAdapter(pico("llama_gqa"))
    result = run_job(base, folder, *METHOD, *QUICK)
    dense, five, four = result["depths"]
    assert [depth["layers"] for depth in (dense, five, four)] == [6, 5, 4]
    for depth, name in ((five, "model-5"), (four, "model")):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert model.config.num_hidden_layers == LAYERS
        zeroed = [p for p in ORDER if not output_weight(model, *p).any()]
        drops = Plan.load(folder / name / "come" / "plan.json").dropped
        assert zeroed == [(each.layer, each.kind) for each in drops.sublayers]
        unused = sum(adapter.block_size(*place) for place in zeroed)
        assert dense["parameters"] - depth["parameters"] == unused
        assert depth["sparsity"] == pytest.approx(unused / dense["parameters"])
        card = " ".join((folder / name / "README.md").read_text().split())
        assert f"at the cost of {depth['layers']} layers" in card
        assert "the 6 layers have no fewer bytes" in card
    report = (folder / "report.md").read_text()
    assert f"which stay in the file as zeros: {drops.described()}" in report
    given = ("merge=from_plan", f"merge.plan={folder / 'plan.json'}", "eval=perplexity")
    again = run_job(base, tmp_path / "again", *given, "merge.target_layers=4")
    assert again["depths"][-1]["parameters"] == four["parameters"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(f / "model") for f in (folder, tmp_path / "again")
    )
    assert same_weights(first, second)
    with pytest.raises(ValueError, match="merge.target_layers=5: the plan passes through 4"):
        prepare_job(base, tmp_path / "five", *given, "merge.target_layers=5")
    with pytest.raises(ValueError, match="drops sublayers of layers, and distillation trains"):
        prepare_job(base, tmp_path / "six", *given, "merge.target_layers=4", "distill=come_sp")


def test_the_choice_reads_the_calibration_text_alone(base, tmp_path):
    for number, name in enumerate(("first", "second", "third"), start=1):
        lines = [f"{name} text, line {i * number}: layers {i % 7}, {i}." for i in range(300)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))

    def dropped(calibration, evaluation):
        folder = tmp_path / f"{calibration}-{evaluation}"
        run_job(
            base, folder, *METHOD[:2], "eval=perplexity", "calibration=text_file",
            f"calibration.path={tmp_path / calibration}.txt",
            f"eval.perplexity.path={tmp_path / evaluation}.txt",
        )  # fmt: skip
        return Plan.load(folder / "plan.json").dropped.sublayers

    known = dropped("first", "second")
    assert dropped("first", "third") == known
    assert dropped("second", "third") != known  # at least in their costs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("distill=come_sp",), "merge.schedule=subfit drops sublayers of layers, and distillation"),
        (("merge.budget.parameters=0.8",), "merge.schedule=subfit keeps all layers"),
        (("merge.selection=sbi",), "merge.selection has no effect with merge.schedule=subfit"),
        (("merge.kinds=last",), "merge.kinds has no effect with merge.schedule=subfit"),
        (("merge.schedule.cost=loss",), "merge.schedule.cost='loss': must be one of bypass"),
    ],
)
def test_rejects_settings(words, message, base):
    target = () if "budget" in words[0] else METHOD[1:2]
    with pytest.raises(ValueError, match=message):
        job_settings(base, "merge=subfit", "merge.target_layers=null", *target, *words)
