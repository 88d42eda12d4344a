"""Linear attention by the delta rule in most layers, and experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from come.models.families.experts import routed, shared
from come.models.families.latent import deepseek
from come.models.families.linear_attention import (
    QWEN_FFN_NORM,
    bailing_mixers,
    kimi_mixers,
    qwen3_5_mixers,
    qwen3_next_mixers,
)
from come.models.families.parts import Family, ffn
from come.models.families.sparse import all_sparse, in_steps, sparse_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout, Sublayer


def qwen3_next(config: PretrainedConfig) -> ModelLayout:
    """Qwen3-Next, some of whose layers may have an MLP instead of experts."""
    mlp = ffn(config.intermediate_size, norm=QWEN_FFN_NORM)
    mixers, experts = qwen3_next_mixers(config), _qwen_experts(config)
    return sparse_layers(config, in_steps(config), mixers, experts, mlp)


def qwen3_5_moe(config: PretrainedConfig) -> ModelLayout:
    """Qwen 3.5 with experts, also as the text model of a model with images."""
    text = config.get_text_config(decoder=True)
    return sparse_layers(text, all_sparse(text), qwen3_5_mixers(text), _qwen_experts(text))


def _qwen_experts(config: PretrainedConfig) -> tuple[Sublayer, ...]:
    """Routed experts, and a shared one whose output is multiplied by a gate."""
    return (
        routed(config.num_experts, config.moe_intermediate_size, norm=QWEN_FFN_NORM),
        shared(
            config.shared_expert_intermediate_size,
            "mlp.shared_expert",
            norm=QWEN_FFN_NORM,
            output_gate="mlp.shared_expert_gate",
        ),
    )


FAMILIES: dict[str, Family] = {
    "bailing_hybrid": partial(deepseek, mixers=bailing_mixers),
    "kimi_linear": partial(deepseek, mixers=kimi_mixers),
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_next": qwen3_next,
}
