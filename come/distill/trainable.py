"""Which parameters of a student train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from come.models.adapter import ModelAdapter, Part

TRAIN = ("layers", "norms", "outputs", "lora")


def check_train(train: str) -> str:
    """Raises ValueError unless `train` is one of `TRAIN`."""
    if train not in TRAIN:
        raise ValueError(f"distill.train={train!r}: allowed are {', '.join(TRAIN)}")
    return train


def check_rank(rank: Any) -> int | Literal["auto"]:
    """Raises ValueError unless a whole number above 0 or "auto"."""
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
    """Freezes the student but for parts of some layers.

    Args:
        student: the model; with "lora" its linear maps get adapters, in place.
        layers: which of its layers.
        train: "layers" for all of their weights, "norms", "outputs" for the output maps, "lora".
        lora_rank: rank of the adapters, or "auto" (see `equal_rank`).
        seed: of the adapters' first weights.
    """
    layers = sorted(layers)
    student.model.requires_grad_(False)
    if train == "lora":
        add_lora(student, layers, equal_rank(student, layers, len(layers), lora_rank), seed)
        return
    for index in layers:
        choose_in_layer(student, student.layers[index], train)


def choose_in_layer(student: ModelAdapter, layer: nn.Module, train: str) -> None:
    """Lets the weights of one layer train that "layers", "norms" or "outputs" ask for."""
    for name, parameter in layer.named_parameters():
        wanted = {
            "layers": True,
            "norms": student.roles[name].part is Part.NORM,
            "outputs": name in student.output_tensors(),
        }
        parameter.requires_grad_(wanted[train])


def equal_rank(
    student: ModelAdapter,
    layers: Sequence[int],
    merged: int,
    rank: int | Literal["auto"] = "auto",
) -> int:
    """`rank`, or for "auto" the one whose adapters have about as many parameters as whole layers.

    sum over the linear maps of `layers` of r (d_in + d_out) = parameters of `merged` layers
    """
    if rank != "auto":
        return rank
    wanted = merged * sum(p.numel() for p in student.layers[0].parameters())
    maps = [module for _, module in linear_maps(student, layers)]
    return max(1, round(wanted / sum(m.in_features + m.out_features for m in maps)))


def linear_maps(student: ModelAdapter, layers: Iterable[int]) -> list[tuple[str, nn.Linear]]:
    """All linear maps of some layers, with their full names."""
    return [
        (f"{student.architecture.layers}.{index}.{name}", module)
        for index in layers
        for name, module in student.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]


def add_lora(student: ModelAdapter, layers: Iterable[int], rank: int, seed: int) -> None:
    """Puts adapters W + (alpha / r) B A beside the linear maps of some layers; alpha = 2 r.

    B begins at zero; A is drawn anew from `seed`, whatever was drawn before.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    names = "|".join(re.escape(name) for name, _ in linear_maps(student, layers))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({names})")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student.model)


def merge_lora(student: ModelAdapter) -> None:
    """Adds the adapters to the weights and takes them away, in place."""
    from peft.tuners.lora import LoraLayer

    model = student.model
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    model.requires_grad_(False)
