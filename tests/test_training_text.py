"""Training text that models write: blocks, continuations, streaming, and on-policy windows."""

import importlib

import pytest
import torch

from come.data.windows import shifted
from come.distill.config import TrainConfig
from come.job.job import Job
from come.job.sampled_text import sampled, student_block, text_block
from come.job.training_cost import training_estimate, training_lines
from come.models.loading import load_weights
from tests.jobs import QUICK, job_settings, prepare_job, run_job
from tests.test_stages import Interrupt

pytestmark = pytest.mark.usefixtures("private_caches")

TEXT = importlib.import_module("come.job.sampled_text")
STAGE = importlib.import_module("come.job.stages.distill")
HEAL = (
    "distill=come_sp", "distill.tokens=256", "distill.seq_len=16", "distill.batch_size=4",
    "distill.micro_batch=2", "distill.validation_samples=4", "distill.validate_every=2",
    "distill.checkpoint_every=2",
)  # fmt: skip
WRITTEN = (*HEAL, "distill.source=self_generated", "distill.block_windows=4")
STREAMED = (*WRITTEN, "distill.teacher=stored", "distill.on_policy=0.5", *QUICK)


def test_written_text_is_sampled_in_cached_blocks(base, tmp_path, monkeypatch):
    """An interrupted sampling goes on with the next block; blocks differ from each other."""
    job, model = prepare_job(base, tmp_path / "out", *WRITTEN), load_weights(base)
    seeds, whole = [], TEXT.self_generated_windows

    def stops(*args, **options):
        seeds.append(options["seed"])
        assert options["batch_size"] == TEXT.TOGETHER
        if len(seeds) == 2:
            raise Interrupt
        return whole(*args, **options)

    monkeypatch.setattr(TEXT, "self_generated_windows", stops)
    with pytest.raises(Interrupt):
        sampled(job, model, 10)
    text = sampled(job, model, 10)
    assert len(seeds) == len(set(seeds)) + 1 == 5  # three blocks, validation, and the interruption
    assert text.windows.shape == (4 + 10, 16)
    assert len(set(map(tuple, text.windows.tolist()))) == 14
    assert torch.equal(text.windows[8:12], text_block(job, model, 1, 4).windows)
    assert len(seeds) == 5


def test_shifted_windows_begin_inside_a_text():
    windows = torch.arange(5 * 7).view(5, 7)
    found = shifted(windows, 0.6, None)
    assert torch.equal(found[:2], windows[:2])
    assert found[2].tolist() == [*windows[2, 3:].tolist(), *windows[3, :3].tolist()]
    assert found[4].tolist() == [*windows[4, 3:].tolist(), *windows[2, :3].tolist()]
    assert torch.equal(shifted(windows, 0, None), windows)
    assert sorted(shifted(windows, 1, None).flatten().tolist()) == list(range(35))


def test_no_begin_token_is_in_the_middle_of_a_shifted_window():
    windows = torch.arange(5 * 7).view(5, 7)
    windows[:, 0] = 99
    found = shifted(windows, 0.6, 99)
    assert torch.equal(found[:2], windows[:2])
    assert found[2].tolist() == [*windows[2, 3:].tolist(), *windows[3, 1:4].tolist()]
    assert found[4].tolist() == [*windows[4, 3:].tolist(), *windows[2, 1:4].tolist()]
    assert torch.equal(shifted(windows, 0, 99), windows)


def test_half_of_the_written_windows_begin_inside_a_text(base, tmp_path):
    model, found = load_weights(base), {}
    for share in ("0", "0.5"):
        words = (*WRITTEN, f"distill.shifted={share}")
        job = prepare_job(base, tmp_path / share, *words)
        found[share] = sampled(job, model, 8).windows
    begin = model.config.bos_token_id
    assert (found["0"][:, 0] == begin).all()
    for part in range(3):  # validation, and two blocks of training windows
        plain, moved = (found[share][4 * part : 4 * part + 4] for share in ("0", "0.5"))
        assert torch.equal(moved, shifted(plain, 0.5, begin))
        assert (moved[:, 0] == begin).tolist() == [True, True, False, False]
        assert (moved[:, 1:] != begin).all()


def test_half_of_the_windows_of_the_student_begin_inside_a_text(base, tmp_path):
    job, model = prepare_job(base, tmp_path / "out", *STREAMED), load_weights(base)
    found = student_block(job, model, 0, 4, tmp_path / "blocks")
    begin = model.config.bos_token_id
    assert (found[:, 0] == begin).tolist() == [True, True, False, False]
    assert (found[:, 1:] != begin).all()


def test_continued_text_begins_with_the_given_one(base, tmp_path):
    words = (*HEAL, "distill.prefix_tokens=5", "distill.block_windows=4")
    job, model = prepare_job(base, tmp_path / "out", *words), load_weights(base)
    given, text = job.training.windows, sampled(job, model, 16)
    assert torch.equal(text.windows[:4, :5], given[:4, :5])  # validation
    starts = {tuple(row[:5]) for row in text.windows[4:].tolist()}
    assert starts == {tuple(row[:5]) for row in given[4:].tolist()}
    assert not torch.equal(text.windows[:4], given[:4])
    assert "continued from 5 tokens each" in text.source


def test_on_policy_windows_come_from_the_model_in_training(base, tmp_path, monkeypatch):
    """Half of every block, from the student as it is when the block is made."""
    blocks, written, whole = [], [], STAGE.stored_states

    def written_block(job, student, number, count, folder):
        sums = sum(p.double().abs().sum() for p in student.parameters())
        written.append((number, count, float(sums)))
        return torch.full((count, 16), 7 + number)

    def stored(job, after, accelerator, teacher, windows):
        blocks.append(windows)
        return whole(job, after, accelerator, teacher, windows)

    monkeypatch.setattr("come.job.training_text.student_block", written_block)
    monkeypatch.setattr(STAGE, "stored_states", stored)
    found = run_job(base, tmp_path / "out", *STREAMED)["distillation"]
    assert [row[:2] for row in written] == [(number, 2) for number in range(4)]
    assert len({row[2] for row in written}) == 4
    held_out, *training = blocks
    assert held_out.shape == (4, 16)
    for number, windows in enumerate(training):
        assert sorted((windows == 7 + number).all(dim=1).tolist()) == [False] * 2 + [True] * 2
    assert (found["steps"], found["distinct_tokens"]) == (4, 256)
    assert "50% of training written by the model in training" in found["source"]


def test_streamed_training_resumes_with_the_same_windows(base, tmp_path, monkeypatch):
    """Also with windows that the student wrote, and the teacher's states of them."""
    expected = run_job(base, tmp_path / "whole", *STREAMED)["distillation"]
    steps, whole = [], importlib.import_module("come.distill.trainer")._step

    def stops(*args):
        steps.append(args[5])
        if len(steps) == 4:
            raise Interrupt
        return whole(*args)

    monkeypatch.setattr("come.distill.trainer._step", stops)
    with pytest.raises(Interrupt):
        run_job(base, tmp_path / "cut", *STREAMED)
    assert list((tmp_path / "cut" / "distill").glob("student-*.safetensors"))
    found = run_job(base, tmp_path / "cut", *STREAMED)["distillation"]
    assert steps == [0, 1, 2, 3, 2, 3]  # from the checkpoint after two steps
    assert found["curve"] == expected["curve"]
    assert found["validation"] == expected["validation"]
    assert not (tmp_path / "cut" / "distill").exists()


def test_streamed_text_is_made_when_its_step_comes(base, tmp_path, monkeypatch):
    made, whole = [], TEXT.self_generated_windows
    monkeypatch.setattr(
        TEXT, "self_generated_windows",
        lambda *args, **options: made.append("block") or whole(*args, **options),
    )  # fmt: skip
    step = importlib.import_module("come.distill.trainer")._step
    monkeypatch.setattr(
        "come.distill.trainer._step", lambda *args: made.append("step") or step(*args)
    )
    run_job(base, tmp_path / "out", *WRITTEN, "distill.stream=true", *QUICK)
    assert made == ["block", *["block", "step"] * 4]  # first the validation windows


@pytest.mark.parametrize(
    ("words", "blocks"),
    [(WRITTEN, 5), ((*WRITTEN, "distill.stream=true"), 5), (HEAL, 0)],
    ids=["complete", "streamed", "given"],
)
def test_epochs_read_the_same_windows_again(base, tmp_path, monkeypatch, words, blocks):
    """Each block is written once, and every epoch reads all windows, in another order."""
    made, orders, whole = [], [], TEXT.self_generated_windows
    monkeypatch.setattr(
        TEXT, "self_generated_windows",
        lambda *args, **options: made.append("block") or whole(*args, **options),
    )  # fmt: skip
    rows = TrainConfig.rows
    monkeypatch.setattr(
        TrainConfig, "rows",
        lambda *args: orders.append(rows(*args)) or orders[-1],
    )  # fmt: skip
    found = run_job(base, tmp_path / "out", *words, "distill.epochs=2", *QUICK)["distillation"]
    assert (found["steps"], found["distinct_tokens"], len(made)) == (8, 256, blocks)
    epochs = torch.cat(orders).view(2, 16)
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(16))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_teacher_is_not_in_memory_while_training_from_its_states(base, tmp_path, monkeypatch):
    devices, load, step = [], Job.load, importlib.import_module("come.distill.trainer")._step
    loaded = []

    def loads(job, *args, **options):
        loaded.append(load(job, *args, **options))
        return loaded[-1]

    def records(*args):
        devices.append(loaded[-1].device.type)
        return step(*args)

    monkeypatch.setattr(Job, "load", loads)
    monkeypatch.setattr("come.distill.trainer._step", records)
    found = run_job(base, tmp_path / "out", *HEAL, "distill.teacher=stored", *QUICK)
    assert devices == ["meta"] * 4
    merged = found["depths"][1]["parameters"]
    assert found["distillation"]["weight_bytes"] == 4 * merged


@pytest.mark.parametrize("words", [
    ("distill=logits", "distill.layers=all", "distill.train=norms_outputs"),
    ("distill=come_sp", "distill.optimizer=adafactor"), ("distill=come_mp",),
    ("distill=logits", "distill.teacher=stored", "distill.precision=bfloat16"),
])  # fmt: skip
def test_dry_run_says_the_memory_of_a_training(words, base, tmp_path):
    """With one merged layer, the estimate is exact."""
    job = prepare_job(base, tmp_path / "dry", *HEAL, *words)
    memory = training_estimate(job)
    found = run_job(base, tmp_path / "out", *HEAL, *words, *QUICK)["distillation"]
    keys = ("trained_parameters", "weight_bytes", "gradient_bytes", "optimizer_bytes")
    named = (memory.parameters, memory.weights, memory.gradients, memory.optimizer)
    assert dict(zip(keys, named)) == {key: found[key] for key in keys}
    printed = "\n".join(training_lines(job))
    assert f"{memory.parameters / 1e6:,.1f} M trained parameters" in printed
    assert ("stored teacher: at most" in printed) == ("distill.teacher=stored" in words)


@pytest.mark.parametrize(("words", "message"), [
    (("distill.source=self_generated", "distill.prefix_tokens=8"), "continues real text, and the"),
    (("distill.stream=true",), "distill.stream=true is for text that the model writes"),
    (("distill.prefix_tokens=16",), "distill.prefix_tokens=16: must be below distill.seq_len=16"),
    (("distill=lora", "distill.teacher=stored"), "distill=lora has no teacher that can be stored"),
    (("distill=come_mp", "distill.on_policy=0.5"), "distill.on_policy=0.5: distill=come_mp stores"),
])  # fmt: skip
def test_settings_that_contradict_each_other(words, message, base):
    with pytest.raises(ValueError, match=message):
        job_settings(base, *HEAL, *words)


@pytest.mark.parametrize("words", [
    ("distill.on_policy=0.5",), ("distill.layers=model",), ("distill.optimizer=adafactor",),
])  # fmt: skip
def test_settings_that_sharded_training_does_not_support(words, base):
    with pytest.raises(ValueError, match=f"{words[0]} is not possible with FSDP"):
        job_settings(base, *HEAL, *words).distill.check_sharded()


def test_windows_of_the_first_epoch_keep_their_order():
    config = TrainConfig(steps=4, batch_size=3, in_order=True)
    rows = torch.cat([config.rows(step, 6) for step in range(4)]).tolist()
    assert rows[:6] == list(range(6))
    assert sorted(rows[6:]) == list(range(6)) != rows[6:]
