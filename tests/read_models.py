"""Loads model folders with transformers: python -m tests.read_models OUT FOLDER ...

Writes the version, and the tokens, logits and greedy continuation of every folder, as JSON. Put
another version of transformers first on PYTHONPATH to test that version.
"""

from __future__ import annotations

import json
import sys
import warnings


def read(folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    dtype = str(model.dtype)
    model = model.float()
    text = "the layers of a model, merged in depth order. Line 7 speaks of 49 layers. " * 3
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -40:, :40]
        greedy = model.generate(ids[:, :12], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return {
        "ids": ids[0].tolist(),
        "decoded": tokenizer.decode(ids[0]),
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        "template": tokenizer.chat_template,
        "dtype": dtype,
        "logits": logits.tolist(),
        "greedy": greedy[0].tolist(),
    }


if __name__ == "__main__":
    import transformers

    warnings.simplefilter("ignore")
    out, *folders = sys.argv[1:]
    found = {folder: read(folder) for folder in folders}
    with open(out, "w") as file:
        json.dump({"version": transformers.__version__, "folders": found}, file)
