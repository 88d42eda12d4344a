"""Selects the parameters of a student that are trained, and adds and merges LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from come.models.adapter import ModelAdapter
from come.models.layout import Part

TRAIN = ("layers", "norms", "outputs", "lora")


def check_train(train: str) -> str:
    """Raises ValueError unless `train` is one of `TRAIN`."""
    if train not in TRAIN:
        raise ValueError(f"distill.train={train!r}: allowed are {', '.join(TRAIN)}")
    return train


def check_rank(rank: Any) -> int | Literal["auto"]:
    """Raises ValueError unless `rank` is an integer above 0 or "auto"."""
    if rank == "auto":
        return "auto"
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"distill.lora_rank={rank}: must be a whole number above 0, or auto")
    return rank


def choose_parameters(
    student: ModelAdapter,
    layers: Iterable[int],
    train: str,
    lora_rank: int | Literal["auto"] = "auto",
    seed: int = 0,
) -> None:
    """Freezes all parameters of the student except the chosen ones of the given layers.

    Args:
        student: the model; with "lora", adapters are added to its linear layers in place.
        layers: indices of the layers to train.
        train: "layers" for all of their weights, "norms", "outputs" for the output projections, or
            "lora" for adapters.
        lora_rank: rank of the adapters, or "auto" (see `equal_rank`).
        seed: seed of the adapters' initial weights.
    """
    layers = sorted(layers)
    student.model.requires_grad_(False)
    if train == "lora":
        add_lora(student, layers, equal_rank(student, layers, len(layers), lora_rank), seed)
        return
    for index in layers:
        choose_in_layer(student, index, student.layers[index], train)


def choose_in_layer(student: ModelAdapter, index: int, layer: nn.Module, train: str) -> None:
    """Sets which weights of a copy of layer `index` train: all ("layers"), "norms" or "outputs"."""
    roles, outputs = student.roles(index), student.output_tensors(index)
    for name, parameter in layer.named_parameters():
        trains = {
            "layers": True,
            "norms": roles[name].part is Part.NORM,
            "outputs": name in outputs,
        }
        parameter.requires_grad_(trains[train])


def equal_rank(
    student: ModelAdapter,
    layers: Sequence[int],
    merged: int,
    rank: int | Literal["auto"] = "auto",
) -> int:
    """`rank`, or for "auto" the rank at which adapters have as many parameters as whole layers.

    "auto" solves for r, rounded to an integer of at least 1:

        sum over the linear layers of `layers` of r (d_in + d_out) = parameters of `merged` layers
    """
    if rank != "auto":
        return rank
    parameters = merged * sum(p.numel() for p in student.layers[0].parameters())
    maps = [module for _, module in linear_maps(student, layers)]
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in maps)))


def linear_maps(student: ModelAdapter, layers: Iterable[int]) -> list[tuple[str, nn.Linear]]:
    """All linear layers in the given decoder layers, with their full names."""
    return [
        (f"{student.layout.stack}.{index}.{name}", module)
        for index in layers
        for name, module in student.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]


def add_lora(student: ModelAdapter, layers: Iterable[int], rank: int, seed: int) -> None:
    """Adds adapters W + (alpha / r) B A to the linear layers of some decoder layers; alpha = 2 r.

    B is initialised to 0. A is drawn with `seed`, independently of the global random state.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    names = "|".join(re.escape(name) for name, _ in linear_maps(student, layers))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({names})")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student.model)


def merge_lora(student: ModelAdapter) -> None:
    """Merges the adapters into the weights, removes them, and freezes the model, in place."""
    from peft.tuners.lora import LoraLayer

    model = student.model
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    model.requires_grad_(False)
