"""Small models of other kinds than Llama: their configurations, and how each is trained.

Each has ten layers, so that 9, 8 and 7 layers are 90, 80 and 70% of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 4096
LAYERS = 10
HIDDEN = 192
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_ATTENTION = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class SmallModel:
    """A configuration, and the settings of its training.

    Attributes:
        model_type: the type in transformers.
        config: arguments of its configuration, for a number of layers.
        tokens: token budget.
        seq_len: tokens of a window.
        batch: windows of a step.
        learning_rate: the highest.
        bfloat16: whether matrix products run in bfloat16, where that is faster.
        forward: further arguments of the forward pass in training.
    """

    model_type: str
    config: Callable[[int], dict[str, Any]]
    tokens: int = 2_000_000
    seq_len: int = 256
    batch: int = 8
    learning_rate: float = 2e-3
    bfloat16: bool = False
    forward: tuple[tuple[str, Any], ...] = ()

    def arguments(self, layers: int = LAYERS) -> dict[str, Any]:
        """All arguments of the configuration."""
        return {**_COMMON, "num_hidden_layers": layers, **self.config(layers)}


def _moe(layers: int) -> dict[str, Any]:
    """Eight experts a layer and two for each token.

    Attention has the parameters of two experts, so that an expert of every layer has as many
    parameters as one of the ten layers.
    """
    return {
        **_ATTENTION,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN // 2,
        "intermediate_size": 2 * HIDDEN,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _mamba2(layers: int) -> dict[str, Any]:
    """Twelve heads in four groups, which are the units that merging chooses from."""
    return {
        "expand": 2,
        "num_heads": 12,
        "head_dim": 32,
        "n_groups": 4,
        "state_size": 32,
        "chunk_size": 32,
        "residual_in_fp32": True,
        "initializer_range": 0.02,  # by default 0.1, far from uniform predictions
    }


def _rwkv(layers: int) -> dict[str, Any]:
    """RWKV-4; outputs of later layers are not halved, which only float16 needs."""
    return {
        "attention_hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "context_length": 512,
        "rescale_every": 0,
    }


def _post_norm(layers: int) -> dict[str, Any]:
    """EXAONE 4 without windows: norms only after the sublayers, and over each head."""
    return {
        **_ATTENTION,
        "intermediate_size": 512,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * layers,
    }


MODELS = {
    "moe": SmallModel("qwen3_moe", _moe, bfloat16=True, forward=(("output_router_logits", True),)),
    "mamba2": SmallModel("mamba2", _mamba2, tokens=1_200_000),
    "rwkv": SmallModel("rwkv", _rwkv, tokens=1_200_000, seq_len=128, batch=16),
    "post_norm": SmallModel("exaone4", _post_norm, bfloat16=True),
}
"""The models by the name that commands take."""
