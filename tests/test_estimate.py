"""Estimates of time and memory, and --dry-run."""

import os
import re
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch

from come.job import estimate
from come.job.dry_run import dry_run
from come.job.estimate import Cost, Speed, _merged_spans, compression_cost
from come.merge.joint_selection import joint_work
from come.merge.refit.gauss_newton import GaussNewton
from come.merge.refit.ridge import Ridge
from come.merge.retention.leverage import Leverage
from come.merge.work import SpanSize, Work
from come.models.loading import inspect_model
from come.report.numbers import duration
from tests.conftest import pico
from tests.jobs import job_settings
from tests.methods import recipe
from tests.test_methods import RECIPES

SPEED = Speed(forward=4e9, single=1e9, double=5e8)


@pytest.fixture
def shape(tmp_path):
    pico("llama_gqa", num_hidden_layers=12).save_pretrained(tmp_path)
    return inspect_model(tmp_path, dtype="float32")


def cost(shape, **changes):
    given = {"num_samples": 8, "seq_len": 32, "target": 9, "method": recipe("come_plus")}
    return compression_cost(shape, **given | {"store": "memory"} | changes)


def test_cost_lines():
    work = Work(single=1e11, double=1e10, bytes=2e9)
    found = Cost(8192, work, [2, 2, 3], 538_000_000, 585_000_000, "memory")
    assert found.lines(SPEED) == [
        "cost: 8192 calibration tokens, 3 trial merges",
        "time: about 2 min 00 s for the merge",
        "memory: weights 538 MB, 2,000 MB for a merge, hidden states 585 MB",
    ]
    on_gpu = Cost(8192, work, [], 538_000_000, 585_000_000, "memory", "cuda", ["merge.x=y"])
    assert on_gpu.lines(SPEED) == [
        "cost: 8192 calibration tokens",
        "time: about 2 min 00 s for the merge, and more for merge.x=y",
        "memory: weights 538 MB, 2,000 MB for a merge on the GPU; hidden states 585 MB in "
        "main memory",
    ]
    on_disk = Cost(8192, work, [], 538_000_000, 585_000_000, "disk", validation_bytes=70_000_000)
    assert on_disk.lines(SPEED)[2] == (
        "memory: weights 538 MB, 2,000 MB for a merge, hidden states 70 MB, and 585 MB in "
        "memory-mapped files"
    )
    assert found.memory_bytes - on_disk.memory_bytes == 585_000_000 - 70_000_000
    assert duration(125.0) == "2 min 05 s"


def test_work_addition():
    first, second = Work(5.0, 1.0, 2.0, 3.0), Work(7.0, 10.0, 20.0, 2.0)
    assert first + second == Work(12.0, 11.0, 22.0, 3.0)  # memory is freed in between
    assert first * 3 == Work(15.0, 3.0, 6.0, 3.0)
    assert Speed(8.0, 2.0, 4.0).seconds(Work(24.0, 10.0, 8.0)) == 10.0


def test_operation_counts():
    """The Gram matrix, its factor and its inverse, against textbook counts."""
    size = SpanSize(2, tokens=100, hidden=8, heads=8, channels=16, parameters=700)
    assert size.width == 32
    assert size.passes.forward == 2 * 100 * 700
    assert size.sums(32, 8).single == 100 * 32 * 32 + 2 * 100 * 32 * 8
    assert size.sums(32, 8).bytes == 8 * 32 * (32 + 8)
    assert size.solve(32, 8).double == 32**3 / 3 + 2 * 32 * 32 * 8
    assert size.inverse(32).double == 32**3
    # the inverse, and 2 n^2 for each removed column
    removal = sum(2 * n * n + 2 * 32 * 8 for n in range(17, 33))
    assert size.eliminated(32, 16).double == 0
    precise = replace(size, ratio=1e-4)  # chosen in float64
    assert precise.eliminated(32, 16).double == size.eliminated(32, 16).single
    assert precise.eliminated(32, 16).bytes == 2 * size.eliminated(32, 16).bytes
    assert size.eliminated(32, 16).single - 32**3 == pytest.approx(removal, rel=0.05)


def test_dual_form_cost_grows_with_tokens():
    few = SpanSize(4, tokens=64, hidden=32, heads=32, channels=128, parameters=9000)
    many = SpanSize(4, tokens=512, hidden=32, heads=32, channels=128, parameters=9000)
    assert (few.dual(512, 4), many.dual(512, 4)) == (True, False)
    assert (few.dual(512), many.dual(512), many.dual(511)) == (True, True, False)
    assert few.sums(512, 32, 4).bytes < many.sums(512, 32, 4).bytes / 5
    assert few.eliminated(512, 128).single < many.eliminated(512, 128).single / 5
    assert few.solve(512, 32).double == 64**3 / 3 + 2 * 64 * 64 * 32
    assert astuple(few.inverse(512)) == pytest.approx((0, 2_097_152, 64**3 / 3, 65_536))
    found = astuple(few.eliminated(512, 128))
    assert found == pytest.approx((0, 34_078_720, 64**3 / 3 + 262_144, 294_912))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_an_estimate(name, shape):
    found = cost(shape, method=recipe(name))
    assert found.tokens == 256
    assert found.work.forward >= 12 * 2 * 256 * shape.block_parameters["layer"]
    assert found.weight_bytes == 4 * shape.parameters


def test_cost_grows_with_tokens_depth_and_trials(shape):
    base = cost(shape).work.single
    assert cost(shape, num_samples=16).work.single > 1.5 * base
    assert cost(shape, target=6).work.single > 1.1 * base
    tried = recipe("come_plus", shortlist=2)
    assert len(cost(shape, method=tried).trials) < len(cost(shape).trials)
    assert cost(shape, method=tried).work.single < base
    assert cost(shape, method=recipe("come_plus", m=2)).work.bytes < cost(shape).work.bytes


def test_compared_sets_cost_passes_and_disk(shape):
    method, found = recipe("come_plus"), cost(shape, target=6)
    method.schedule.candidate_sets = 1
    plain = cost(shape, method=method, target=6)
    assert plain.trial_bytes == 0
    assert found.trial_bytes == len(plain.trials) * 4 * shape.block_parameters["layer"]
    assert found.work.forward > plain.work.forward
    assert found.work.single == plain.work.single


def test_small_penalty_needs_float64(shape):
    small = cost(shape, method=recipe("come_plus", refit__lambda=1e-6)).work
    assert small.double > cost(shape).work.double
    assert small.single < cost(shape).work.single


def test_local_retention_measures_fewer_layers(shape):
    method = recipe("come_plus", shortlist=1)
    ahead = cost(shape, method=method, target=6).work.forward
    method.retention.local = False
    assert cost(shape, method=method, target=6).work.forward > ahead


def test_retention_tokens_lower_the_cost(shape):
    method = recipe("come_plus")
    method.retention.tokens = 64
    assert cost(shape, method=method).work.single < cost(shape).work.single


def test_one_shot_schedule_measures_layers_once(shape):
    passes = cost(shape, method=recipe("shortgpt")).work.forward
    assert passes == 12 * 2 * 256 * shape.block_parameters["layer"]
    assert cost(shape, method=recipe("come")).work.forward > passes


def test_uncounted_passes_are_listed(shape):
    assert cost(shape).extra == cost(shape, method=recipe("come")).extra == []
    assert cost(shape, method=recipe("sleb")).extra == ["merge.selection=skip_loss"]
    assert (
        "merge.sensitivity=taylor" in cost(shape, method=recipe("come", sensitivity="taylor")).extra
    )


@pytest.mark.speed
def test_speed_is_measured():
    found = Speed.measured(torch.device("cpu"), torch.float32)
    assert 1e8 < found.double < 1e14
    assert 1e8 < found.single < 1e15
    assert found.forward == found.single  # one measurement for float32
    half = Speed.measured(torch.device("cpu"), torch.bfloat16)
    assert half.forward != half.single


@pytest.mark.speed
def test_speed_is_the_best_of_half_a_second(monkeypatch):
    """Also of a machine that is busy for the first four products."""
    clock, taken = [0.0], iter([0.06] * 4 + [0.03] * 20)

    def product(*factors):
        clock[0] += next(taken)
        return torch.ones(1, 1)

    def now():
        clock[0] += 1e-5
        return clock[0]

    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    found = estimate._products(torch.device("cpu"), torch.float32)
    assert found == pytest.approx(2 * 768**3 / 0.03, rel=1e-3)
    assert 0.5 <= clock[0] < 0.54


def test_dry_run(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr("come.job.job.load_weights", None)
    folder = tmp_path / "runs" / "new"
    code, output = command_line(
        "--dry-run", "merge.target_layers=20", "distill=come_sp", "distill.tokens=2560",
        "distill.seq_len=32", f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert code == 0, output
    for line in (
        "24 layers",
        "merge: come, to 20 layers, calibrated on pydocs",
        "cost: 256 calibration tokens",
        "time: about",
        "memory: weights",
        "budget: needs ",
        "distill: come_sp, 10 steps of 8 windows of 32 tokens",
        "memory of the training: at most ",
        "evaluate: perplexity, speed, continuations",
        "disk: ",
        f"writes to {folder}",
    ):
        assert line in output
    assert not folder.parent.exists()
    assert "COME_DRY_RUN" not in os.environ


def test_folder_of_a_job(command_line):
    code, output = command_line("--dry-run")
    assert code == 0, output
    (name,) = re.findall(r"job (\w{12}):", output)
    assert f"runs/{name}\n" in output


def test_dry_run_reports_errors(command_line):
    code, output = command_line("--dry-run", "merge.target_layers=44")
    assert (code, output.count("\n")) == (1, 2)
    assert "error: merge.target_layers=44: the model has 24 layers" in output
    code, output = command_line("--dry-run", "merge=none", "distill=come_sp")
    assert code == 1
    assert "error: distill=come_sp trains merged layers, and merge=none makes none" in output


def test_dry_run_checks_the_settings(pico_folder, tmp_path):
    settings = job_settings(pico_folder, "distill=come_sp")
    settings = replace(settings, model=replace(settings.model, weights="disk"))
    with pytest.raises(ValueError, match="model.weights=disk: distill=come_sp trains a model in"):
        dry_run(settings, tmp_path / "out")


def test_dry_run_of_a_sweep(command_line, tmp_path):
    code, output = command_line("--dry-run", "-m", "merge.target_layers=20,21", "eval=perplexity")
    assert code == 0, output
    assert "to 20 layers" in output
    assert "to 21 layers" in output
    hashes = re.findall(r"job (\w{12}):", output)
    assert len(set(hashes)) == 2
    for name in hashes:  # the default folder of a job
        assert f"runs/{name}\n" in output
    assert not list(tmp_path.glob("runs*"))


def test_insufficient_memory(command_line, monkeypatch):
    monkeypatch.setattr("come.job.estimate.Cost.step_bytes", 1e15)
    code, output = command_line("--dry-run")
    assert code == 0, output
    assert "a run would be refused: the merge needs 1,000,000,000 MB of memory, and may" in output
    assert "take a machine with more, or take fewer calibration.num_samples" in output
    code, output = command_line()
    assert code == 1
    assert "error: the merge needs 1,000,000,000 MB of memory" in output


def test_validation_windows_of_trials_count_as_memory(shape):
    """Their hidden states at all boundaries are in memory, even with store=disk."""
    method = recipe("come_plus")
    found = cost(shape, method=method, store="disk")
    _, validation_tokens = method.selection.trial_tokens(8, 32)
    assert found.validation_bytes == validation_tokens * 13 * shape.config.hidden_size * 4 > 0
    assert found.memory_bytes == found.weight_bytes + found.step_bytes + found.validation_bytes
    assert cost(shape, method=recipe("come")).validation_bytes == 0


def test_batch_memory(shape):
    one, four = (cost(shape, batch_size=size) for size in (1, 4))
    assert four.batch_bytes == 4 * one.batch_bytes > 0
    assert four.memory_bytes - one.memory_bytes == 3 * one.batch_bytes


SMALL = SpanSize(2, tokens=100, hidden=8, heads=8, channels=16, parameters=700)


def test_work_of_the_parts():
    for found, expected in (
        (SMALL.aligned(), (2 * 140_000, 64_000, 2 * (512 / 3 + 2048), 3072)),
        (SMALL.folded(), (0, 11_200, 0, 5600)),
        (joint_work(SMALL), (4 * 140_000, 204_800, 4096, 15_072)),
        (Leverage().work(SMALL), (4 * 140_000, 204_800 + 32**3, 4096, 15_072)),
        (Ridge().work(SMALL), (490_000, 70_400, 6656, 9696)),
        (Ridge(align=0.1).work(SMALL), (770_000, 145_600, 6656 + 2 * (512 / 3 + 2048), 9696)),
        (GaussNewton(align=None).work(SMALL), (490_000, 70_400 + 52 * 25_600, 6656, 18_784)),
    ):
        assert astuple(found) == pytest.approx(expected)


def test_trials_do_not_solve_twice(shape):
    assert astuple(Ridge().trial_work(SMALL, True)) == (0, 0, 0, 5600)
    assert Ridge().trial_work(SMALL, False) == Ridge().work(SMALL)
    auto = Ridge(lambda_="auto")
    assert auto.trial_work(SMALL, True) == auto.work(SMALL)
    method = recipe("come_plus")
    method.retention.solves = False
    assert cost(shape, method=method).work.single > cost(shape).work.single


@pytest.mark.parametrize(("name", "changes", "slots"), [
    ("come", {}, 13), ("come", {"sublayers": ("ffn",)}, 25),
    ("come", {"sensitivity": "path_attribution"}, 26), ("come_plus", {}, 13 + 6),
])  # fmt: skip
def test_bytes_of_states_and_layers(name, changes, slots, shape):
    found = cost(shape, method=recipe(name, **changes), weights="disk")
    assert found.boundary_bytes == 256 * 32 * 4 * slots
    assert found.batch_bytes == 4 * 32 * (3 * 24 + 6 * 32) * 4
    assert found.layer_bytes == 2 * 4 * shape.block_parameters["layer"]


def test_spans_and_passes(shape):
    assert _merged_spans(recipe("come_plus"), 12, 6) == [4, 4]
    assert cost(shape, target=6).trials == [2] * 11 + [3, 4] * 3
    layer = 2 * shape.block_parameters["layer"]  # operations of a token
    plain = 256 * layer * (12 + 3 * 6)  # once, and half of the layers after each of three merges
    assert cost(shape, method=recipe("come")).work.forward == plain
    tried = cost(shape, method=recipe("come", selection="trial_kl"))
    assert tried.trials == [2] * 36
    assert tried.work.forward == plain + 36 * 64 * (layer * 6 + 2 * 300 * 32)
