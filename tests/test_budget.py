"""The memory budget: what is in memory or on disk, batch sizes, and refusals."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import MistralConfig

from come.job.budget import SHARE, choose_placement, memory_needs, memory_shortage, sampling_cost
from come.job.job import merge_cost
from come.models.loading import inspect_model
from tests.conftest import pico
from tests.jobs import job_settings


@dataclass
class Memory:
    """A stub of psutil.virtual_memory()."""

    available: int


@pytest.fixture
def large(tmp_path):
    """A model with the shape of Mistral 7B."""
    pico("llama_gqa").save_pretrained(tmp_path)
    shape = inspect_model(tmp_path, dtype="float32")
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


@pytest.mark.parametrize(
    ("method", "target", "count"),
    [("come_plus merge.m=8", 24, 4), ("come_plus", 28, 3), ("flattengpt", 28, 3), ("come", 28, 3)],
)
def test_suggested_settings_fit_into_memory(method, target, count, large, pico_folder, monkeypatch):
    """Suggestions are added one by one until the job fits; useless ones are left out."""
    words = [*f"merge={method}".split(), "merge.target_layers=20", "model.weights=memory"]
    words += ["calibration.num_samples=128", "calibration.seq_len=256", "calibration.store=memory"]
    job = job_settings(pico_folder, *words)

    def needed(*more):
        return merge_cost(job_settings(pico_folder, *words, *more), large, target).memory_bytes

    for number in range(1, count + 1):
        fits = int(needed(*SAVINGS[:number])) + 1
        assert fits < needed(*SAVINGS[: number - 1])
        set_free_memory(monkeypatch, fits)
        found = memory_shortage(job, large, target)
        assert found.endswith(f"it would fit with {' '.join(SAVINGS[:number])}")
    set_free_memory(monkeypatch, 10**12)
    assert memory_shortage(job, large, target) is None


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
        found = choose_placement(job, large, 28)
        assert (found.model.weights, found.calibration.store) == placement
    set_free_memory(monkeypatch, 1)
    found = choose_placement(job, large, 28)
    assert (found.model.weights, found.calibration.store) == placements[-1]
    assert memory_shortage(found, large, 28) is not None


@pytest.mark.parametrize(("words", "free", "chosen"), [
    ([], ("memory", 4), ("memory", 4)),
    ([], ("memory", 2), ("memory", 2)),
    ([], ("memory", 1), ("memory", 1)),
    ([], ("disk", 4), ("disk", 4)),
    (["calibration.batch_size=3"], ("memory", 2), ("disk", 3)),
    (["merge.refit=adam"], ("memory", 2), ("disk", 4)),
])  # fmt: skip
def test_auto_batch_size_shrinks_until_it_fits(
    words, free, chosen, large, pico_folder, monkeypatch
):
    """Batches shrink before anything moves to disk; explicit and batch-dependent sizes stay.

    `free`: the store and batch size for which memory is just enough.
    """
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.seq_len=256", *words]
    job = job_settings(pico_folder, *words, "model.weights=memory")
    store, size = free
    fitting = replace(job, calibration=replace(job.calibration, store=store, batch_size=size))
    set_free_memory(monkeypatch, merge_cost(fitting, large, 28).memory_bytes + 1)
    found = choose_placement(job, large, 28).calibration
    assert (found.store, found.batch_size) == chosen


def test_weights_above_two_thirds_of_memory_stay_on_disk(large, pico_folder, monkeypatch):
    """The later stages need room, even if the merge itself would fit."""
    words = ["merge=come_plus", "merge.target_layers=20", "calibration.seq_len=256"]
    job = job_settings(pico_folder, *words)
    weights = large.weight_bytes
    for free, placement in ((1.45 * weights, "disk"), (2 * weights, "memory")):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: Memory(free))
        assert merge_cost(job, large, 28).memory_bytes < SHARE * 2 * weights
        assert choose_placement(job, large, 28).model.weights == placement


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
    both = choose_placement(job, large, 28)
    assert both.calibration.store == "disk"
    cost = merge_cost(both, large, 28)
    (need,) = memory_needs(both, cost)
    assert need.needed == 2 * (cost.weight_bytes + cost.step_bytes + cost.validation_bytes)
    least = replace(job, calibration=replace(job.calibration, memory="1MB"))
    least = choose_placement(least, large, 28)
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
