"""Wiring that the outputs of a complete job do not show: which value reaches which function."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from come.data.sampling import cached
from come.data.sources.text_file import TextFile
from come.data.windows import TokenWindows, calibration_windows
from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL
from come.distill.trainer import train
from come.evaluate.paired import mean_difference
from come.evaluate.speed import ModelSpeed, Timing, compare_speed
from come.job.identity import _training_identity
from come.linalg.gram import Gram
from come.merge.joint_selection import joint_lambda
from come.merge.plan import Plan
from come.merge.refit import ridge
from come.merge.saving import plan_path
from come.models.adapter import ModelAdapter
from come.models.companions import companion_files
from come.models.loading import load_tokenizer
from come.stream.stream import LayerStream
from tests.bases import edit_json
from tests.conftest import LAYERS, pico
from tests.jobs import QUICK, prepare_job, run_job, settings
from tests.test_distill import pair

HEAL = ("distill=come_sp", "distill.tokens=256", "distill.seq_len=16", "distill.batch_size=4")
RUN = importlib.import_module("come.job.run")


pytestmark = pytest.mark.usefixtures("private_caches")


@pytest.fixture
def numbered(tmp_path):
    """A text of 3000 lines, each with its number."""
    path = tmp_path / "numbered.txt"
    path.write_text("".join(f"This is line {i} of the text.\n" for i in range(3000)))
    return path


def numbers(tokenizer, windows):
    """Complete line numbers of four digits in the windows."""
    words = " ".join(tokenizer.decode(row[1:-1]) for row in windows).split()
    return {int(word) for word in words if len(word) == 4 and word.isdigit()}


# Texts


def test_training_text_is_disjoint_from_held_out_text(base, numbered, tmp_path):
    overrides = (
        *HEAL,
        f"distill.path={numbered}",
        f"eval.perplexity.path={numbered}",
        "distill.tokens=8192",
    )
    job = prepare_job(base, tmp_path / "out", *overrides)
    tokenizer = load_tokenizer(base)
    assert max(numbers(tokenizer, job.training.windows)) < 0.61 * 3000
    assert min(numbers(tokenizer, job.evaluations["perplexity"][1][""].windows)) > 0.79 * 3000


def test_held_out_text_is_disjoint_from_calibration_of_a_plan(base, numbered, tmp_path):
    texts = (f"calibration.path={numbered}", f"eval.perplexity.path={numbered}")
    run_job(base, tmp_path / "out", *texts, *QUICK)
    plan = ("merge=from_plan", f"merge.plan={tmp_path / 'out' / 'plan.json'}")
    job = prepare_job(base, tmp_path / "again", *plan, "merge.target_layers=null", *texts)
    assert (
        min(numbers(load_tokenizer(base), job.evaluations["perplexity"][1][""].windows))
        > 0.79 * 3000
    )


def test_calibration_is_disjoint_from_every_held_out_text(base, numbered, text_file):
    tokenizer = load_tokenizer(base)
    held_out = [TextFile(str(text_file)), TextFile(str(numbered))]
    drawn = calibration_windows(
        tokenizer, TextFile(str(numbered)), num_samples=300, seq_len=64, held_out=held_out
    )
    assert max(numbers(tokenizer, drawn.windows)) < 0.61 * 3000


def test_first_training_windows_are_for_validation(base, numbered, tmp_path, monkeypatch):
    """Calibration with the same seed draws the last ones first."""
    overrides = (*HEAL, f"distill.path={numbered}", "distill.validation_samples=3")
    text = prepare_job(base, tmp_path / "out", *overrides).training.windows
    module = importlib.import_module("come.job.stages.distill")
    whole, seen = module.train, {}

    def recorded(objective, windows, count, held_out, held_out_count, *args, **kwargs):
        seen["training"] = windows(torch.arange(count))[0]
        seen["validation"] = held_out(torch.arange(held_out_count))[0]
        return whole(objective, windows, count, held_out, held_out_count, *args, **kwargs)

    monkeypatch.setattr(module, "train", recorded)
    run_job(base, tmp_path / "out", *overrides, *QUICK)
    assert torch.equal(seen["validation"], text[:3])
    assert torch.equal(seen["training"], text[3:])


def test_cached_windows_round_trip():
    windows = TokenWindows(torch.arange(12).view(3, 4), 99, "somewhere", 7, {"a": 0.6})
    assert cached(["key"], lambda: windows) is windows
    again = cached(["key"], lambda: pytest.fail("not read from the cache"))
    assert torch.equal(again.windows, windows.windows)
    assert replace(again, windows=windows.windows) == windows


def test_training_identity_depends_on_the_training_text(numbered, text_file):
    found = [
        _training_identity(settings("distill=come_sp", *words))
        for words in (
            [f"calibration.path={numbered}"],
            [f"calibration.path={text_file}"],
            [f"calibration.path={text_file}", f"distill.path={numbered}"],
            ["calibration.temperature=0.5"],
            ["calibration.keep_likeliest=0.5"],
            [],
        )
    ]
    assert found[0] == found[2]
    assert len({json.dumps(identity) for identity in found}) == 5


def test_custom_tokenizer_code_is_copied(base):
    edit_json(
        base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}
    )
    (base / "tokenization_x.py").write_text("")
    assert "tokenization_x.py" in {path.name for path in companion_files(base)}


# Settings


def test_save_at_reaches_compress(base, tmp_path, monkeypatch):
    module = importlib.import_module("come.job.stages.merge")
    whole, seen = module.compress, []

    def recorded(*args, **kwargs):
        seen.append(kwargs["stops"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "compress", recorded)
    run_job(base, tmp_path / "out", "merge.target_layers=4", "merge.save_at=[5]", *QUICK)
    assert seen == [[5]]
    texts = {}
    for name in ("model", "model-5"):
        folder = tmp_path / "out" / name
        texts[name] = (folder / "README.md").read_text()
        plan = Plan.load(plan_path(folder))
        assert f"Plan `{plan.hash}`" in texts[name]  # every card shows the plan of its model
        assert f"`{plan.history}`" in texts[name]
    assert texts["model"] != texts["model-5"]


# Training


def test_micro_batch_size_does_not_change_a_step(windows, tmp_path):
    found = []
    for micro in (3, 2, 1):
        given = pair()
        objective = DISTILL.create_from("come_sp").objective(given)
        progress = training(objective, windows, tmp_path / str(micro), micro_batch=micro)
        found.append((progress, [p.detach().clone() for p in objective.trained.values()]))
    for progress, weights in found[1:]:
        for mine, other in zip(weights, found[0][1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
        losses = [[row["loss"] for row in p.curve] for p in (progress, found[0][0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def training(objective, windows, folder, log=lambda losses: None, **train_config):
    settings = {"steps": 2, "batch_size": 3, "micro_batch": 3, "learning_rate": 1e-3} | train_config
    return train(
        objective,
        lambda rows: (windows[:4][rows],),
        4,
        lambda rows: (windows[4:][rows],),
        1,
        TrainConfig(**settings),
        accelerator=Accelerator(cpu=True),
        folder=folder,
        job="job",
        log=log,
        progress_bar=False,
    )


def test_step_uses_its_learning_rate(windows, tmp_path):
    """AdamW's first step changes a weight by the learning rate for any gradient."""
    objective = DISTILL.create_from("come_sp").objective(pair())
    before = [p.detach().clone() for p in objective.trained.values()]
    moved = []

    def log(losses):
        if losses.get("learning_rate"):
            now = zip(objective.trained.values(), before, strict=True)
            moved.append((max(float((p - b).abs().max()) for p, b in now), dict(losses)))

    training(objective, windows, tmp_path, log, steps=8, warmup=0.5, learning_rate=1e-3)
    first, losses = moved[0]
    assert losses["learning_rate"] == pytest.approx(1e-3 / 4)
    assert first == pytest.approx(1e-3 / 4, rel=0.02)


def test_gradients_are_clipped(windows, tmp_path):
    """The gradient norm at every optimizer step is the clipping threshold."""
    objective = DISTILL.create_from("come_sp").objective(pair())
    norms = []
    training(objective, windows, tmp_path, lambda row: norms.append(row.get("gradient_norm")))
    assert max(norm for norm in norms if norm) > 1e-3
    lengths = []
    whole = torch.optim.AdamW.step

    def step(self, closure=None):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        lengths.append(float(torch.cat(grads).norm()))
        return whole(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        objective = DISTILL.create_from("come_sp").objective(pair())
        training(objective, windows, tmp_path / "clipped", clip=1e-4)
    assert lengths == pytest.approx([1e-4, 1e-4], rel=1e-3)


def test_come_mp_validates_on_held_out_windows(base, tmp_path):
    """With one merged layer, CoMe-sp and CoMe-mp have the same initial loss."""
    found = []
    for number, method in enumerate(("come_sp", "come_mp")):
        overrides = (*HEAL, f"distill={method}", "distill.validation_samples=3")
        result = run_job(base, tmp_path / str(number), *overrides, *QUICK)
        found.append(result["distillation"]["validation"][0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# Numbers


def test_realised_speedup_uses_the_share_of_removed_layers(base, tmp_path, monkeypatch):
    def speeds(models, **options):
        return {
            label: ModelSpeed(Timing(10, (s,)), Timing(10, (s,)), 1, 1)
            for label, s in zip(models, (2.0, 1.0))
        }

    monkeypatch.setattr("come.evaluate.speed.compare_speed", speeds)
    result = run_job(base, tmp_path / "out", "eval=[perplexity,speed]")
    prompt = result["depths"][1]["metrics"]["speed/prompt"]
    assert prompt["relative"]["value"] == 2
    assert prompt["details"]["realised"] == pytest.approx((1 - 1 / 2) / (1 / 6))


def test_generation_counts_tokens_of_the_whole_batch():
    found = compare_speed(
        {"model": pico("llama_gqa")}, prompt_tokens=8, new_tokens=3, batch=4, repeats=1,
        progress=False,
    )["model"]  # fmt: skip
    assert (found.prompt.tokens, found.generation.tokens) == (8, 12)


def test_documents_of_a_group_are_weighted_equally():
    """With constant differences, the interval is their mean over documents."""
    small, large = ([0.5] * 2, [0.0] * 2), ([0.1] * 8, [0.0] * 8)
    low, high = mean_difference([[small, large]])
    assert low == pytest.approx(high) == pytest.approx((2 * 0.5 + 8 * 0.1) / 10)
    low, high = mean_difference([[small], [large]])
    assert low == pytest.approx(high) == pytest.approx((0.5 + 0.1) / 2)


def test_boundaries_after_a_merge_are_invalid(windows):
    adapter = ModelAdapter(pico("llama_gqa"))
    with LayerStream(adapter, windows, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        adapter.replace(2, 3, adapter.layer_state(2))
        stream.merged(2, 3)
        stream.boundary(2, slice(0, 2))
        assert stream.valid == 2
        with pytest.raises(AssertionError):
            stream.boundary(3, slice(0, 2))


def test_lambda_is_chosen_on_held_out_windows(targets, monkeypatch):
    """Four of five windows are fitted, and one is held out."""
    found, sources = targets("llama_gqa")
    whole, seen = ridge.best_lambda, []

    def recorded(fit, held_out, initial, grid):
        seen.append((trace(fit), trace(held_out)))
        return whole(fit, held_out, initial, grid)

    def trace(sums: Gram):
        return float(sums.gram.trace())

    monkeypatch.setattr(ridge, "best_lambda", recorded)
    ridge.Ridge(lambda_="auto").solve(found, sources)
    assert len(seen) == 2  # attention, then the FFN
    for fit, held_out in seen:
        assert fit > 2 * held_out > 0


def test_chosen_lambda_fits_all_windows(targets, monkeypatch):
    found, sources = targets("llama_gqa")
    monkeypatch.setattr(ridge, "best_lambda", lambda *args: 0.3)
    chosen = ridge.Ridge(lambda_="auto").solve(found, sources)
    fixed = ridge.Ridge(lambda_=0.3).solve(found, sources)
    for name, tensor in fixed.items():
        torch.testing.assert_close(chosen[name], tensor, rtol=1e-4, atol=1e-5)


def test_auto_lambda_without_held_out_windows(targets, windows):
    found, sources = targets("llama_gqa", windows[:4])
    chosen, fixed = (ridge.Ridge(lambda_=x).solve(found, sources) for x in ("auto", 0.1))
    for name, tensor in fixed.items():
        torch.testing.assert_close(chosen[name], tensor, rtol=1e-4, atol=1e-5)
    assert [joint_lambda(ridge.Ridge(lambda_=x)) for x in ("auto", 0.3)] == [0.1, 0.3]


def test_disk_space_of_a_job(base, tmp_path):
    def job(*words):
        return prepare_job(base, tmp_path / "out", "eval=none", *words)

    plain = job()
    weights = plain.shape.weight_bytes
    assert plain.disk_bytes == weights
    assert job("merge.target_layers=4", "merge.save_at=[5,4]").disk_bytes == 2 * weights
    assert job(*HEAL).disk_bytes == 4 * weights
    stored = job("calibration.store=disk")
    assert stored.disk_bytes == weights + stored.cost.boundary_bytes
    layers = job("merge.target_layers=4", "model.weights=disk")
    assert layers.disk_bytes == weights + 2 * 4 * layers.shape.block_parameters["layer"]


def test_depths_to_save_with_groups(base, tmp_path):
    words = ("merge.target_layers=null", "merge.groups=[[0,1,2],[4,5]]", "eval=none")
    assert prepare_job(base, tmp_path / "a", *words, "merge.save_at=[4]").target == 3
    with pytest.raises(ValueError, match="passes through 4, 3"):
        prepare_job(base, tmp_path / "b", *words, "merge.save_at=[5]")
