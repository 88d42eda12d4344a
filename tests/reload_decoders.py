"""Loads saved decoders in this process and compares: python -m tests.reload_decoders FOLDER ...

Every folder holds a model and, in expected.safetensors, token ids with the logits and the greedy
continuation of the model that was saved. Prints what differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from come.models.families import layout_of

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def sequences(model: torch.nn.Module) -> int:
    """Number of sequences that are continued at once."""
    return 1 if layout_of(model.config).one_sequence else 2


@torch.no_grad()
def results(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and greedy continuations with and without the cache."""
    prompt = ids[: sequences(model), :12]
    options = {"attention_mask": torch.ones_like(prompt), **OPTIONS}
    return {
        "ids": ids,
        "logits": model(ids, use_cache=False).logits,
        "cached": model.generate(prompt, use_cache=True, **options),
        "uncached": model.generate(prompt, use_cache=False, **options),
    }


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        expected = load_file(folder / "expected.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = results(model, expected["ids"])
        gap = (found["logits"] - expected["logits"]).abs().max().item()
        wrong = [
            key for key in ("cached", "uncached") if not torch.equal(found[key], expected[key])
        ]
        if gap > 1e-5 or wrong:
            print(f"{folder.name}: logits differ by {gap}, and {wrong or 'no continuation'}")


if __name__ == "__main__":
    main()
