"""Perplexity with the inputs of all linear maps rounded to 8 bits, as runtimes in 8 bits do.

    python experiments/tools/rounded_inputs.py runs/tools/models/smollm2/probe.json
    python experiments/tools/rounded_inputs.py runs/tools/models/smollm2/probe.json --folder DENSE

A row of a weight matrix and the input of a token each have one scale, their largest magnitude over
127. The texts are those of the comparison with other tools; --folder is another model to run on
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "readers"))

from protocol import load, perplexity


def rounded(values: Tensor) -> Tensor:
    """`values` with 8 bits for each row of the last dimension."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (values / scale).round() * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("probe", type=Path, help="probe.json of a model")
    parser.add_argument("--folder", default="", help="another model")
    arguments = parser.parse_args()
    probe = json.loads(arguments.probe.read_text())
    model = load(arguments.folder or probe["folder"])
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def measured() -> float:
        return perplexity(
            probe["windows"], lambda ids: model(torch.tensor([ids])).logits[0].float().numpy()
        )

    dense = measured()
    for module in maps:  # a head that is tied to the embeddings gets weights of its own
        module.weight = nn.Parameter(rounded(module.weight.detach()))
    print(f"weights: {measured() / dense:.4f} x the perplexity")
    for module in maps:
        module.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
    print(f"weights and inputs: {measured() / dense:.4f} x")


if __name__ == "__main__":
    main()
