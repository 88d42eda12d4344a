"""Memory of healing a large model, with the dense model in memory or its states on disk.

    python experiments/distill/large_models.py --shape mistral7b --target 24

Computed from the shapes of all weights, without weights: bfloat16, with trained weights, their
gradients and the optimiser's states in float32, without activations. The merged layers are spread
evenly over the depth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import MistralForCausalLM, PretrainedConfig

from come.distill.memory import TrainingMemory, parameter_memory
from come.distill.optimizers import OPTIMIZERS
from come.distill.trainable import choose_parameters
from come.models.adapter import ModelAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import SHAPES, random_config

CHOICES = (("merged", "layers"), ("neighbours", "layers"), ("all", "norms_outputs"),
           ("all", "lora"), ("all", "layers"))  # fmt: skip


def student_memory(
    config: PretrainedConfig, merged: int, layers: str, train: str, rank: int, optimizer: str
) -> TrainingMemory:
    """The training memory of a model with `merged` merged layers, without a teacher."""
    with torch.device("meta"):
        model = MistralForCausalLM(config).to(torch.bfloat16)
    model.tie_weights()
    step = config.num_hidden_layers / merged
    places = [int(step * (index + 0.5)) for index in range(merged)]
    choose_parameters(ModelAdapter(model), places, train, rank, layers=layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return parameter_memory([model], optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="mistral7b", choices=SHAPES)
    parser.add_argument("--target", type=int, default=24, help="layers of the merged model")
    parser.add_argument("--merged", type=int, default=4, help="its merged layers")
    parser.add_argument("--rank", type=int, default=32, help="rank of LoRA")
    arguments = parser.parse_args()
    config = random_config(arguments.shape)
    dense = config.num_hidden_layers
    with torch.device("meta"):
        teacher = sum(p.numel() for p in MistralForCausalLM(config).parameters()) * 2
    print(f"{arguments.shape}, {dense} -> {arguments.target} layers, {arguments.merged} merged\n")
    print("| trained | optimiser | parameters | live teacher | stored teacher | |")
    print("|---|---|---:|---:|---:|---:|")
    for layers, train in CHOICES:
        for optimizer in OPTIMIZERS[:2]:
            config.num_hidden_layers = arguments.target
            found = student_memory(
                config, arguments.merged, layers, train, arguments.rank, optimizer
            )
            stored = found.weights + found.gradients + found.optimizer
            print(
                f"| `{train}` of `{layers}` | {optimizer} | {found.parameters / 1e6:,.0f} M | "
                f"{(stored + teacher) / 1e9:.1f} GB | {stored / 1e9:.1f} GB | "
                f"{stored / (stored + teacher):.2f} x |"
            )


if __name__ == "__main__":
    main()
