"""Small base checkpoints in the formats that transformers 4 and 5 write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from come.models.loading import load_tokenizer
from tests.conftest import VOCAB, pico

TEXT = "the layers of a model, merged in depth order"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def save_byte_level_tokenizer(folder: Path, *, extra: Sequence[str] = ()) -> None:
    """Saves a byte-level BPE tokenizer with the installed transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        **({"extra_special_tokens": list(extra)} if extra else {}),
    ).save_pretrained(folder)


def save_sentencepiece_tokenizer(folder: Path) -> None:
    """Saves a sentencepiece tokenizer in the format of Llama 2's."""
    text = folder / "text"
    text.write_text("\n".join(f"{TEXT} {i}, line {i * i} of the text" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    edit_json(folder / "special_tokens_map.json", **special)
    edit_json(
        folder / "tokenizer_config.json",
        **special,
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        legacy=False,
        model_max_length=512,
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def edit_json(path: Path, *without: str, **values: Any) -> None:
    """Sets keys of a JSON file and removes those in `without`; creates a missing file."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    rest = {key: value for key, value in content.items() if key not in without}
    path.write_text(json.dumps(rest | values, indent=2) + "\n")


def to_transformers4_format(folder: Path) -> None:
    """Rewrites the config files of a folder in the format of transformers 4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    config["_name_or_path"] = "somebody/base"
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = folder / "tokenizer_config.json"
    if json.loads(tokenizer.read_text())["tokenizer_class"] == "TokenizersBackend":
        edit_json(tokenizer, "backend", tokenizer_class="PreTrainedTokenizerFast")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder's single weights file in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def save_base(
    folder: Path,
    family: str,
    *,
    tokenizer: Callable[[Path], None] = save_byte_level_tokenizer,
    v4: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **config: Any,
) -> Path:
    """Writes a random pico model and its tokenizer; `v4` is for the format of transformers 4."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(folder)
    pico(family, **config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    if v4:
        to_transformers4_format(folder)
    return folder


def add_token_without_embedding(base: Path, token: str = "<new>") -> tuple[str, int]:
    """Adds a token to the tokenizer without an embedding row in the model."""
    tokenizer = load_tokenizer(base)
    save_base(base, "llama_gqa", vocab_size=len(tokenizer))
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(base)
    return token, len(tokenizer) - 1


WITH_EXTRA_TOKEN = partial(save_byte_level_tokenizer, extra=("<|extra|>",))

BASES: dict[str, Callable[[Path], Path]] = {
    "LLaMA tied": lambda path: save_base(
        path, "llama_tied", tokenizer=WITH_EXTRA_TOKEN, rope_parameters={
        "rope_type": "default", "rope_theta": 77000.0}),
    "LLaMA untied": lambda path: save_base(path, "llama_gqa", v4=True, rope_parameters={
        "rope_type": "default", "rope_theta": 77000.0}),
    "llama3 rope": lambda path: save_base(path, "llama_gqa", v4=True, rope_parameters=dict(LLAMA3)),
    "llama3 rope, 5": lambda path: save_base(path, "llama_gqa", rope_parameters=dict(LLAMA3)),
    "yarn": lambda path: save_base(path, "llama_tied", rope_parameters=dict(YARN)),
    "linear": lambda path: save_base(path, "llama_gqa", rope_parameters={
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "dynamic": lambda path: save_base(path, "llama_gqa", rope_parameters={
        "rope_type": "dynamic", "rope_theta": 20000.0, "factor": 2.0}),
    "sentencepiece": lambda path: save_base(
        path, "llama_gqa", tokenizer=save_sentencepiece_tokenizer, v4=True, pad_token_id=None),
    "Qwen2 bf16 sharded": lambda path: save_base(
        path, "qwen2_gqa", dtype=torch.bfloat16, shard="20KB", v4=True),
    "Mistral": lambda path: save_base(path, "mistral_sliding", v4=True),
    "OPT": lambda path: save_base(path, "opt", v4=True),
}  # fmt: skip
