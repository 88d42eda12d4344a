"""What a student's hidden states or logits miss of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

States = Float[Tensor, "*batch hidden"]
Loss = Callable[[States, States], Float[Tensor, ""]]
"""(student, teacher) -> mean over tokens, float32."""

LOSSES = ("kl", "mse", "cosine", "mix")
_BLOCK = 512  # tokens whose logits over the vocabulary exist at a time


def kl(student: States, teacher: States, temperature: float = 1.0) -> Float[Tensor, ""]:
    """KL( softmax(teacher / T) || softmax(student / T) ) over channels, mean over tokens, nats.

    A constant added to all channels of a token changes nothing, and a channel far above the others
    makes both distributions nearly one-hot.

    Source: arXiv 2510.15304; direction and T are our choice.
    """
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean()


def mse(student: States, teacher: States) -> Float[Tensor, ""]:
    """|student - teacher|^2 / |teacher|^2, mean over tokens.

    Relative, because a few tokens have states a hundred times larger than the rest and every layer
    behind normalises them.

    Source: this project.
    """
    gap = (student.float() - teacher.float()).square().sum(dim=-1)
    return (gap / teacher.float().square().sum(dim=-1).clamp_min(1e-12)).mean()


def cosine(student: States, teacher: States) -> Float[Tensor, ""]:
    """1 - cos(student, teacher), mean over tokens, in [0, 2]."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def check_temperature(temperature: float) -> float:
    """Raises ValueError unless above 0."""
    if not temperature > 0:
        raise ValueError(f"distill.temperature={temperature}: must be above 0")
    return temperature


def hidden_loss(name: str, weights: Mapping[str, float], temperature: float) -> Loss:
    """The loss of a name; "mix" is the sum of those with a weight, times it.

    Raises:
        ValueError: an unknown name, weights that are none, or a temperature that is not above 0.
    """
    check_temperature(temperature)
    parts: dict[str, Loss] = {"kl": partial(kl, temperature=temperature), "mse": mse}
    parts["cosine"] = cosine
    if name in parts:
        return parts[name]
    if name != "mix":
        raise ValueError(f"distill.loss={name!r}: allowed are {', '.join(LOSSES)}")
    unknown = sorted(set(weights) - set(parts))
    if unknown or not weights or min(weights.values()) < 0 or not any(weights.values()):
        raise ValueError(
            f"distill.loss_weights={dict(weights)}: weights >= 0, one at least above 0, of "
            f"{', '.join(parts)}"
        )
    return partial(_mix, terms=[(weight, parts[key]) for key, weight in weights.items() if weight])


def _mix(student: States, teacher: States, terms: Sequence[tuple[float, Loss]]) -> Tensor:
    return torch.stack([weight * loss(student, teacher) for weight, loss in terms]).sum()


def logit_kl(
    head: nn.Module, student: States, teacher_head: nn.Module, teacher: States, temperature: float
) -> Float[Tensor, ""]:
    """KL of the heads' distributions over the vocabulary, mean over tokens, nats.

    In blocks of tokens that are computed again for the gradient, so that the logits of all tokens
    never exist together.

    Args:
        head: the student's map to logits.
        student: states behind its final norm.
        teacher_head: the teacher's.
        teacher: states behind its final norm.
        temperature: T.
    """

    def block(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(other)
        return kl(head(own), wanted, temperature) * len(own)

    total = torch.zeros((), device=student.device)
    pairs = zip(
        student.flatten(0, -2).split(_BLOCK), teacher.flatten(0, -2).split(_BLOCK), strict=True
    )
    for own, other in pairs:
        total = total + checkpoint(block, own, other, use_reentrant=False)
    return total / student.flatten(0, -2).shape[0]


def task_loss(head: nn.Module, states: States, ids: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy of every token but the first of each window, mean, nats, in blocks.

    Args:
        head: the map to logits.
        states: behind the final norm, [batch, seq, hidden].
        ids: the windows, [batch, seq].
    """

    def block(own: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(head(own).float(), wanted, reduction="sum")

    flat, wanted = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    total = torch.zeros((), device=states.device)
    for own, target in zip(flat.split(_BLOCK), wanted.split(_BLOCK), strict=True):
        total = total + checkpoint(block, own, target, use_reentrant=False)
    return total / len(wanted)
