"""A norm of the embeddings that is part of the first layer moves to the embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn


def move_embedding_norm(
    decoder: nn.Module, embeddings: nn.Module, layers: Iterable[nn.Module], name: str
) -> None:
    """Moves the norm, so that it stays where it is if the first layer is merged or removed.

    In checkpoints it keeps its name. A second call changes nothing.

    Args:
        decoder: holds `embeddings` and the layers, which it calls `embeddings` and `blocks`.
        embeddings: the module whose output is normed from now on.
        layers: the first one has the norm; each gets an identity, as any may become the first.
        name: of the norm in a layer.
    """
    layers = list(layers)
    norm = getattr(layers[0], name)
    if isinstance(norm, nn.Identity):
        return
    for layer in layers:
        setattr(layer, name, nn.Identity())
    setattr(embeddings, name, norm)
    embeddings.register_forward_hook(partial(_normed, name))
    decoder.register_state_dict_post_hook(partial(_as_stored, name))


def _normed(name: str, embeddings: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """The normed embeddings."""
    normed: Tensor = embeddings.get_submodule(name)(output)
    return normed


def _as_stored(
    name: str, decoder: nn.Module, tensors: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """Gives the norm of the embeddings its name in checkpoints."""
    own = f"{prefix}embeddings.{name}."
    for key in [key for key in tensors if key.startswith(own)]:
        tensors[f"{prefix}blocks.0.{name}.{key.removeprefix(own)}"] = tensors.pop(key)
