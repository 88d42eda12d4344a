"""Experts dropped or averaged inside layers against layers merged or dropped, at equal parameters.

    python experiments/families/experts.py FOLDER

FOLDER: a MoE of `train.py`, with the text that it was trained on, which calibrates, and held-out
documents, which evaluate. Of its ten layers with eight experts, one expert of every layer has as
many parameters as one layer. Writes `experts.jsonl` and `experts.md` to `--out`, after every draw
of calibration windows; `--save` also saves the checkpoints of the first draw with fewer experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewer_experts import Calibration, averaged, narrowed, refit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.data.sources.text_file import TextFile
from come.data.windows import calibration_windows, evaluation_windows
from come.evaluate.perplexity import perplexity
from come.files import write_text
from come.merge.loop import compress
from come.merge.method import Method
from come.merge.plan import Plan
from come.models.loading import load_tokenizer, load_weights

REMOVED = (1, 2, 3)  # of eight experts, or of ten layers
_DROP: dict[str, Any] = {"operator": "drop", "selection": "bi_sum", "schedule": "one_shot", "m": 2}
LAYERS = {
    "layers merged, come_plus": Method,
    "layers merged, come": lambda: Method(
        selection="sbi", retention="bi_power", schedule="progressive", refit="none", m=2,
        tokens="last", norms="mean",
    ),
    "layers dropped with refit, shortgpt": lambda: Method(**_DROP, retention="bi_power"),
}  # fmt: skip
"""Methods for whole layers, as in conf/merge."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration windows")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, help="held-out tokens; by default all")
    parser.add_argument("--save", type=Path, help="folder for checkpoints with fewer experts")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    held_out = evaluation_windows(
        tokenizer,
        TextFile(str(arguments.model / "test.txt")),
        seq_len=arguments.seq_len,
        max_tokens=arguments.max_tokens,
    ).windows
    found: list[Row] = []
    for draw in range(arguments.draws):
        windows = calibration_windows(
            tokenizer,
            TextFile(str(arguments.model / "train.txt")),
            num_samples=arguments.samples,
            seq_len=arguments.seq_len,
            seed=draw,
            held_out=[TextFile(str(arguments.model / "test.txt"))],
        ).windows
        dense = measured("dense", 0, load(arguments.model), held_out)
        for row, small in rows(arguments.model, windows, held_out, draw):
            row |= {"draw": draw, "ratio": row["perplexity"] / dense["perplexity"]}
            print(json.dumps(row), flush=True)
            found.append(row)
            if arguments.save and small is not None and draw == 0:
                save(small, tokenizer, arguments.save / f"{row['method']}-{row['removed']}")
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        write_text(arguments.out / "experts.jsonl", lines)
        write_text(arguments.out / "experts.md", table(dense, found))
    print(table(dense, found))


def load(folder: Path) -> PreTrainedModel:
    return load_weights(folder, dtype="float32")


def measured(method: str, removed: int, model: PreTrainedModel, held_out: Tensor) -> Row:
    """Perplexity and number of parameters of a model."""
    return {
        "method": method,
        "removed": removed,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "perplexity": perplexity(model, held_out, progress=False).value,
    }


def rows(
    folder: Path, windows: Tensor, held_out: Tensor, draw: int
) -> Iterator[tuple[Row, PreTrainedModel | None]]:
    """All compressed models of a draw, each with its model if that has fewer experts."""
    model = load(folder)
    with Calibration(model, windows) as dense:
        total, random = len(dense.scores("reap")[0]), {"name": "random", "seed": draw}
        for removed in REMOVED:
            count = total - removed
            best = dense.best("reap", count)
            chosen = {
                "experts dropped, reap": (best, None),
                "experts dropped, elimination": (dense.eliminated(count), None),
                "experts dropped, random": (dense.best(random, count), None),
                "experts averaged": (best, averaged(dense, best)),
            }
            for name, (kept, change) in chosen.items():
                small = narrowed(model, kept, change)
                yield measured(name, removed, small, held_out), small
                refit(small, dense)
                yield measured(f"{name}, refit", removed, small, held_out), small
    for name, method in LAYERS.items():
        for row in layer_rows(name, method(), folder, windows, held_out):
            yield row, None


def layer_rows(
    name: str, method: Method, folder: Path, windows: Tensor, held_out: Tensor
) -> list[Row]:
    """The models with fewer layers of one method."""
    model = load(folder)
    count, found = model.config.num_hidden_layers, []

    def see(plan: Plan) -> None:
        removed = count - plan.num_layers
        if removed in REMOVED:
            found.append(measured(name, removed, model, held_out))

    stops = [count - removed for removed in REMOVED]
    compress(
        model, windows, method, target_layers=stops[-1], stops=stops[:-1], on_step=see,
        progress=False,
    )  # fmt: skip
    return found


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a checkpoint that transformers loads."""
    folder = folder.with_name(folder.name.replace(", ", "-").replace(" ", "-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table(dense: Row, found: list[Row]) -> str:
    """Perplexity relative to the dense model's, mean and [lowest, highest] of the draws."""
    lines = [
        f"Dense: perplexity {dense['perplexity']:.2f}, {dense['parameters']:,} parameters.",
        "",
        "| method | " + " | ".join(f"{removed} removed" for removed in REMOVED) + " |",
        "|---|" + "---:|" * len(REMOVED),
    ]
    for method in dict.fromkeys(row["method"] for row in found):
        cells = []
        for removed in REMOVED:
            own = [r for r in found if (r["method"], r["removed"]) == (method, removed)]
            ratios = [row["ratio"] for row in own]
            share = 1 - own[0]["parameters"] / dense["parameters"]
            cells.append(
                f"{sum(ratios) / len(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] "
                f"(-{share:.1%})"
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
