"""Every method on every family, and every method against a plain float64 computation of it."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from come.calibration.gradients import path_gradients
from come.calibration.manifold import diffusion_map, shared_information
from come.calibration.sensitivities import unit_scores
from come.calibration.statistics import StatisticsCollector
from come.calibration.stream import LayerStream
from come.merging.apply import apply
from come.merging.compress import compress
from come.merging.plan import Plan
from come.merging.recipe import Recipe
from come.merging.saving import check_cache
from come.merging.schedules.base import SCHEDULES
from come.models.adapter import UNITS, ModelAdapter
from come.operators.base import OPERATORS
from come.retention.base import RETENTION
from come.selection.base import SELECTION
from come.sensitivity.base import SENSITIVITY
from come.settings import MergeSettings
from tests.conftest import LAYERS, pico
from tests.reference import Reference

CONF = Path(__file__).parents[1] / "conf" / "merge"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "from_plan")
SOME = ["llama_mha", "llama_bias", "qwen3_gqa", "opt"]  # where a computation of each family is dear


def read(name: str) -> dict:
    """The settings of a recipe."""
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def recipe(name: str, **changes) -> Recipe:
    settings = read(name)
    if name.endswith("_plus"):
        changes = {"protect_first": 1, "protect_last": 1} | changes  # a pico model has six layers
    return MergeSettings(**settings | changes).recipe()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def decoder_layers(model):
    return model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers


def loss(model, windows):
    """Mean cross-entropy of a whole model, in its dtype."""
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())


def without(model, dropped):
    """A float64 copy of a model without some layers."""
    other = copy.deepcopy(model).double()
    layers = decoder_layers(other)
    kept = [layer for i, layer in enumerate(layers) if i not in dropped]
    del layers[:]
    layers.extend(kept)
    return other


@pytest.fixture
def stream(family, windows):
    adapter = ModelAdapter(pico(family))
    collector = StatisticsCollector(adapter, ("abs", "square", "mean"), "all")
    with LayerStream(adapter, windows, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1, collector)
        stream.found = collector.found
        yield stream


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_every_family(family, name, windows, tmp_path):
    model, method = pico(family), recipe(name)
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    assert model.config.num_hidden_layers == len(plan.history) == LAYERS - 2
    assert [layer for span in plan.history for layer in span] == list(range(LAYERS))
    assert check_cache(model) < 1e-4
    plan.save(tmp_path / "plan.json")
    assert same(apply(Plan.load(tmp_path / "plan.json"), pico(family)), model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    generated = loaded.generate(windows[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == windows.shape[1] + 4


PARTS = [
    *({"sensitivity": name} for name in SENSITIVITY.names()),
    *({"selection": name} for name in SELECTION.names()),
    *({"retention": name} for name in RETENTION.names()),
    *({"norms": "fold", "operator": name, "protect_first": 1} for name in OPERATORS.names()),
    *({"schedule": name} for name in SCHEDULES.names() if name != "fixed"),
    {"groups": ((3, 4), (0, 1))},
    {"groups": ((3, 4), (0, 1)), "operator": "drop"},
    {"schedule": "progressive", "operator": "drop", "m": 3},
    *(
        {"parts": (part,), **more}
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
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3_gqa", "opt", "opt_nobias"])
def test_every_part_in_the_paper_s_recipe(family, parts, windows):
    model = pico(family)
    plan = compress(model, windows, Recipe(**parts), target_layers=LAYERS - 2, progress=False)
    assert same(apply(plan, pico(family)), model)
    again = compress(pico(family), windows, Recipe(**parts), target_layers=4, progress=False)
    assert again == plan


def test_recipes_name_what_the_registries_hold():
    for name in RECIPES:
        assert read(name)["name"] == name
        recipe(name)
        first = (CONF / f"{name}.yaml").read_text().splitlines()[0]
        assert first.endswith(f"python run.py merge={name}") or "python run.py merge=" in first
    used = {recipe(name).operator for name in RECIPES}
    assert used == set(OPERATORS.names())


@pytest.mark.parametrize(
    "parts",
    [
        *({"selection": name, "allow_remerge": True} for name in SELECTION.names()),
        *({"schedule": name} for name in ("one_shot", "block", "laco")),
        {"operator": "prune_comp"},
        {"operator": "replaceme", "protect_first": 1},
        {"groups": ((3, 4), (0, 1))},
        {"parts": ("ffn",), "allow_remerge": True},
        {"parts": ("attention",), "operator": "drop", "selection": "skip_loss"},
    ],
    ids=lambda parts: "-".join(map(str, parts.values())),
)
def test_an_interrupted_search_ends_as_an_uninterrupted_one(parts, windows, tmp_path):
    class Interrupt(Exception):
        pass

    whole, method = pico("llama_gqa"), Recipe(**parts)
    target = 4 if "groups" in parts else 3
    expected = compress(whole, windows, method, target_layers=target, progress=False)
    for done in range(1, len(expected.steps)):

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
        assert same(model, whole)


@pytest.mark.parametrize("name", ["come", "replaceme", "prune_comp", "sleb", "taylor", "laco"])
def test_half_precision(name, windows):
    model = pico("qwen3_gqa").bfloat16()
    plan = compress(model, windows, recipe(name), target_layers=4, progress=False)
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())
    assert same(apply(plan, pico("qwen3_gqa").bfloat16()), model)
    full = compress(pico("qwen3_gqa"), windows, recipe(name), target_layers=4, progress=False)
    scores = {(c.first, c.last): c.score for c in full.steps[0].candidates}
    for candidate in plan.steps[0].candidates:
        span = (candidate.first, candidate.last)
        if span in scores:
            assert candidate.score == pytest.approx(scores[span], rel=0.1, abs=0.05)


def test_units_of_parts_are_those_of_their_own_layers(windows):
    """A merged block merged again: what is in between is silent, and not looked at."""
    gaps = 0
    for seed in range(4):
        model, snapshots = pico("llama_gqa"), [(None, pico("llama_gqa"))]
        plan = compress(
            model,
            windows,
            Recipe(parts=("ffn",), allow_remerge=True, selection="random", seed=seed),
            target_layers=2,
            on_step=lambda plan, model=model, seen=snapshots: seen.append(
                (plan, copy.deepcopy(model))
            ),
            progress=False,
        )
        for (before, merged), step in zip(snapshots, plan.steps):
            places = before.places[step.first : step.last + 1] if before else []
            if len(places) == 2 and places[1] - places[0] > 1:
                gaps += 1
                reference = Reference(merged, windows)
                scores = {u: [reference.sensitivity(place, u) for place in places] for u in UNITS}
                assert step.kept["channel"] == _plain_units(scores, step.shares)["channel"]
    assert gaps > 0


# --- sensitivity ---------------------------------------------------------------------------


def columns(reference: Reference, index: int, unit: str) -> dict[str, torch.Tensor]:
    """Every metric that needs no gradient, by channel, from the inputs of the whole model."""
    weight, x = reference.output(index, unit).weight, reference.inputs[index, unit]
    tokens = len(x)
    rows = range(weight.shape[1])
    size = [math.sqrt(sum(float(w) ** 2 for w in weight[:, j])) for j in rows]
    mean = [float(x[:, j].sum()) / tokens for j in rows]
    return {
        "activation": [float(x[:, j].abs().sum()) / tokens for j in rows],
        "magnitude": [float(weight[:, j].abs().sum()) for j in rows],
        "wanda": [math.sqrt(float((x[:, j] ** 2).sum()) / tokens) * size[j] for j in rows],
        "fluctuation": [
            float(((x[:, j] - mean[j]) ** 2).sum()) / tokens * size[j] ** 2 for j in rows
        ],
    }


def per_unit(values, stream, unit):
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.view(-1, stream.adapter.columns_per_unit(unit)).mean(dim=1)


def found_scores(stream, name, first, last):
    statistics = [stream.found[i] for i in range(first, last + 1)]
    spans = [[i] for i in range(first, last + 1)]
    return unit_scores(stream, SENSITIVITY.create(name), statistics, spans, range(first, last + 1))


@pytest.mark.parametrize("name", ["activation", "magnitude", "wanda", "fluctuation"])
def test_metrics_of_inputs_and_weights(stream, name, windows):
    reference = Reference(stream.adapter.model, windows)
    scores = found_scores(stream, name, 0, LAYERS - 1)
    for unit, index in itertools.product(UNITS, range(LAYERS)):
        expected = per_unit(columns(reference, index, unit)[name], stream, unit)
        torch.testing.assert_close(scores[unit][index], expected, rtol=2e-4, atol=1e-12)


def output_weights(model, index):
    adapter = ModelAdapter(model)
    return {unit: adapter.output_map(index, unit).weight for unit in UNITS}


def test_taylor_is_the_whole_models_gradient(stream, windows):
    model = copy.deepcopy(stream.adapter.model).double().requires_grad_()
    loss(model, windows).backward()
    for first, last in [(1, 2), (3, 5)]:
        scores = found_scores(stream, "taylor", first, last)
        for index in range(first, last + 1):
            for unit, weight in output_weights(model, index).items():
                expected = per_unit((weight * weight.grad).abs().sum(0).detach(), stream, unit)
                torch.testing.assert_close(
                    scores[unit][index - first], expected, rtol=2e-3, atol=1e-9
                )
    assert all(p.grad is None for p in stream.adapter.model.parameters())


def whole_path(model, windows, steps):
    """Integrated gradients of every channel's scale, from the whole float64 model."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    adapter = ModelAdapter(model)
    total = {}
    for step in range(steps):
        scales, handles = {}, []
        for index, unit in itertools.product(range(adapter.num_layers), UNITS):
            linear = adapter.output_map(index, unit)
            scale = torch.full((linear.in_features,), (step + 0.5) / steps, dtype=torch.float64)
            scales[index, unit] = scale.requires_grad_()
            handles.append(
                linear.register_forward_pre_hook(lambda m, a, s=scale: (a[0] * s, *a[1:]))
            )
        loss(model, windows).backward()
        for key, scale in scales.items():
            total[key] = total.get(key, 0) + scale.grad / steps
        for handle in handles:
            handle.remove()
    return total


@pytest.mark.parametrize("family", SOME)
def test_path_attribution_is_the_whole_models(stream, windows):
    expected = whole_path(stream.adapter.model, windows, 10)
    scores = found_scores(stream, "path_attribution", 2, 3)
    for index, unit in itertools.product((2, 3), UNITS):
        values = per_unit(expected[index, unit].abs(), stream, unit)
        torch.testing.assert_close(scores[unit][index - 2], values, rtol=5e-3, atol=1e-6)


def test_path_attributions_add_up_to_the_loss(windows):
    model = pico("llama_gqa")
    adapter = ModelAdapter(model)
    silent = copy.deepcopy(model)
    for index, unit in itertools.product(range(LAYERS), UNITS):
        ModelAdapter(silent).output_map(index, unit).weight.data.zero_()
    with LayerStream(adapter, windows, progress=False) as stream, torch.no_grad():
        stream.embed()
        stream.advance(0, LAYERS - 1)
        found = path_gradients(stream, range(LAYERS), steps=40)
        difference = float(loss(model, windows) - loss(silent, windows))
    assert sum(float(part.sum()) for part in found.values()) == pytest.approx(difference, rel=0.02)


# --- selection -----------------------------------------------------------------------------

SPANS = [(0, 1), (2, 2), (1, 4), (4, 5)]


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (y.T @ x).norm() ** 2
    return 1 - float(cross / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_scores_of_hidden_states(stream, windows, tokens):
    reference = Reference(stream.adapter.model, windows)
    for first, last in SPANS:

        def score(name, span=(first, last)):
            return SELECTION.create(name, {"tokens": tokens}).score(stream, *span)

        influences = [reference.bi(i, tokens) for i in range(first, last + 1)]
        assert score("bi_sum") == pytest.approx(sum(influences), rel=1e-3)
        cosines = reference.cosines(first, last + 1, tokens)
        distance = sum(1 - c for c in cosines) / len(cosines)
        assert score("cosine") == pytest.approx(distance, rel=1e-3)
        angles = [math.acos(max(-1, min(1, c))) / math.pi for c in cosines]
        assert score("angular") == pytest.approx(sum(angles) / len(angles), rel=1e-3)
        states = (reference.h[i].flatten(0, 1) for i in (first, last + 1))
        assert score("cka") == pytest.approx(cka(*states), rel=1e-3, abs=1e-6)


def test_loss_without_a_span_is_the_smaller_models(stream, windows):
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
    """Coordinates of the random walk, by loops and the eigenvectors of its own matrix."""
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


def test_diffusion_map_is_the_random_walks():
    points = torch.randn(20, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, expected = diffusion_map(points), plain_diffusion_map(points)
    for axis in range(2):
        ranks = expected[:, axis].argsort().argsort().double() / 20
        flipped = (-expected[:, axis]).argsort().argsort().double() / 20
        assert torch.equal(found[:, axis], ranks) or torch.equal(found[:, axis], flipped)


# --- retention -----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3])
def test_posterior_takes_the_split_with_the_lowest_loss(windows, m):
    groups = (tuple(range(2, 2 + m)),)
    method = Recipe(groups=groups, retention="posterior", options={"granularity": 4})
    model = pico("llama_gqa")
    plan = compress(model, windows, method, target_layers=LAYERS - m + 1, progress=False)
    losses = {}
    for counts in itertools.product(range(5), repeat=m):
        if sum(counts) != 4:
            continue
        step = plan.steps[0]
        scores = _come_scores(windows, groups[0])
        kept = _plain_units(scores, [c / 4 for c in counts])
        tried = copy.deepcopy(plan)
        object.__setattr__(tried.steps[0], "kept", kept)
        object.__setattr__(tried.steps[0], "shares", [c / 4 for c in counts])
        with torch.no_grad():
            losses[counts] = float(loss(apply(tried, pico("llama_gqa")).double(), windows))
    best = tuple(round(4 * share) for share in step.shares)
    if m == 2:
        assert losses[best] == pytest.approx(min(losses.values()), rel=1e-5)
    else:  # a local minimum of single moves
        near = [c for c in losses if sum(abs(a - b) for a, b in zip(c, best)) == 2]
        assert losses[best] <= min(losses[c] for c in near) * (1 + 1e-5)


def _come_scores(windows, layers):
    reference = Reference(pico("llama_gqa"), windows)
    return {unit: [reference.sensitivity(i, unit) for i in layers] for unit in UNITS}


def _plain_units(scores, shares):
    """Units by shares, written from the formula."""
    kept = {}
    for unit, layers in scores.items():
        total = len(layers[0])
        counts = [math.floor(total * share) for share in shares]
        biggest = shares.index(max(shares))
        counts[biggest] = total - sum(c for i, c in enumerate(counts) if i != biggest)
        kept[unit] = [
            sorted(sorted(range(total), key=lambda j, s=s: (-s[j], j))[:n])
            for s, n in zip(layers, counts)
        ]
    return kept


def test_joint_ranks_all_units_of_the_group(windows):
    method = Recipe(groups=((1, 2, 3),), retention="joint")
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    scores = _come_scores(windows, (1, 2, 3))
    for unit in UNITS:
        total = len(scores[unit][0])
        ranked = sorted(
            (-score / sum(layer), index, j)
            for index, layer in enumerate(scores[unit])
            for j, score in enumerate(layer)
        )[:total]
        expected = [sorted(j for _, i, j in ranked if i == index) for index in range(3)]
        assert plan.steps[0].kept[unit] == expected
    assert plan.steps[0].shares == [len(k) / 24 for k in plan.steps[0].kept["channel"]]


def test_mka_weights_are_a_sigmoid_of_mean_similarity(windows):
    windows = 3 + (windows.repeat(4, 1) + 11 * torch.arange(20)[:, None]) % 290
    method = Recipe(operator="average", retention="mka", groups=((2, 3),))
    model = pico("llama_gqa")
    maps = [diffusion_map(h[:, -1]) for h in Reference(model, windows).h[1:]]
    plan = compress(model, windows, method, target_layers=5, progress=False)
    means = [sum(shared_information(maps[i], other) for other in maps) / 6 for i in (2, 3)]
    expected = 1 / (1 + math.exp(-means[0] / sum(means)))
    assert plan.steps[0].shares == pytest.approx([expected, 1 - expected], rel=0.05)


# --- operators -----------------------------------------------------------------------------


def states(model, *indices):
    return [ModelAdapter(model).layer_state(i) for i in indices]


def test_laco_adds_up_differences(family):
    adapter = ModelAdapter(pico(family))
    layers = [adapter.layer_state(i) for i in (1, 2, 3)]
    merged = OPERATORS.create("laco").merge(layers, adapter.roles, [1 / 3] * 3, {})
    released = OPERATORS.create("laco_released").merge(layers, adapter.roles, [1 / 3] * 3, {})
    for name in merged:
        a, b, c = (layer[name].double() for layer in layers)
        expected = a + (b - a) + (c - a)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-5)
        is_norm = name.rpartition(".")[0] in (
            adapter.architecture.attention_norm,
            adapter.architecture.ffn_norm,
        )
        assert torch.equal(released[name], layers[0 if is_norm else 2][name])
    pair = OPERATORS.create("laco").merge(layers[:2], adapter.roles, [0.5, 0.5], {})
    for name, tensor in pair.items():
        torch.testing.assert_close(tensor, layers[1][name])


def test_a_drop_is_the_model_without_the_layers(family, windows):
    dense = pico(family)
    for groups, gone in ((((2, 3, 4),), (3, 4)), (((0, 1),), (1,))):
        model = pico(family)
        method = Recipe(operator="drop", groups=groups)
        compress(model, windows, method, target_layers=LAYERS - len(gone), progress=False)
        expected = without(dense, gone)(windows, use_cache=False).logits
        torch.testing.assert_close(model(windows).logits.double(), expected, rtol=1e-3, atol=1e-4)
    model = pico(family)
    method = Recipe(operator="drop", selection="reverse", protect_last=LAYERS - 2)
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    assert plan.history[0] == [0, 1, 2]  # nothing in front: the layer behind stays
    expected = without(dense, (0, 1))(windows, use_cache=False).logits
    torch.testing.assert_close(model(windows).logits.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("span", [(0, 1), (2, 3)])
def test_prune_comp_equals_scaling_all_in_front(family, windows, span):
    dense = pico(family)
    h = Reference(dense, windows).h
    first, last = span
    alpha = h[last + 1].norm(dim=-1).mean() / h[first].norm(dim=-1).mean()
    scaled = without(dense, range(first, last + 1))
    layers, seen = decoder_layers(scaled), []
    layers[first].register_forward_pre_hook(lambda m, a: (a[0] * alpha, *a[1:]))
    expected = scaled(windows, use_cache=False).logits
    model, m = pico(family), 3
    protect = {"protect_first": first, "protect_last": LAYERS - 1 - last}
    method = Recipe(operator="prune_comp", selection="bi_sum", m=m, **protect)
    compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    assert not seen
    found = model(windows).logits.double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_replaceme_is_a_least_squares_map(family, windows):
    windows = torch.randint(3, 300, (12, 16), generator=torch.Generator().manual_seed(1))
    dense = pico(family)
    reference = Reference(dense, windows)
    outputs = []
    hook = reference.output(1, "channel").register_forward_hook(
        lambda module, inputs, output: outputs.append(output.detach().reshape(-1, 32))
    )
    with torch.no_grad():
        reference.model(windows, use_cache=False)
    hook.remove()
    m, h = outputs[0], [state.flatten(0, 1) for state in reference.h]
    transform = torch.linalg.lstsq(m, m + h[4] - h[2]).solution
    method = Recipe(operator="replaceme", groups=((1, 2, 3),))
    model = pico(family)
    plan = compress(model, windows, method, target_layers=4, progress=False)
    old, new = ModelAdapter(dense), ModelAdapter(model)
    weight = transform.T @ old.output_map(1, "channel").weight.double()
    torch.testing.assert_close(
        new.output_map(1, "channel").weight.double(), weight, rtol=1e-2, atol=1e-3
    )
    if old.output_map(1, "channel").bias is not None:
        bias = transform.T @ old.output_map(1, "channel").bias.double()
        torch.testing.assert_close(
            new.output_map(1, "channel").bias.double(), bias, rtol=1e-2, atol=1e-3
        )
    assert set(plan.steps[0].solved.hashes) == set(new.output_tensors("channel"))
    for name, tensor in new.layer_state(1).items():
        if name not in plan.steps[0].solved.hashes:
            assert torch.equal(tensor, old.layer_state(1)[name])


# --- parts ---------------------------------------------------------------------------------


def output_names(model, part):
    adapter = ModelAdapter(model)
    return adapter.output_tensors("kv_group" if part == "attention" else "channel")


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_part_is_dropped_where_the_loss_misses_it_least(family, windows, part):
    method = Recipe(operator="drop", selection="skip_loss", parts=(part,))
    model, dense = pico(family), pico(family).double()
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    gone = []
    for step in plan.steps:
        losses = {}
        for candidate in (i for i in range(LAYERS) if i not in gone):
            tried = copy.deepcopy(dense)
            for index in (*gone, candidate):
                state = ModelAdapter(tried).layer_state(index)
                for name in output_names(tried, part):
                    state[name].zero_()
            with torch.no_grad():
                losses[candidate] = float(loss(tried, windows))
        gone.append(min(losses, key=losses.get))
        assert min(losses.values()) == pytest.approx(step.score, rel=1e-4)
    assert dropped(plan) == gone
    assert model.config.num_hidden_layers == LAYERS
    assert plan.places == [i for i in range(LAYERS) if i not in gone]
    for index in range(LAYERS):
        old, new = (ModelAdapter(m).layer_state(index) for m in (pico(family), model))
        for name in old:
            silent = index in gone and name in output_names(model, part)
            expected = torch.zeros_like(old[name]) if silent else old[name]
            assert torch.equal(new[name], expected), name
    assert check_cache(model) < 1e-4


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_scores_of_parts_begin_and_end_inside_layers(family, windows, part):
    model = pico(family)
    reference = Reference(model, windows)
    middle = []
    norm = {"opt": "final_layer_norm"}.get(model.config.model_type, "post_attention_layernorm")
    for layer in reference.layers:
        layer.get_submodule(norm).register_forward_pre_hook(
            lambda m, a: middle.append(a[0].reshape(*windows.shape, -1))
        )
    with torch.no_grad():
        reference.model(windows, use_cache=False)
    adapter = ModelAdapter(model)
    with LayerStream(adapter, windows, batch_size=2, progress=False, block=part) as stream:
        stream.embed()
        collector = StatisticsCollector(adapter, (), "all")
        stream.advance(0, LAYERS - 1, collector)
        for first, last in SPANS:
            x = reference.h[first] if part == "attention" else middle[first]
            y = middle[last] if part == "attention" else reference.h[last + 1]
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            found = SELECTION.create("cosine", {"tokens": "all"}).score(stream, first, last)
            assert found == pytest.approx(float(1 - cosine.mean()), rel=1e-3, abs=1e-6)
            if first == last:
                bi = float((1 - cosine.clamp(0, 1)).mean())
                assert collector.found[first].bi == pytest.approx(bi, rel=1e-3, abs=1e-6)


def test_a_merged_part_stands_in_its_first_layer(family, windows):
    for part in ("attention", "ffn"):
        method = Recipe(parts=(part,), groups=((1, 2), (4, 5)))
        model, whole = pico(family), pico(family)
        plan = compress(model, windows, method, target_layers=4, progress=False)
        assert plan.history == [[0], [1, 2], [3], [4, 5]]
        adapter, roles = ModelAdapter(model), ModelAdapter(whole).roles
        step = plan.steps[0]
        merged = OPERATORS.create("concat").merge(
            states(whole, 1, 2), roles, step.shares, step.kept
        )
        own = adapter.block_tensors(part)
        for name, tensor in adapter.layer_state(1).items():
            expected = merged[name] if name in own else states(whole, 1)[0][name]
            assert torch.equal(tensor, expected)
        for name in output_names(model, part):
            assert not adapter.layer_state(2)[name].any()


# --- choices of whole methods --------------------------------------------------------------


def dropped(plan):
    """Original layers that a plan of drops left out, in order."""
    own, gone = list(range(plan.base.num_layers)), []
    for step in plan.steps:
        keeper = step.keeper
        group = own[step.first : step.last + 1]
        gone += [layer for i, layer in enumerate(group) if i != keeper]
        own[step.first : step.last + 1] = [group[keeper]]
    return gone


def test_shortgpt_uidl_and_sleb_choose_as_plain_loops_do(family, windows):
    dense = pico(family)
    reference = Reference(dense, windows)

    plan = compress(pico(family), windows, recipe("shortgpt"), target_layers=3, progress=False)
    assert dropped(plan) == sorted(range(LAYERS), key=lambda i: reference.bi(i, "all"))[:3]

    plan = compress(pico(family), windows, recipe("uidl"), target_layers=4, progress=False)
    angles = {}
    for first in range(LAYERS - 1):
        cosines = reference.cosines(first, first + 2, "last")
        angles[first] = sum(math.acos(max(-1, min(1, c))) for c in cosines)
    best = min(angles, key=lambda first: angles[first])
    assert dropped(plan) == [best, best + 1]

    plan = compress(pico(family), windows, recipe("sleb"), target_layers=3, progress=False)
    gone: list[int] = []
    while len(gone) < 3:
        rest = [i for i in range(LAYERS) if i not in gone]
        with torch.no_grad():
            losses = {i: float(loss(without(dense, (*gone, i)), windows)) for i in rest}
        gone.append(min(losses, key=lambda i: losses[i]))
    assert dropped(plan) == gone


def test_laco_keeps_merges_that_leave_the_output_similar(windows):
    model = pico("llama_gqa")
    snapshots = []
    options = {"threshold": 0.9, "interval": 1, "relax": 0.1, "trial_windows": 5}
    method = recipe("laco", m=2, options=options)
    plan = compress(
        model,
        windows,
        method,
        target_layers=LAYERS - 2,
        on_step=lambda plan: snapshots.append(copy.deepcopy(model)),
        progress=False,
    )
    dense = Reference(pico("llama_gqa"), windows).h[-1]
    for step, snapshot in zip(plan.steps, snapshots):
        after = Reference(snapshot, windows).h[-1]
        cosine = torch.nn.functional.cosine_similarity(after, dense, dim=-1).mean()
        assert 1 - step.score == pytest.approx(float(cosine), rel=1e-4)
        tried = [c for c in step.candidates if (c.first, c.last) != (step.first, step.last)]
        assert all(c.first > step.first or c.score >= step.score for c in tried)


def test_depths_of_a_block_method_are_found_apart(windows):
    spans = [
        compress(
            pico("llama_gqa"), windows, recipe("uidl"), target_layers=target, progress=False
        ).steps
        for target in (4, 3)
    ]
    assert [len(steps) for steps in spans] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention": "joint", "operator": "average"}, "merge.retention=joint ranks units"),
        ({"operator": "replaceme"}, "set merge.protect_first=1 or more"),
        ({"schedule": "one_shot", "allow_remerge": True}, "allow_remerge=true is not possible"),
        ({"schedule": "one_shot", "operator": "drop", "m": 3}, "drops single layers; merge.m=3"),
        ({"schedule": "one_shot", "operator": "prune_comp"}, "solves on the model as it is"),
        ({"schedule": "fixed"}, "merge.schedule=fixed needs merge.groups"),
        ({"groups": [[3, 5]]}, r"merge.groups has \[3, 5\]: a group is two or more adjacent"),
        ({"groups": [[3, 4], [4, 5]]}, "merge.groups: layer 4 stands in two groups"),
        ({"parts": ("mlp",)}, r"merge.parts=\['mlp'\]: allowed are \[attention\]"),
        ({"parts": ("ffn",), "operator": "prune_comp"}, "prune_comp solves for whole layers"),
        ({"protect_first": -1}, "merge.protect_first=-1: must be at least 0"),
        ({"retention": "posterior", "options": {"granularity": 0}}, "granularity=0: must be"),
        (
            {"schedule": "laco", "options": {"interval": 0}},
            "interval=0 and trial_windows=4",
        ),
    ],
)
def test_recipes_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)
