"""The figure and the table of bits, layers and FFN channels, from the committed results.

    python experiments/bits/figure.py

Reads results.jsonl (`measure.py`) and speed.jsonl (`speed.py`), and runs no model. A model is named
"smollm2/24" by its layers, or "smollm2/26x1280" by its layers and FFN channels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from come.files import write_text

HERE = Path(__file__).parent
MODELS = {"smollm2": ("SmolLM2-135M-Instruct", 30), "gemma": ("Gemma 3 270M", 18)}
# by fewer layers, then by fewer channels
KINDS = {"dense": "*", "fewer layers": "o", "fewer channels": "s", "both": "^"}
COLOURS = {16: "tab:blue", 8: "tab:orange", 4: "tab:green"}
TICKS = [1, 1.1, 1.2, 1.4, 1.7, 2, 2.5, 3]
ACROSS = ("MB of weights", "speed of a prompt", "speed of generation")


@dataclass(frozen=True)
class Row:
    """A model in a number of bits.

    Attributes:
        model: the dense model's name.
        shape: layers, or layers x FFN channels.
        kind: one of `KINDS`.
        bits: bits of a weight.
        megabytes: size of all weights.
        ratio: perplexity over that of the dense model in 16 bits, and its 95% interval.
        speed: of a prompt and of generation, over the dense model in 16 bits; None if not measured.
    """

    model: str
    shape: str
    kind: str
    bits: int
    megabytes: float
    ratio: tuple[float, float, float]
    speed: tuple[float, float] | None

    @property
    def places(self) -> tuple[float, ...]:
        """Values of the horizontal axes, in the order of `ACROSS`."""
        return (self.megabytes, *(self.speed or ()))

    def cells(self) -> list[str]:
        """The row as cells of the table."""
        value, low, high = self.ratio
        speeds = [f"{speed:.2f}" for speed in self.speed] if self.speed else ["", ""]
        return [
            MODELS[self.model][0], self.shape, str(self.bits), f"{self.megabytes:.0f}",
            f"{value:.3f} [{low:.3f}, {high:.3f}]", *speeds,
        ]  # fmt: skip


def read_rows(folder: Path) -> list[Row]:
    """The rows of results.jsonl, with the speeds of speed.jsonl."""
    speeds = {}
    for line in (folder / "speed.jsonl").read_text().splitlines():
        found = json.loads(line)
        speeds[found["model"], found["bits"]] = (found["prompt"][0], found["generation"][0])
    rows = []
    for line in (folder / "results.jsonl").read_text().splitlines():
        found = json.loads(line)
        model, shape = found["model"].split("/")
        fewer, narrower = found["layers"] < MODELS[model][1], "x" in shape
        kind = list(KINDS)[fewer + 2 * narrower]
        ratio = (found["ratio"], found["low"], found["high"])
        speed = speeds.get((found["model"], found["bits"]))
        rows.append(Row(model, shape, kind, found["bits"], found["bytes"] / 1e6, ratio, speed))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    head = ["model", "layers x channels", "bits", "MB", "x dense", "prompt", "generation"]
    lines = [head, ["---", "---", *["---:"] * 5], *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[Row], path: Path) -> None:
    """Quality against bytes and against both speeds, one line of the figure for each model."""
    names = list(dict.fromkeys(row.model for row in rows))
    shape = (len(names), len(ACROSS))
    figure, axes = plt.subplots(*shape, figsize=(12, 3.9 * len(names)), squeeze=False,
                                sharey="row", layout="constrained")  # fmt: skip
    for line, name in zip(axes, names, strict=True):
        for number, (axis, label) in enumerate(zip(line, ACROSS, strict=True)):
            for bits in COLOURS:
                _draw_bits(axis, [r for r in rows if (r.model, r.bits) == (name, bits)], number)
            axis.set_yscale("log")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{label}, x dense in 16 bits" if number else label)
        line[0].set_ylabel("perplexity, x dense in 16 bits")
        line[0].set_title(MODELS[name][0], loc="left")
    marks = [plt.Line2D([], [], color="grey", ls="", marker=mark, label=kind)
             for kind, mark in KINDS.items() if any(row.kind == kind for row in rows)]  # fmt: skip
    marks += [plt.Line2D([], [], color=c, label=f"{bits} bits") for bits, c in COLOURS.items()]
    axes[0, -1].legend(handles=marks, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_bits(axis: plt.Axes, rows: list[Row], number: int) -> None:
    """The models of one number of bits: a line through the depths, marks for the other shapes."""
    placed = [row for row in rows if len(row.places) > number]
    for kind, mark in KINDS.items():
        chosen = [row for row in placed if row.kind == kind]
        if chosen:
            axis.plot([row.places[number] for row in chosen], [row.ratio[0] for row in chosen],
                      ls="", marker=mark, ms=9 if kind == "dense" else 5,
                      color=COLOURS[chosen[0].bits])  # fmt: skip
    depths = [row for row in placed if row.kind in ("dense", "fewer layers")]
    if depths:
        axis.plot([row.places[number] for row in depths], [row.ratio[0] for row in depths], lw=1,
                  color=COLOURS[depths[0].bits])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both files")
    out = parser.parse_args().out
    rows = read_rows(HERE)
    write_text(out / "table.md", table(rows))
    draw(rows, out / "figure.png")


if __name__ == "__main__":
    main()
