"""Sets of spans that are compared by putting the layers of their trial merges into the model."""

import copy
import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

from come.merge.loop import compress
from come.merge.plan import BaseModel, Plan
from come.merge.schedules.optimal_partition import estimate, optimal_partition
from come.merge.selection import trial_kl
from come.merge.selection.trial_kl import TrialKL
from come.merge.trial_layers import NAME, TrialLayers, remove_trial_layers
from come.merge.trial_scores import TrialScores
from come.models.adapter import ModelAdapter
from tests.bases import save_base
from tests.conftest import pico
from tests.jobs import run_job
from tests.methods import decoder_layers, paper, without

METHOD = {
    "schedule": "optimal_partition",
    "selection": "trial_kl",
    "refit": "ridge",
    "retention": "adaptive",
    "m": 2,
}


def method(sets, **options):
    settings = {"trial_windows": 2, "validation_windows": 2} | options
    recipe = paper(**METHOD, options=settings)
    recipe.schedule.candidate_sets = sets
    return recipe


def merged(windows, sets, *, layers=6, target=4, **keywords):
    model = pico("llama_gqa", num_hidden_layers=layers)
    return compress(model, windows, method(sets), target_layers=target, progress=False, **keywords)


def spans_of(plan):
    """The spans of original layers, ascending."""
    return tuple((span[0], span[-1]) for span in plan.history if len(span) > 1)


@torch.no_grad()
def test_a_set_is_scored_by_the_kl_divergence_of_the_whole_model(windows, monkeypatch):
    """Of complete models with the trial layers of all spans, in float64."""
    fit, fitted = trial_kl.fitted_trial, {}

    def recorded(span, *rest):
        route = fit(span, *rest)
        fitted[span.first, span.last] = copy.deepcopy(route[0][1])
        return route

    monkeypatch.setattr(trial_kl, "fitted_trial", recorded)
    trials = TrialScores()
    merged(windows, 3, trials=trials)
    scores = {key.split("/")[1]: score for key, score in trials.scores.items() if "," in key}
    assert len(scores) == 3
    dense = pico("llama_gqa").double()
    reference = dense(windows[-2:]).logits.log_softmax(-1)
    for key, score in scores.items():
        spans = [tuple(map(int, span.split("-"))) for span in key.split(",")]
        model = without(pico("llama_gqa"), {last for _, last in spans})
        for gone, (first, last) in enumerate(spans):
            decoder_layers(model)[first - gone] = fitted[first, last]
        predicted = model.double()(windows[-2:]).logits.log_softmax(-1)
        kl = (reference.exp() * (reference - predicted)).sum(-1).mean()
        assert score == pytest.approx(float(kl), rel=1e-3)


@pytest.fixture
def opposed(monkeypatch):
    """Later sets get better scores; returns the sets that were scored."""
    scored = []

    def score_together(self, stream, spans, layers):
        assert all(span in layers for span in spans)
        scored.append(tuple(spans))
        return 1.0 / len(scored)  # the last one is the best

    monkeypatch.setattr(TrialKL, "score_together", score_together)
    return scored


def test_the_set_with_the_lowest_score_is_taken(windows, opposed):
    plain = merged(windows, 1)
    assert not opposed
    plan = merged(windows, 3)
    assert len(opposed) == len(set(opposed)) == 3
    assert opposed[0] == spans_of(plain)
    assert spans_of(plan) == opposed[2] != opposed[0]
    costs = {(c.first, c.last): c.score for c in plan.steps[0].candidates}
    for step in plan.steps:
        span = step.spans[0][0], step.spans[-1][-1]
        assert step.score == costs[span]
        assert {tuple(s) for s in step.ruled_out} == set(plan.steps[0].ruled_out)
    assert not set(plan.steps[0].ruled_out) & set(spans_of(plan))


def test_each_candidate_is_the_cheapest_without_a_span_of_the_best_so_far(windows, opposed):
    plan = merged(windows, 3)
    costs = {(c.first, c.last): c.score for c in plan.steps[0].candidates}

    def cheapest(ruled_out):
        def cost(first, last):
            return None if (first, last) in ruled_out else estimate(costs)(first, last)

        (spans,) = optimal_partition(cost, 6, 2, [2])
        return tuple(spans), sum(cost(*span) for span in spans)

    out, seen = set(), [opposed[0]]
    for found in opposed[1:]:
        nearby = [(cheapest(out | {span}), span) for span in seen[-1]]
        nearby = [each for each in nearby if each[0][0] not in seen]
        (expected, _), span = min(nearby, key=lambda each: each[0][1])
        assert found == expected
        seen.append(found)
        out.add(span)


def test_every_depth_counts(windows, monkeypatch):
    """The spans of each depth of `stops`, together with those of the depths before it."""
    scored = []

    def score_together(self, stream, spans, layers):
        scored.append(tuple(spans))
        return float(len(scored))

    monkeypatch.setattr(TrialKL, "score_together", score_together)
    plan = merged(windows, 2, layers=8, target=5, stops=[6])
    steps = [(step.spans[0][0], step.spans[-1][-1]) for step in plan.steps]
    assert scored[0] == tuple(sorted(steps[:2]))
    assert scored[1] == tuple(sorted(steps))
    assert len(scored) == 3  # both candidates begin with the same set


class Killed(BaseException):
    pass


def test_layers_of_trials_survive_an_interruption(windows, monkeypatch, tmp_path):
    """A later session of the job reads them; a damaged file's layer is fitted again."""
    fitted, add, score = [], TrialLayers.add, TrialKL.score_together

    def recorded(self, first, last, route):
        fitted.append((first, last))
        add(self, first, last, route)

    def killed(self, *rest):
        raise Killed

    monkeypatch.setattr(TrialLayers, "add", recorded)
    whole = merged(windows, 3)
    every = sorted(fitted)
    fitted.clear()
    monkeypatch.setattr(TrialKL, "score_together", killed)
    path = tmp_path / "trials.json"
    with pytest.raises(Killed):
        merged(windows, 3, trials=TrialScores(path, "job"))
    monkeypatch.setattr(TrialKL, "score_together", score)
    before, files = len(fitted), sorted(tmp_path.glob(f"{NAME}job-*/*.safetensors"))
    assert len(files) == before >= 2
    span = tuple(map(int, files[0].stem.split("-")))[:2]
    files[0].write_bytes(files[0].read_bytes()[:-8])
    assert merged(windows, 3, trials=TrialScores(path, "job")).hash == whole.hash
    assert sorted(fitted[:before] + [s for s in fitted[before:] if s != span]) == every
    assert not list(tmp_path.glob(f"{NAME}*"))


def test_layers_of_other_jobs_and_other_weights_are_not_read(tmp_path, windows, monkeypatch):
    layer = ModelAdapter(pico("llama_gqa")).layer(2)
    TrialLayers(tmp_path, "job-model").add(2, 3, [(2, layer)])
    assert (2, 3) in TrialLayers(tmp_path, "job-model")
    assert (2, 3) not in TrialLayers(tmp_path, "job-other")
    remove_trial_layers(tmp_path, "job")
    assert (2, 3) in TrialLayers(tmp_path, "job-model")
    remove_trial_layers(tmp_path, "jo")
    assert not list(tmp_path.iterdir())

    seen, add = set(), TrialLayers.add

    def recorded(self, *rest):
        add(self, *rest)
        seen.update(path.name for path in tmp_path.glob(f"{NAME}job-*"))

    monkeypatch.setattr(TrialLayers, "add", recorded)
    base = BaseModel.of(ModelAdapter(pico("llama_gqa", num_hidden_layers=6)))
    for weights in ("some", "others"):
        plan = Plan(replace(base, fingerprint=weights), "concat", "fold")
        merged(windows, 2, plan=plan, trials=TrialScores(tmp_path / "trials.json", "job"))
    assert len(seen) == 2


def test_a_job_removes_trial_layers_of_others_first_and_its_own_at_the_end(tmp_path, monkeypatch):
    base, folder, left = save_base(tmp_path / "base", "llama_gqa"), tmp_path / "run", []
    other = folder / f"{NAME}other-model"
    other.mkdir(parents=True)
    (other / "2-3-2.safetensors").write_bytes(bytes(8))
    score = TrialKL.score_together

    def score_together(self, *rest):
        left.extend(path.name for path in folder.glob(f"{NAME}*"))
        return score(self, *rest)

    monkeypatch.setattr(TrialKL, "score_together", score_together)
    words = ("merge=come_plus", "merge.m=2", "merge.target_layers=4", "eval=none")
    run_job(base, folder, *words)
    assert left
    assert other.name not in left
    leaked = folder / f"{NAME}{'0' * 12}-model"
    leaked.mkdir()
    run_job(base, folder, *words)  # is finished
    assert not list(folder.glob(f"{NAME}*"))


def test_the_choice_survives_an_interruption(windows, opposed, tmp_path):
    """After a step the plan knows what is ruled out; before it, scores are read from the file."""
    plans, path = [], tmp_path / "trials.json"
    whole = merged(windows, 3, on_step=plans.append, trials=TrialScores(path, "job"))
    plans[0].save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plans[0]
    assert loaded.steps[0].ruled_out
    assert merged(windows, 3, plan=loaded).hash == whole.hash

    count = len(opposed)
    assert merged(windows, 3, trials=TrialScores(path, "job")).hash == whole.hash
    assert len(opposed) == count  # nothing is scored again
    data = json.loads(path.read_text())
    last = [key for key in data["scores"] if "," in key][-1]
    del data["scores"][last]
    path.write_text(json.dumps(data))
    merged(windows, 3, trials=TrialScores(path, "job"))
    assert len(opposed) == count + 1  # its layers are fitted again


@pytest.mark.parametrize("seed", range(6))
def test_the_best_set_is_merged_whatever_was_tried_after_it(windows, monkeypatch, seed):
    """Trials of later sets change the sums of scores, and with them the cheapest set."""
    rng, scores = random.Random(seed), {}

    def refine_all(self, trials, refit):
        found = []
        for span, _ in trials:
            self.layers.add(span.first, span.last, [(0, torch.nn.Identity())])
            found.append(rng.uniform(1, 3) * (span.last - span.first) ** 0.5)
        return found

    def score_together(self, stream, spans, layers):
        return scores.setdefault(tuple(spans), rng.random())

    monkeypatch.setattr(TrialKL, "refine_all", refine_all)
    monkeypatch.setattr(TrialKL, "score_together", score_together)
    recipe = method(5)
    recipe.m = 4
    model = pico("llama_gqa", num_hidden_layers=10)
    plan = compress(model, windows, recipe, target_layers=6, progress=False)
    assert scores[spans_of(plan)] == min(scores.values())


@pytest.mark.parametrize("value", [[[1]], [[1, 2, 3]], [["1", 2]], "1-2"])
def test_ruled_out_spans_of_a_file_are_checked(windows, opposed, tmp_path, value):
    plan = merged(windows, 3)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["steps"][0]["ruled_out"] = value
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"steps\[0\].ruled_out must be"):
        Plan.load(tmp_path / "plan.json")


def test_one_span_needs_no_comparison(windows, opposed):
    assert len(merged(windows, 4, target=5).steps) == 1
    assert not opposed


def test_as_many_candidates_as_there_are(windows, opposed):
    """With 6 layers and pairs, two disjoint pairs can be chosen in six ways."""
    merged(windows, 50)
    pairs = list(itertools.pairwise(range(6)))
    every = [(a, b) for a, b in itertools.combinations(pairs, 2) if a[1] < b[0]]
    assert len(every) == 6
    assert set(opposed) <= set(every)
    assert 3 <= len(opposed) == len(set(opposed)) <= 6


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_trial_layers_are_removed(windows, tmp_path, store, monkeypatch):
    """Also those in a job folder, after the choice."""
    seen, score = [], TrialKL.score_together

    def score_together(self, *rest):
        seen.extend(path.name for path in tmp_path.glob(f"{NAME}*/*.safetensors"))
        return score(self, *rest)

    monkeypatch.setattr(TrialKL, "score_together", score_together)
    merged(windows, 2, folder=tmp_path, store=store)
    assert "0-1-0.safetensors" in seen
    assert not list(tmp_path.glob(f"{NAME}*"))


def test_a_trial_of_a_whole_shape_takes_sums(windows):
    schedule = method(5).schedule
    assert schedule.surrogate.candidate_sets == 1
    assert schedule.candidate_sets == 5
