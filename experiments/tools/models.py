"""The models that the tools read, and the reference values from transformers.

smollm2        SmolLM2-135M-Instruct, 30 layers merged to 27 by a short run of the command
sentencepiece  a small random LLaMA in bfloat16, with a tokenizer like Llama 2's
llama3         the same shape with llama3 rope scaling, in the files that transformers 4 writes

The last two have 4 layers, merged to 3. Their weights are large, so that every layer and position
changes the predictions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from readers.protocol import load, perplexity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import come
from come.files import local_hash, write_text

ROOT = Path(__file__).parents[2]
VOCAB, SEQ = 512, 128
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
SMOLLM2 = [
    "merge=come", "merge.target_layers=27", "calibration=pydocs", "calibration.num_samples=8",
    "calibration.seq_len=128", "eval=none", "model.dtype=float32",
]  # fmt: skip
PROMPTS = [
    "The capital of France is", "Water boils when", "In Python, a list comprehension",
    "The statement returns", "An object is", "If the value of the expression", "A class can",
    "When the function is called", "The name of the module", "Lists may be",
]  # fmt: skip
KEPT_PROMPTS, NEW_TOKENS, DISTINCT, TEXTS = 3, 24, 8, 6


def sentencepiece_tokenizer(folder: Path, text: str) -> None:
    """Trains a tokenizer in the files of Llama 2's."""
    path = folder / "text"
    path.write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB,
        model_type="bpe", byte_fallback=True, character_coverage=0.999, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "legacy": False, "model_max_length": 512,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", special | config)


def byte_level_tokenizer(folder: Path, text: str) -> None:
    """Trains a byte-level BPE tokenizer, in the files that transformers 4 writes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    write_json(path, config)


@torch.no_grad()
def randomise(model: LlamaForCausalLM) -> None:
    """Gives all weights values that matter: projections of gain 1, other norms than 1."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(1 + 0.3 * noise)
        else:
            weight.copy_(noise / weight.shape[-1] ** 0.5)


def small_model(folder: Path, kind: str, text: str) -> Path:
    """Makes and merges a small model; returns the merged model's folder."""
    base, merged = folder / "base", folder / "model"
    base.mkdir(parents=True, exist_ok=True)
    (sentencepiece_tokenizer if kind == "sentencepiece" else byte_level_tokenizer)(base, text)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text[:20000], add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // SEQ * SEQ]).view(-1, SEQ)[:16]
    rope = LLAMA3 if kind == "llama3" else {"rope_type": "default"}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters={**rope, "rope_theta": 500000.0}))
    randomise(model)
    dtype = torch.bfloat16 if kind == "sentencepiece" else torch.float32
    model.to(dtype).save_pretrained(base)
    if kind == "llama3":
        to_transformers4(base / "config.json")
    model, tokenizer = come.load_model(str(base))
    plan = come.compress(
        model, tokenizer, target_layers=3, text=windows, method=come.Method(m=2),
        progress=False,
    )  # fmt: skip
    return come.save_model(model, tokenizer, merged, plan)


def to_transformers4(path: Path) -> None:
    """Rewrites config.json with the keys of transformers 4."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    config["torch_dtype"] = config.pop("dtype")
    write_json(path, config)


def smollm2(folder: Path) -> Path:
    """Compresses SmolLM2 by the command; returns the folder of its model."""
    words = [sys.executable, str(ROOT / "run.py"), *SMOLLM2, f"hydra.run.dir={folder / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=folder, env=environment, check=True)
    return folder / "run" / "model"


def probe(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Prompts, texts and reference values of a model.

    Of the prompts whose continuations do not only repeat themselves, those whose greedy tokens have
    the largest margins are kept, so that rounding in float32 does not decide. The texts begin with
    the token that lm-eval puts before a text.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    texts = [text[:350].strip() for text in texts[:TEXTS]]
    windows = [[first, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].float()

    found = []
    for prompt in PROMPTS:
        ids, tokens, margins = tokenizer(prompt)["input_ids"], [], []
        for _ in range(NEW_TOKENS):
            best = logits(ids + tokens)[-1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        if tokenizer.eos_token_id not in tokens and len(set(tokens)) >= DISTINCT:
            found.append((min(margins), prompt, ids, tokens))
    found = sorted(found, reverse=True)[:KEPT_PROMPTS]
    assert len(found) == KEPT_PROMPTS, "continuations end or repeat themselves"
    tokens = [tokens for *_, tokens in found]
    return {
        "folder": str(folder),
        "prompts": [prompt for _, prompt, _, _ in found],
        "prompt_ids": [ids for _, _, ids, _ in found],
        "margin": min(margin for margin, *_ in found),
        "texts": texts,
        "windows": windows,
        "new_tokens": NEW_TOKENS,
        "tokens": tokens,
        "continuations": [tokenizer.decode(ids) for ids in tokens],
        "perplexity": perplexity(windows, lambda ids: logits(ids).numpy()),
        "hash": local_hash(str(folder)),
    }


def texts() -> tuple[str, list[str]]:
    """Text to train and calibrate on, and the texts of the probe, which are not part of it."""
    parts = [part for part in documents() if len(part) > 500]
    return "\n".join(parts[TEXTS:]), parts[:TEXTS]


def documents() -> Iterator[str]:
    """Python's documentation: one string for every topic."""
    from pydoc_data.topics import topics

    yield from (" ".join(topics[name].split()) for name in sorted(topics))


MODELS = ("smollm2", "sentencepiece", "llama3")


def make(name: str, folder: Path) -> dict[str, Any]:
    """The probe of a model, which is made on the first call."""
    path = folder / "probe.json"
    if path.is_file():
        return json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    text, held_out = texts()
    model = smollm2(folder) if name == "smollm2" else small_model(folder, name, text)
    found = probe(model, held_out)
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
