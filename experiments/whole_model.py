"""A complete job on a model that need not fit into memory, with the memory that it needed.

    python experiments/whole_model.py --shape mistral7b --target 28 --tokens 1024

Writes a checkpoint of random bfloat16 weights and a byte tokenizer (14.5 GB for mistral7b), merges
it layer by layer with `merge=come`, and loads the result with transformers. Words after the options
are passed to the job.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from bench import SHAPES, random_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN = 256
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.inference_mode():
    logits = model(input_ids=torch.arange(3, 11)[None]).logits
assert logits.isfinite().all()
print(len(model.model.layers))
"""


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for every byte, and one for the start of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mistral7b")
    parser.add_argument("--target", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of the weights")
    arguments, words = parser.parse_known_args()

    model = random_checkpoint(arguments.folder.resolve(), arguments.shape)
    save_tokenizer(model)
    run = model.with_name(f"{model.name}-{arguments.target}")
    command = [
        sys.executable, str(ROOT / "run.py"), "model=local", f"model.path={model}",
        "model.weights=disk", "merge=come", f"merge.target_layers={arguments.target}",
        "calibration=pydocs", f"calibration.num_samples={arguments.tokens // SEQ_LEN}",
        f"calibration.seq_len={SEQ_LEN}", "eval=none", f"hydra.run.dir={run}", *words,
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    took = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shards = sorted((run / "model").glob("*.safetensors"))
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, run / "model"], capture_output=True, text=True, check=True
    )
    row = {
        "shape": arguments.shape,
        "tokens": arguments.tokens,
        "target": arguments.target,
        "seconds": round(took),
        "resident_bytes": resident,
        "weight_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "shards": len(shards),
        "layers_in_transformers": int(loaded.stdout.split()[-1]),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
