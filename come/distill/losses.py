"""Distillation losses between hidden states or logits of student and teacher, and task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

States = Float[Tensor, "*batch hidden"]
Loss = Callable[[States, States], Float[Tensor, ""]]
"""(student, teacher) -> mean over tokens, float32."""

LOSSES = ("kl", "mse", "cosine", "mix")
_LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits in memory at a time. The C library reuses freed memory of up to 32 MB."""
_FEWEST = 64  # tokens at a time; fewer rows take a slower kernel in bfloat16 on the CPU


def kl(student: States, teacher: States, temperature: float = 1.0) -> Float[Tensor, ""]:
    """KL( softmax(teacher / T) || softmax(student / T) ) over channels, mean over tokens, nats.

    The loss ignores a constant added to all channels of a token. A channel much larger than the
    others makes both distributions nearly one-hot.

    Source: arXiv 2510.15304; direction and T are our choice.
    """
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean()


def mse(student: States, teacher: States) -> Float[Tensor, ""]:
    """|student - teacher|^2 / |teacher|^2, mean over tokens.

    The error is relative, because a few tokens have states a hundred times larger than the rest,
    and every downstream layer normalises its input.

    Source: this project.
    """
    gap = (student.float() - teacher.float()).square().sum(dim=-1)
    return (gap / teacher.float().square().sum(dim=-1).clamp_min(1e-12)).mean()


def cosine(student: States, teacher: States) -> Float[Tensor, ""]:
    """1 - cos(student, teacher), mean over tokens, in [0, 2]."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def check_temperature(temperature: float) -> float:
    """Raises ValueError unless `temperature` is above 0."""
    if not temperature > 0:
        raise ValueError(f"distill.temperature={temperature}: must be above 0")
    return temperature


def hidden_loss(name: str, weights: Mapping[str, float], temperature: float) -> Loss:
    """The loss between hidden states with the given name; "mix" is the sum weighted by `weights`.

    Raises:
        ValueError: the name is unknown, the weights of "mix" are invalid, or the temperature is
            not above 0.
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
    """KL( softmax(teacher's logits / T) || softmax(student's logits / T) ), mean over tokens, nats.

    The KL is exact, over the whole vocabulary. Logits are computed in blocks of tokens, and the
    gradient with respect to the states is computed with them, so the logits of all tokens are
    never in memory together, and none are computed again in the backward pass.

    Args:
        head: the student's LM head; gradients flow to its trained parameters.
        student: the student's states after its final norm.
        teacher_head: the teacher's LM head.
        teacher: the teacher's states after its final norm.
        temperature: T.
    """
    trained = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    own, other = student.flatten(0, -2), teacher.flatten(0, -2)
    loss: Tensor = _LogitKL.apply(own, other, head, teacher_head, temperature, *trained)
    return loss


class _LogitKL(torch.autograd.Function):
    """`logit_kl` of states [tokens, hidden], whose gradient is computed in the forward pass.

    With logits z, student's distribution q, teacher's distribution p and N tokens:

        dL/dz = (q - p) / (T N)
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: nn.Module,
        teacher_head: nn.Module,
        temperature: float,
        *trained: Tensor,
    ) -> Tensor:
        wants = ctx.needs_input_grad[0] or bool(trained)
        total = torch.zeros((), device=student.device)
        gradients: list[Tensor] = []
        sums = [torch.zeros_like(parameter) for parameter in trained]
        size = _block(head, student.device)
        for own, other in zip(student.split(size), teacher.split(size), strict=True):
            expected = _log_softmax(teacher_head(other), temperature)
            with torch.set_grad_enabled(wants):
                own = own.detach().requires_grad_(wants)
                logits = head(own)
            found = _log_softmax(logits.detach(), temperature)
            shares = expected.exp()
            total += torch.linalg.vecdot(shares, expected.sub_(found)).sum()
            if wants:
                slope = found.exp_().sub_(shares)
                inputs = (own, *trained)
                first, *others = torch.autograd.grad(logits, inputs, slope.to(logits.dtype))
                gradients.append(first)
                for summed, more in zip(sums, others, strict=True):
                    summed += more
        saved = [*([torch.cat(gradients)] if wants else []), *sums]
        ctx.save_for_backward(*(tensor.div_(temperature * len(student)) for tensor in saved))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        states, *trained = (slope.to(saved.dtype) * saved for saved in ctx.saved_tensors)
        return states, None, None, None, None, *trained


def _block(head: nn.Module, device: torch.device) -> int:
    """Number of tokens whose logits are in memory at a time."""
    vocabulary = max(parameter.shape[0] for parameter in head.parameters())
    return max(_FEWEST, _LOGITS[device.type] // vocabulary)


def _log_softmax(logits: Tensor, temperature: float) -> Float[Tensor, "tokens vocab"]:
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return functional.log_softmax(scaled, dim=-1)


def task_loss(head: nn.Module, states: States, ids: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy over all tokens but the first of each window, nats, in blocks of tokens.

    Args:
        head: the LM head.
        states: hidden states after the final norm, [batch, seq, hidden].
        ids: token ids of the windows, [batch, seq].
    """

    def block(own: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(head(own).float(), target, reduction="sum")

    flat, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    total = torch.zeros((), device=states.device)
    size = _block(head, states.device)
    for own, target in zip(flat.split(size), targets.split(size), strict=True):
        total = total + checkpoint(block, own, target, use_reentrant=False)
    return total / len(targets)
