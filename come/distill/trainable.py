"""Selects the parameters of a student that are trained, and adds and merges LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from come.models.adapter import ModelAdapter
from come.models.layout import Part

LAYERS = ("merged", "neighbours", "all", "model")
TRAIN = ("layers", "norms", "outputs", "norms_outputs", "lora")


def check_layers(layers: str, train: str) -> str:
    """Raises ValueError unless `layers` is one of `LAYERS`, and `train` possible with it."""
    if layers not in LAYERS:
        raise ValueError(f"distill.layers={layers!r}: allowed are {', '.join(LAYERS)}")
    if layers == "model" and train != "layers":
        raise ValueError(
            f"distill.layers=model trains all weights, and distill.train={train} only some; take "
            "distill.layers=all, or leave distill.train out"
        )
    return layers


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


def trained_layers(layers: str, merged: Iterable[int], depth: int) -> list[int]:
    """Indices of the layers to train.

    Args:
        layers: "merged", "neighbours" for those and the layers beside them, "all", or "model" for
            all layers, embeddings, final norm and head.
        merged: indices of the merged layers.
        depth: number of layers of the student.
    """
    chosen = set(range(depth)) if layers in ("all", "model") else set(merged)
    if layers == "neighbours":
        chosen |= {beside for k in chosen for beside in (k - 1, k + 1)} & set(range(depth))
    return sorted(chosen)


def choose_parameters(
    student: ModelAdapter,
    merged: Iterable[int],
    train: str,
    lora_rank: int | Literal["auto"] = "auto",
    seed: int = 0,
    layers: str = "merged",
) -> None:
    """Freezes all parameters of the student except the chosen ones.

    Args:
        student: the model; with "lora", adapters are added to its linear layers in place.
        merged: indices of the merged layers.
        train: "layers" for all weights of the layers, "norms", "outputs" for the output
            projections, "norms_outputs" for both, or "lora" for adapters.
        lora_rank: rank of the adapters, or "auto" (see `equal_rank`).
        seed: seed of the adapters' initial weights.
        layers: which layers, see `trained_layers`.
    """
    merged = sorted(merged)
    chosen = trained_layers(layers, merged, student.num_layers)
    student.model.requires_grad_(layers == "model")
    if train == "lora":
        add_lora(student, chosen, equal_rank(student, chosen, len(merged), lora_rank), seed)
        return
    for index in chosen:
        choose_in_layer(student, index, student.layers[index], train)


def choose_in_layer(student: ModelAdapter, index: int, layer: nn.Module, train: str) -> None:
    """Sets which weights of a copy of layer `index` train, see `choose_parameters`."""
    roles, outputs = student.roles(index), student.output_tensors(index)
    for name, parameter in layer.named_parameters():
        norm, output = roles[name].part is Part.NORM, name in outputs
        trains = {
            "layers": True, "norms": norm, "outputs": output, "norms_outputs": norm or output,
        }  # fmt: skip
        parameter.requires_grad_(trains[train])


def first_trained(student: ModelAdapter) -> int:
    """Index of the first layer with a trained parameter; 0 if the embeddings are trained."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in student.layers]
    embeds = any(p.requires_grad for p in student.model.get_input_embeddings().parameters())
    return 0 if embeds or not any(trained) else trained.index(True)


def layer_rates(
    student: ModelAdapter,
    prefix: str,
    names: Iterable[str],
    merged: Sequence[int],
    decay: float,
) -> dict[str, float]:
    """Factors decay^distance of the learning rate, by distance from the nearest merged layer.

    Embeddings are at the distance of a layer before the first one, final norm and head at that of
    a layer after the last one.

    Args:
        student: the model.
        prefix: what precedes the model's own names in `names`.
        names: names of the trained parameters.
        merged: indices of the merged layers.
        decay: the factor of one layer.
    """
    stack, embeds = f"{prefix}{student.layout.stack}.", student.model.get_input_embeddings()
    embedded = {f"{prefix}{name}" for name, module in student.model.named_modules()
                if module is embeds}  # fmt: skip
    found = {}
    for name in names:
        place = -1 if name.rpartition(".")[0] in embedded else student.num_layers
        if name.startswith(stack):
            place = int(name.removeprefix(stack).partition(".")[0])
        found[name] = decay ** min(abs(place - k) for k in merged)
    return found


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
