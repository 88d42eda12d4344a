"""Perplexity with rounded weights of linear maps, and rounded inputs, as in other runtimes.

    python experiments/tools/rounding.py runs/tools/models/smollm2/probe.json --inputs
    python experiments/tools/rounding.py PROBE --inputs --outliers 6             # LLM.int8()
    python experiments/tools/rounding.py PROBE --steps 7.5 --group 64 --head     # 4 bits
    python experiments/tools/rounding.py PROBE --steps 7.5 --group 64 --head --folder DENSE

Every group of weights of a row, and the input of every token, have one scale: their largest
magnitude over --steps. The texts are those of the comparison with other tools; --folder is another
model to run on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "readers"))

from protocol import load, perplexity


def rounded(values: Tensor, steps: float, group: int = 0) -> Tensor:
    """`values` with one scale for each `group` entries of the last dimension; 0 for all of them.

    127 `steps` are 8 bits, and 7.5 are 4 bits, -8 to 7.
    """
    parts = values.unflatten(-1, (-1, group or values.shape[-1]))
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / steps
    whole = (parts / scale).round().clamp(-ceil(steps), floor(steps))
    return (whole * scale).flatten(-2)


def rounded_input(outliers: float, module: nn.Module, given: tuple[Tensor, ...]) -> Any:
    """The input in 8 bits, but for channels with a value of at least `outliers`, if that is not 0.

    Source: arXiv 2208.07339 (LLM.int8()).
    """
    (states,) = given
    kept = (states.abs() >= outliers).flatten(0, -2).any(dim=0) & bool(outliers)
    return (torch.where(kept, states, rounded(torch.where(kept, 0, states), 127)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("probe", type=Path, help="probe.json of a model")
    parser.add_argument("--folder", default="", help="another model")
    parser.add_argument("--steps", type=float, default=127, help="of weights: 127 or 7.5")
    parser.add_argument("--group", type=int, default=0, help="weights with one scale; 0: a row")
    parser.add_argument("--head", action="store_true", help="the head keeps its weights")
    parser.add_argument("--inputs", action="store_true", help="also rounds inputs to 8 bits")
    parser.add_argument("--outliers", type=float, default=0, help="input channels not rounded")
    arguments = parser.parse_args()
    probe = json.loads(arguments.probe.read_text())
    model = load(arguments.folder or probe["folder"])
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if arguments.head:
        maps = [module for module in maps if module is not model.get_output_embeddings()]

    @torch.no_grad()
    def measured() -> float:
        return perplexity(
            probe["windows"], lambda ids: model(torch.tensor([ids])).logits[0].float().numpy()
        )

    dense = measured()
    for module in maps:  # a head that is tied to the embeddings gets weights of its own
        weight = rounded(module.weight.detach(), arguments.steps, arguments.group)
        module.weight = nn.Parameter(weight)
    print(f"weights: {measured() / dense:.4f} x the perplexity")
    if arguments.inputs:
        for module in maps:
            module.register_forward_pre_hook(partial(rounded_input, arguments.outliers))
        print(f"weights and inputs: {measured() / dense:.4f} x")


if __name__ == "__main__":
    main()
