"""experiments/families: the text, the training, and models with fewer experts."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from come.evaluate.perplexity import perplexity
from come.models.adapter import ModelAdapter
from tests.commands import ROOT

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def document(number):
    """Paragraphs of words in an order of its own."""
    lines = [" ".join(WORDS[(number * i + j) % 12] for j in range(9)) for i in range(1, 40)]
    return f"document {number}", "\n\n".join(f"{number} {line} {i}" for i, line in enumerate(lines))


DOCUMENTS = [document(number) for number in range(30)]


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Imports modules of experiments/families by name; the cache is empty."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "families"))
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    return importlib.import_module


def paragraphs(text):
    return {" ".join(part.split()) for part in text.split("\n\n")}


def test_held_out_documents_share_no_paragraph_with_the_training_text(scripts):
    texts = scripts("documentation").split([*DOCUMENTS, ("again", DOCUMENTS[3][1])])
    train, test = paragraphs(texts.train), paragraphs(texts.test)
    assert train
    assert test
    assert not train & test
    assert train | test == {each for _, text in DOCUMENTS for each in paragraphs(text)}


def test_docstrings_follow_their_signatures(scripts):
    source = (
        b'"""Module."""\nclass A:\n    """Class."""\n    def f(self, x=1):\n        """Func."""\n'
    )
    found = scripts("documentation").docstrings("pack.mod", source)
    assert found == "pack.mod\n\nModule.\n\npack.mod.A\nClass.\n\npack.mod.f(self, x=1)\nFunc."
    assert scripts("documentation").docstrings("bad", b"def") == ""


def test_rwkv_for_all_tokens_at_once(scripts):
    """Outputs and gradients are those of the loop over tokens in transformers."""
    wkv = scripts("wkv").wkv
    loop = scripts("transformers.models.rwkv.modeling_rwkv").rwkv_linear_attention_cpu
    generator = torch.Generator().manual_seed(0)
    for tokens in (2, 37, 64):
        shapes = [(8,), (8,), (3, tokens, 8), (3, tokens, 8)]
        given = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        output = torch.randn(shapes[-1], generator=generator)
        results = []
        for function in (wkv, loop):
            found = function(given[0], given[1], 3 * given[2], given[3])[0]
            results.append([found, *torch.autograd.grad((found * output).sum(), given)])
        for own, expected in zip(*results, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=2e-5)


def tiny(train, family):
    settings = train.settings(family, tokens=600, layers=2)
    config = {**settings.config, "vocab_size": 300}
    return replace(settings, seq_len=16, batch=8, config=config)


@pytest.mark.parametrize("family", ["moe", "mamba2", "rwkv", "post_norm"])
def test_training_writes_a_checkpoint_once(scripts, family, monkeypatch):
    train = scripts("train")
    chosen = tiny(train, family)
    folder = train.checkpoint(chosen, DOCUMENTS)
    record = json.loads((folder / "train.json").read_text())
    assert record["tokens"] == 640  # five steps of 128 tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert sum(w.numel() for w in model.parameters()) == record["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "test.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert tokenizer.decode(ids) == text
    found = train.perplexity(model, ids, 16)
    assert found == pytest.approx(record["test_perplexity"], rel=1e-4)
    assert found < 300  # better than a guess

    monkeypatch.setattr(train, "train_model", None)
    assert train.checkpoint(chosen, []) == folder
    assert train.settings(family, seed=1).folder != train.settings(family).folder


def test_training_is_repeatable(scripts):
    train = scripts("train")
    ids = torch.arange(4000) % 200
    states = []
    for _ in range(2):
        chosen = tiny(train, "moe")
        torch.manual_seed(0)
        config = train.AutoConfig.for_model("qwen3_moe", **chosen.config)
        model = AutoModelForCausalLM.from_config(config)
        train.train_model(model, ids, chosen, {})
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rates = [train.rate(share) for share in (0.0, 0.05, 0.5, 1.0)]
    assert rates[1] == max(rates) == 1
    assert rates[3] == pytest.approx(train.LOWEST)


@pytest.fixture
def moe(scripts):
    """A small MoE with random weights, and its calibration windows."""
    config = scripts("small_models").MODELS["moe"].arguments(3) | {"vocab_size": 100}
    torch.manual_seed(1)
    found = scripts("transformers").AutoConfig.for_model("qwen3_moe", **config)
    model = AutoModelForCausalLM.from_config(found, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    windows = torch.randint(100, (8, 64), generator=torch.Generator().manual_seed(2))
    return model, windows


def test_fewer_experts(scripts, moe, tmp_path):
    """Kept experts route among themselves; the refit reduces the error; checkpoints load."""
    fewer, (model, windows) = scripts("fewer_experts"), moe
    with fewer.Calibration(model, windows) as dense:
        kept = dense.best("reap", 5)
        for own, scores in zip(kept, dense.scores("reap"), strict=True):
            assert sorted(scores.topk(5).indices.tolist()) == own
        assert [len(own) for own in dense.eliminated(5)] == [5, 5, 5]
        small = fewer.narrowed(model, kept)
        for index, own in enumerate(kept):
            new, old = (ModelAdapter(m).layers[index].mlp for m in (small, model))
            assert torch.equal(new.gate.weight, old.gate.weight[own])
            assert torch.equal(new.experts.down_proj, old.experts.down_proj[own])
        whole = fewer.narrowed(model, [range(8)] * 3)
        torch.testing.assert_close(whole(windows).logits, model(windows).logits)
        target = model.model(windows).last_hidden_state
        before = (small.model(windows).last_hidden_state - target).square().mean()
        fewer.refit(small, dense)
        after = (small.model(windows).last_hidden_state - target).square().mean()
        assert after < 0.95 * before
        merged = fewer.narrowed(model, kept, fewer.averaged(dense, kept))
        assert perplexity(merged, windows, progress=False).value > 1
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(windows).logits, small(windows).logits)
    with pytest.raises(ValueError, match="1 experts are fewer than the 2"):
        fewer.narrowed(model, [[0]] * 3)


def test_matched_channels_undo_a_permutation(scripts):
    matched = scripts("fewer_experts").matched
    rows, columns = torch.randn(12, 5), torch.randn(5, 6)
    order = torch.randperm(6)
    shuffled = torch.cat([part[order] for part in rows.chunk(2)]), columns[:, order]
    for own, expected in zip(matched(shuffled, (rows, columns)), (rows, columns), strict=True):
        assert torch.equal(own, expected)
