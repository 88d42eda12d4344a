"""Figures of a plan and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from come.merge.plan import MergeStep, Plan
from come.models.layout import Unit
from come.records import Result
from come.report.numbers import label, title

TITLES: dict[Unit, str] = {"kv_group": "attention: KV groups", "channel": "FFN: channels"}
_BLOCKS: dict[Unit, str] = {"kv_group": "attention", "channel": "ffn"}
_DPI = 110
_DARK = 1.2  # labels are white if the colour's red + green + blue is below this


def unit_origins(plan: Plan, unit: Unit) -> list[dict[int, float]]:
    """The original layers that every merged layer consists of, with the units of each.

    Returns:
        For every layer of the merged model, a map from original layer to number of units, ordered
        by original layer. Operators that mix layers contribute fractions of units, by their shares.
    """
    count = plan.base.units[unit]
    steps = plan.steps if plan.block in ("layer", _BLOCKS.get(unit)) else []
    origins: list[list[dict[int, float]]] = [
        [{layer: 1.0} for _ in range(count)] for layer in range(plan.base.num_layers)
    ]
    for step in steps:
        span = origins[step.first : step.last + 1]
        if unit in step.kept:
            merged = [
                layer[i] for layer, kept in zip(span, step.kept[unit], strict=True) for i in kept
            ]
        else:
            merged = []
            for parts in zip(*span, strict=True):
                mix: dict[int, float] = {}
                for origin, share in zip(parts, step.shares, strict=True):
                    for layer, weight in origin.items():
                        if share > 0:
                            mix[layer] = mix.get(layer, 0.0) + share * weight
                merged.append(mix)
        origins[step.first : step.last + 1] = [merged]
    totals = []
    for units in origins:
        total: dict[int, float] = {}
        for origin in units:
            for layer, weight in origin.items():
                total[layer] = total.get(layer, 0.0) + weight
        totals.append(dict(sorted(total.items())))
    return totals


def draw_puzzle(plan: Plan, path: Path) -> None:
    """Draws every merged layer as a stacked bar of its units, coloured by original layer."""
    depth = plan.num_layers
    whole = plan.block == "layer"
    figure, grid = plt.subplots(
        1,
        len(plan.base.units),
        figsize=(10, 0.22 * depth + 1.4),
        sharey=whole,
        squeeze=False,
        layout="constrained",
    )
    axes = grid[0]
    colours = plt.get_cmap("turbo")
    for axis, unit in zip(axes, plan.base.units, strict=True):
        for layer, merged in enumerate(unit_origins(plan, unit)):
            left = 0.0
            for original, units in merged.items():
                colour = colours((original + 0.5) / plan.base.num_layers)
                dark = sum(colour[:3]) < _DARK
                ink = "white" if dark else "black"
                axis.barh(layer, units, left=left, color=colour, edgecolor="white", linewidth=0.8)
                if units >= 0.12 * plan.base.units[unit]:
                    label = f"{original}" if len(merged) == 1 else f"{original}: {units:.4g}"
                    axis.text(
                        left + units / 2,
                        layer,
                        label,
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color=ink,
                    )
                left += units
        axis.set_title(f"{TITLES.get(unit, unit)} ({plan.base.units[unit]} a layer)", fontsize=10)
        axis.set_xlabel("units, labelled with the original layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(-0.6, depth - 0.4)
    axes[0].set_ylabel("layer of the merged model" if whole else f"{plan.block} blocks left")
    axes[0].set_yticks(range(0, depth, max(1, depth // 15)))
    for axis in axes[: 1 if whole else None]:
        axis.invert_yaxis()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _searched(plan: Plan) -> list[MergeStep]:
    """The merges; the steps that narrow layers follow, and no span is chosen for them."""
    return plan.steps[: len(plan.steps) - plan.narrowed]


def draw_influence(plan: Plan, path: Path) -> None:
    """Draws the scored spans and block influence over the original layers, one colour per step.

    A span is a line from its first to its last original layer, at its score; the chosen ones are
    red.
    """
    figure, (scores, influence) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = plt.get_cmap("viridis")
    count = len(_searched(plan))
    for number, step in enumerate(plan.steps[:count]):
        colour = colours(number / max(1, count - 1) * 0.9)
        history = replace(plan, steps=plan.steps[:number]).history
        label = f"step {number + 1}" if number in (0, count - 1) else None
        style = {"marker": "|", "markersize": 5, "solid_capstyle": "butt"}
        for index, candidate in enumerate(step.candidates):
            ends = [history[candidate.first][0], history[candidate.last][-1]]
            own = label if index == 0 else None
            scores.plot(ends, [candidate.score] * 2, color=colour, linewidth=1, label=own, **style)
        chosen = [history[step.first][0], history[step.last][-1]]
        scores.plot(chosen, [step.score] * 2, color="crimson", linewidth=2.5, zorder=3, **style)
        dense = plan.block != "layer" or len(step.bi) > len(history)  # BI by dense layer
        layers = range(len(step.bi)) if dense else [s[0] for s in history[: len(step.bi)]]
        influence.plot(
            layers, step.bi, "o-", markersize=2.5, linewidth=0.9, color=colour, label=label
        )
    scores.set_title("score of each span that was scored (red: merged)", fontsize=10)
    scores.set_ylabel("selection score")
    influence.set_title("block influence of each layer", fontsize=10)
    influence.set_yscale("log")
    for axis in (scores, influence):
        axis.set_xlabel("original layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def draw_depth(result: Result, path: Path) -> None:
    """Draws perplexity over the number of layers, with confidence intervals over windows."""
    points = [
        (depth["layers"], depth["metrics"]["perplexity"])
        for depth in result["depths"]
        if "perplexity" in depth["metrics"]
    ]
    figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    assert isinstance(axis, Axes)
    layers = [layer for layer, _ in points]
    values = [found["value"] for _, found in points]
    low = [found["value"] - found["low"] for _, found in points]
    longest = 100 * max(values, default=0.0)  # limit of an error bar
    high = [min(found["high"] - found["value"], longest) for _, found in points]
    axis.errorbar(layers, values, yerr=[low, high], fmt="o-", capsize=4)
    for layer, value in zip(layers, values, strict=True):
        axis.annotate(f"{value:.1f}", (layer, value), (6, 4), textcoords="offset points", size=8)
    axis.set_xticks(layers)
    axis.invert_xaxis()
    axis.set_xlabel("layers")
    axis.set_ylabel("perplexity")
    axis.set_title(label(title(result)), fontsize=10)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def draw_training(result: Result, path: Path) -> None:
    """Draws the training loss of every step, and the validation loss, over training tokens."""
    training = result["distillation"]
    assert training is not None
    figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    tokens, losses = zip(*training["curve"], strict=True)
    axis.plot(tokens, losses, lw=1, alpha=0.6, label="training")
    points = [(point["tokens"], point["loss"]) for point in training["validation"]]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", ms=4, label="validation")
    axis.set_xlabel("training tokens")
    axis.set_ylabel(f"loss of {training['method']}")
    axis.set_title(label(title(result)), fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def draw_all(folder: Path, result: Result, plan: Plan) -> dict[str, Path]:
    """Draws every figure that the job has data for; returns their paths by name."""
    drawings: dict[str, Callable[[Path], None]] = {}
    if plan.steps:
        drawings["puzzle"] = lambda path: draw_puzzle(plan, path)
    if _searched(plan):
        drawings["influence"] = lambda path: draw_influence(plan, path)
    if any("perplexity" in depth["metrics"] for depth in result["depths"]):
        drawings["perplexity"] = lambda path: draw_depth(result, path)
    if result["distillation"] and result["distillation"]["curve"]:
        drawings["training"] = lambda path: draw_training(result, path)
    paths = {}
    for name, draw in drawings.items():
        paths[name] = folder / f"{name}.png"
        draw(paths[name])
    return paths
