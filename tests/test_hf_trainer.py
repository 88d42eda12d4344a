"""experiments/distill/hf_trainer.py: the loss, the text, and a run from a saved folder."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from come.distill.losses import logit_kl
from come.models.loading import load_tokenizer
from tests.bases import TEXT, save_byte_level_tokenizer
from tests.commands import load_script
from tests.conftest import SEQ, VOCAB, pico


@pytest.fixture
def script(monkeypatch):
    return load_script("distill/hf_trainer")


@pytest.fixture
def saved(tmp_path):
    """A small model with a tokenizer, a plan and a card; and a text."""
    folder = tmp_path / "model"
    pico("llama_bias").to(torch.bfloat16).save_pretrained(folder)
    save_byte_level_tokenizer(folder)
    (folder / "come").mkdir()
    (folder / "come" / "plan.json").write_text("{}")
    (folder / "README.md").write_text("card")
    (tmp_path / "text").write_text("\n".join(f"{TEXT}, line {i}" for i in range(60)))
    return folder


def test_the_teacher_s_loss_is_the_kl_divergence_of_distributions(script, tmp_path):
    model, teacher = pico("llama_bias"), pico("mistral_gqa")
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = script.TeacherTrainer(teacher, model=model, args=arguments)
    ids = torch.randint(3, VOCAB, (2, SEQ))
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    states = [m.model(input_ids=ids).last_hidden_state for m in (model, teacher)]
    wanted = logit_kl(model.lm_head, states[0], teacher.lm_head, states[1], 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.requires_grad
    assert not any(p.grad is not None for p in teacher.parameters())


def test_windows_are_consecutive_parts_of_the_text(script, saved, tmp_path):
    tokenizer = load_tokenizer(saved)
    ids = tokenizer((tmp_path / "text").read_text(), add_special_tokens=False)["input_ids"]
    windows = script.Windows(tmp_path / "text", tokenizer, 16)
    assert len(windows) == len(ids) // 16
    assert windows[3]["input_ids"].tolist() == ids[48:64] == windows[3]["labels"].tolist()


@pytest.mark.parametrize("teacher", [False, True])
def test_a_run_trains_and_keeps_dtype_plan_and_card(script, saved, tmp_path, monkeypatch, teacher):
    out = tmp_path / "healed"
    words = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "true"]
    words += ["--seq-len", "16", "--learning_rate", "0.01"]
    if teacher:
        pico("qwen2_gqa").save_pretrained(tmp_path / "dense")
        words += ["--teacher", str(tmp_path / "dense")]
    text = str(tmp_path / "text")
    given = [str(saved), "--text", text, "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", *given])
    script.main()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, out))
    assert after.dtype == before.dtype == torch.bfloat16
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) > 5
    assert (out / "come" / "plan.json").read_text() == "{}"
    assert (out / "README.md").read_text() == "card"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_tokenizer(out)(TEXT)["input_ids"] == load_tokenizer(saved)(TEXT)["input_ids"]
