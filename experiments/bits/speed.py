"""Speed of llama.cpp with fewer layers, fewer bits, or both.

    python experiments/bits/speed.py --model NAME=FILE.gguf ... --out speed.jsonl

FILE.gguf is a model in float16, as `come export=gguf export.types=[f16]` writes it. The library
llama-cpp-python quantises it to 8 bits (Q8_0) and 4 bits (Q4_0). All models take turns; a turn is
the time of a prompt and of a greedy generation after it. Speeds are ratios to the first model in 16
bits within the same turn: median, lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import llama_cpp

FORMATS = {8: llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 4: llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def quantised(path: Path, bits: int, folder: Path) -> Path:
    """The file itself for 16 bits, else a new file in the folder."""
    if bits == 16:
        return path
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FORMATS[bits], 1
    found = folder / f"{path.parent.name}-{path.stem}-{bits}.gguf"
    failed = llama_cpp.llama_model_quantize(str(path).encode(), str(found).encode(), parameters)
    assert not failed, path
    return found


def turn(model: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for each generated token."""
    model.reset()
    started = perf_counter()
    model.eval(prompt)
    read = perf_counter()
    for _ in range(new_tokens):
        model.eval([model.sample(temp=0.0)])
    return read - started, (perf_counter() - read) / new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prompt = [100 + i % 1000 for i in range(arguments.prompt_tokens)]
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, file in (entry.split("=", 1) for entry in arguments.model):
            for bits in (16, *FORMATS):
                path = quantised(Path(file), bits, Path(folder))
                models[name, bits] = llama_cpp.Llama(
                    str(path), n_ctx=512, n_batch=512, verbose=False,
                    n_threads=arguments.threads, n_threads_batch=arguments.threads,
                )  # fmt: skip
                sizes[name, bits] = path.stat().st_size
                turn(models[name, bits], prompt, 4)  # reads the file
        for _ in range(arguments.turns):
            for key, model in models.items():
                found = turn(model, prompt, arguments.new_tokens)
                times.setdefault(key, []).append(found)
    first = next(iter(times.values()))
    rows = []
    for (name, bits), found in times.items():
        row = {"model": name, "bits": bits, "bytes": sizes[name, bits]}
        for at, what in enumerate(("prompt", "generation")):
            ratios = [a[at] / b[at] for a, b in zip(first, found, strict=True)]
            row[what] = [round(value, 4) for value in (median(ratios), min(ratios), max(ratios))]
        rows.append(row)
        print(json.dumps(row), flush=True)
    arguments.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main()
