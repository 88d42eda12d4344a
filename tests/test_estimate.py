"""Estimates of time and memory, and --dry-run."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import MistralConfig

from come.job.budget import SHARE, memory_needs, memory_shortage, placed, sampling_cost
from come.job.estimate import Cost, Speed, compression_cost
from come.job.job import merge_cost
from come.merge.work import SpanSize, Work
from come.models.loading import inspect_model
from come.report.numbers import duration
from tests.conftest import pico
from tests.jobs import job_settings
from tests.methods import recipe
from tests.test_methods import RECIPES

SPEED = Speed(single=1e9, double=5e8)


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
        "time: about 2 min 00 s",
        "memory: weights 538 MB, 2,000 MB for a merge, hidden states 585 MB",
    ]
    on_gpu = Cost(8192, work, [], 538_000_000, 585_000_000, "memory", "cuda", ["merge.x=y"])
    assert on_gpu.lines(SPEED) == [
        "cost: 8192 calibration tokens",
        "time: about 2 min 00 s, and more for merge.x=y",
        "memory: weights 538 MB, 2,000 MB for a merge on the GPU; hidden states 585 MB in "
        "main memory",
    ]
    on_disk = Cost(8192, work, [], 538_000_000, 585_000_000, "disk", judged_bytes=70_000_000)
    assert on_disk.lines(SPEED)[2] == (
        "memory: weights 538 MB, 2,000 MB for a merge, hidden states 70 MB, and 585 MB in "
        "memory-mapped files"
    )
    assert found.memory_bytes - on_disk.memory_bytes == 585_000_000 - 70_000_000
    assert duration(125.0) == "2 min 05 s"


def test_work_addition():
    first, second = Work(1.0, 2.0, 3.0), Work(10.0, 20.0, 2.0)
    assert first + second == Work(11.0, 22.0, 3.0)  # memory is freed in between
    assert first * 3 == Work(3.0, 6.0, 3.0)
    assert Speed(2.0, 4.0).seconds(Work(10.0, 8.0)) == 7.0


def test_operation_counts():
    """The Gram matrix, its factor and its inverse, against textbook counts."""
    size = SpanSize(2, tokens=100, hidden=8, heads=8, channels=16, parameters=700)
    assert size.width == 32
    assert size.passes.single == 2 * 100 * 700
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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_an_estimate(name, shape):
    found = cost(shape, method=recipe(name))
    assert found.tokens == 256
    assert found.work.single >= 12 * 2 * 256 * shape.block_parameters["layer"]
    assert found.weight_bytes == 4 * shape.parameters


def test_cost_grows_with_tokens_depth_and_trials(shape):
    base = cost(shape).work.single
    assert cost(shape, num_samples=16).work.single > 1.5 * base
    assert cost(shape, target=6).work.single > 1.1 * base
    tried = recipe("come_plus", shortlist=2)
    assert len(cost(shape, method=tried).trials) < len(cost(shape).trials)
    assert cost(shape, method=tried).work.single < base
    assert cost(shape, method=recipe("come_plus", m=2)).work.bytes < cost(shape).work.bytes


def test_small_penalty_needs_float64(shape):
    small = cost(shape, method=recipe("come_plus", refit_lambda=1e-6)).work
    assert small.double > cost(shape).work.double
    assert small.single < cost(shape).work.single


def test_local_retention_measures_fewer_layers(shape):
    method = recipe("come_plus", shortlist=1)
    ahead = cost(shape, method=method, target=6).work.single
    method.retention.local = False
    assert cost(shape, method=method, target=6).work.single > ahead


def test_retention_tokens_lower_the_cost(shape):
    method = recipe("come_plus")
    method.retention.tokens = 64
    assert cost(shape, method=method).work.single < cost(shape).work.single


def test_one_shot_schedule_measures_layers_once(shape):
    passes = cost(shape, method=recipe("shortgpt")).work.single
    assert passes == 12 * 2 * 256 * shape.block_parameters["layer"]
    assert cost(shape, method=recipe("come")).work.single > passes


def test_uncounted_passes_are_listed(shape):
    assert cost(shape).extra == []
    assert cost(shape, method=recipe("sleb")).extra == ["merge.selection=skip_loss"]
    assert (
        "merge.sensitivity=taylor" in cost(shape, method=recipe("come", sensitivity="taylor")).extra
    )


@pytest.mark.speed
def test_speed_is_measured():
    found = Speed.measured(torch.device("cpu"), torch.float32)
    assert 1e8 < found.double < 1e14
    assert 1e8 < found.single < 1e15


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
        "evaluate: perplexity, speed, continuations",
        "disk: ",
        f"writes to {folder}",
    ):
        assert line in output
    assert not folder.parent.exists()
    assert "COME_DRY_RUN" not in os.environ


def test_dry_run_reports_errors(command_line):
    code, output = command_line("--dry-run", "merge.target_layers=44")
    assert (code, output.count("\n")) == (1, 2)
    assert "error: merge.target_layers=44: the model has 24 layers" in output


def test_dry_run_of_a_sweep(command_line, tmp_path):
    code, output = command_line("--dry-run", "-m", "merge.target_layers=20,21", "eval=perplexity")
    assert code == 0, output
    assert "to 20 layers" in output
    assert "to 21 layers" in output
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


@pytest.fixture
def large(shape):
    """A model with the shape of Mistral 7B."""
    config = MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    sizes = {"layer": 218_112_000, "attention": 41_947_136, "ffn": 176_164_864}
    return replace(
        shape, config=config, parameters=7_241_732_096, block_parameters=sizes,
        dtype=torch.bfloat16, heads=4096, channels=14336,
    )  # fmt: skip


SAVINGS = [
    "model.weights=disk", "calibration.store=disk", "calibration.batch_size=1",
    "merge.retention.tokens=4096",
]  # fmt: skip


def set_free_memory(monkeypatch, free):
    """Pretends that a merge may use `free` bytes."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(free / SHARE))


@pytest.mark.parametrize(("method", "count"), [("come_plus", 4), ("flattengpt", 3), ("come", 3)])
def test_suggested_settings_fit_into_memory(method, count, large, pico_folder, monkeypatch):
    """Suggestions are added one by one until the job fits; useless ones are left out."""
    words = [f"merge={method}", "merge.target_layers=20", "model.weights=memory"]
    words += ["calibration.num_samples=128", "calibration.seq_len=256", "calibration.store=memory"]
    job = job_settings(pico_folder, *words)

    def needed(*more):
        return merge_cost(job_settings(pico_folder, *words, *more), large, 28).memory_bytes

    for number in range(1, count + 1):
        fits = int(needed(*SAVINGS[:number])) + 1
        assert fits < needed(*SAVINGS[: number - 1])
        set_free_memory(monkeypatch, fits)
        found = memory_shortage(job, large, 28)
        assert found.endswith(f"it would fit with {' '.join(SAVINGS[:number])}")
    set_free_memory(monkeypatch, 10**12)
    assert memory_shortage(job, large, 28) is None


@pytest.mark.parametrize(
    ("words", "placements"),
    [
        ([], [("memory", "memory"), ("memory", "disk"), ("disk", "memory"), ("disk", "disk")]),
        (["model.weights=disk"], [("disk", "memory"), ("disk", "disk")]),
        (["calibration.store=memory"], [("memory", "memory"), ("disk", "memory")]),
    ],
)
def test_auto_placement_moves_to_disk_what_does_not_fit(
    words, placements, large, pico_folder, monkeypatch
):
    """Placements are tried in order until one fits; explicit settings are kept."""
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.num_samples=64", *words]
    job = job_settings(pico_folder, *words, "calibration.seq_len=256")

    def at(weights, store):
        here = replace(job, model=replace(job.model, weights=weights))
        return replace(here, calibration=replace(here.calibration, store=store, batch_size=1))

    for placement in placements:
        enough = merge_cost(at(*placement), large, 28).memory_bytes
        set_free_memory(monkeypatch, enough + 1)
        monkeypatch.setattr("come.job.budget.choose_weights", lambda *given: "memory")
        found = placed(job, large, 28)
        assert (found.model.weights, found.calibration.store) == placement
    set_free_memory(monkeypatch, 1)
    found = placed(job, large, 28)
    assert (found.model.weights, found.calibration.store) == placements[-1]
    assert memory_shortage(found, large, 28) is not None


@pytest.mark.parametrize(("words", "sizes"), [
    ([], [4, 2, 1, 4]), (["calibration.batch_size=3"], [3]), (["merge.refit=adam"], [4]),
])  # fmt: skip
def test_auto_batch_size_shrinks_until_it_fits(words, sizes, large, pico_folder, monkeypatch):
    """Batches shrink before anything moves to disk; explicit and batch-dependent sizes stay."""
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.seq_len=256", *words]
    job = job_settings(pico_folder, *words)
    monkeypatch.setattr("come.job.budget.choose_weights", lambda *given: "memory")
    placements = []
    for number, size in enumerate(sizes):
        there = replace(job.calibration, batch_size=size, store="memory")
        if number == 3:
            there = replace(there, store="disk")
        here = replace(job, model=replace(job.model, weights="memory"), calibration=there)
        set_free_memory(monkeypatch, merge_cost(here, large, 28).memory_bytes + 1)
        found = placed(job, large, 28)
        placements.append(
            (found.model.weights, found.calibration.store, found.calibration.batch_size)
        )
    stores = ["memory"] * min(3, len(sizes)) + ["disk"] * (len(sizes) - 3)
    assert placements == [
        ("memory", store, size) for store, size in zip(stores, sizes, strict=True)
    ]


def test_weights_above_two_thirds_of_memory_stay_on_disk(large, pico_folder, monkeypatch):
    """The later stages need room, even if the merge itself would fit."""
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.seq_len=256"]
    job = job_settings(pico_folder, *words)
    weights = large.weight_bytes
    for free, placement in ((1.45 * weights, "disk"), (2 * weights, "memory")):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: Memory(free))
        assert merge_cost(job, large, 28).memory_bytes < SHARE * 2 * weights
        assert placed(job, large, 28).model.weights == placement


def test_budget_is_the_minimum_of_setting_and_free_memory(large, pico_folder, monkeypatch):
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.seq_len=256"]
    job = job_settings(pico_folder, *words, "calibration.memory=6GB")
    cost = merge_cost(job, large, 28)
    for free, budget in ((1e12, 6e9), (3e9, 3e9)):
        set_free_memory(monkeypatch, free)
        (need,) = memory_needs(job, cost)
        assert need.budget == pytest.approx(budget)
        assert need.needed == cost.memory_bytes
    monkeypatch.setenv("WORLD_SIZE", "2")  # hidden states are shared in files
    both = placed(job, large, 28)
    assert both.calibration.store == "disk"
    cost = merge_cost(both, large, 28)
    (need,) = memory_needs(both, cost)
    assert need.needed == 2 * (cost.weight_bytes + cost.step_bytes + cost.judged_bytes)
    least = replace(job, calibration=replace(job.calibration, memory="1MB"))
    least = placed(least, large, 28)
    set_free_memory(monkeypatch, 1e12)
    message = memory_shortage(least, large, 28)
    assert "raise calibration.memory=1MB, start fewer processes" in message
    set_free_memory(monkeypatch, 1e3)
    assert "take a machine with more, start fewer" in memory_shortage(least, large, 28)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("much", "must be a size such as 6GB"),
        ("infGB", "must be a size such as 6GB"),
        ("0GB", "must be above 0"),
    ],
)
def test_invalid_memory_budget(word, message, pico_folder):
    with pytest.raises(ValueError, match=message):
        job_settings(pico_folder, f"calibration.memory={word}")


@pytest.mark.parametrize(
    ("word", "size"), [("6GB", 6e9), ("6gb", 6e9), ("1.5MB", 1.5e6), ("2GiB", 2 * 2**30)]
)
def test_memory_budget_units(word, size, pico_folder):
    assert job_settings(pico_folder, f"calibration.memory={word}").calibration.memory_bytes == size


def test_validation_windows_of_trials_count_as_memory(shape):
    """Their hidden states at all boundaries are in memory, even with store=disk."""
    method = recipe("come_plus")
    found = cost(shape, method=method, store="disk")
    _, validation_tokens = method.selection.trial_tokens(8, 32)
    assert found.judged_bytes == validation_tokens * 13 * shape.config.hidden_size * 4 > 0
    assert found.memory_bytes == found.weight_bytes + found.step_bytes + found.judged_bytes
    assert cost(shape, method=recipe("come")).judged_bytes == 0


def test_batch_memory(shape):
    one, four = (cost(shape, batch_size=size) for size in (1, 4))
    assert four.batch_bytes == 4 * one.batch_bytes > 0
    assert four.memory_bytes - one.memory_bytes == 3 * one.batch_bytes


@pytest.mark.parametrize(("free", "main", "named"), [(1, 10**12, "device"), (10**12, 1, "main")])
def test_device_and_main_memory_are_checked_separately(
    free, main, named, large, pico_folder, monkeypatch
):
    """Weights and least squares are on the device, hidden states in main memory."""
    job = job_settings(pico_folder, "merge=come_plus", "merge.target_layers=20")
    cuda = torch.device("cuda")
    for module in ("budget", "job"):
        monkeypatch.setattr(f"come.job.{module}.choose_device", lambda name: cuda)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(main))
    found = memory_shortage(job, large, 28)
    assert f"of {named} memory, and may use 0.0 MB" in found


@dataclass
class Memory:
    """A stub of psutil.virtual_memory()."""

    available: int


def test_mistral_7b_from_disk_needs_less_than_11_gb(large, pico_folder):
    """The default method at the default calibration."""
    words = ["merge=come_plus", "merge.target_layers=20", "model.weights=disk"]
    sizes = ["calibration.num_samples=32", "calibration.seq_len=256"]
    job = job_settings(pico_folder, *words, *sizes)
    assert merge_cost(job, large, 26).memory_bytes < 10.5e9


def test_sampling_from_disk_reports_the_bytes_read(large, pico_folder):
    """64 windows in two batches; every token after the first two reads all 32 layers."""
    words = ["merge.target_layers=20", "calibration=self_generated"]
    words += ["calibration.num_samples=64", "calibration.seq_len=102"]
    disk = job_settings(pico_folder, *words, "model.weights=disk")
    found = sampling_cost(disk, large)
    megabytes = round(200 * 32 * 218_112_000 * 2 / 1e6)
    assert f"reads all layers 200 times, {megabytes:,} MB in all" in found
    assert sampling_cost(job_settings(pico_folder, *words, "model.weights=memory"), large) is None
    given = job_settings(pico_folder, "merge.target_layers=20", "model.weights=disk")
    assert sampling_cost(given, large) is None
