"""Other forms of decoder types, as keys of their small configurations."""

from __future__ import annotations

from typing import Any

from tests.decoder_configs import HYBRID, count, cycle, indices

ONE_GROUP = {"mamba_n_groups": 1}
DENSE_HYBRID = {
    "layers_block_type": cycle(*2 * ["linear_attention"], *2 * ["full_attention"], *2 * ["mlp"]),
}
DENSE_LAYERS = {"mlp_layer_types": cycle("dense"), "first_k_dense_replace": count}
BIASES = {
    "bamba": ("mamba_proj_bias", "attention_bias", "mlp_bias"),
    "falcon_h1": ("mamba_proj_bias", "attention_bias", "mlp_bias", "projectors_bias"),
    "lfm2": ("conv_bias",),
    "lfm3": ("conv_bias", "attention_bias"),
    "mamba": ("use_bias",),
    "mamba2": ("use_bias",),
    "minicpm3": ("attention_bias", "mlp_bias"),
    "olmo_hybrid": ("attention_bias",),
    "qwen3_5_text": ("attention_bias",),
    "recurrent_gemma": ("attention_bias",),
    "xlstm": ("use_bias",),
    "youtu": ("attention_bias",),
}
# Other forms of a model type, each with its keys.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}-biases": (name, dict.fromkeys(keys, True)) for name, keys in BIASES.items()},
    "axk1-dense": ("axk1", DENSE_LAYERS),
    "bailing_hybrid-dense": ("bailing_hybrid", {**DENSE_LAYERS, "layer_types": HYBRID}),
    "bamba-one_group": ("bamba", ONE_GROUP),
    "deepseek_v2-dense": ("deepseek_v2", DENSE_LAYERS),
    "deepseek_v2-greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "deepseek_v3-dense": ("deepseek_v3", DENSE_LAYERS),
    "deepseek_v3-one_group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "deepseek_v32-dense": ("deepseek_v32", DENSE_LAYERS),
    "falcon_h1-one_group": (
        "falcon_h1",
        {**ONE_GROUP, "mamba_rms_norm": False, "mamba_proj_bias": True},
    ),
    "gemma4_text-same_heads": (
        "gemma4_text",
        {"global_head_dim": 16, "num_global_key_value_heads": 2, "attention_k_eq_v": False},
    ),
    "glm4_moe_lite-dense": ("glm4_moe_lite", DENSE_LAYERS),
    "granitemoehybrid-dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "kimi_linear-dense": ("kimi_linear", DENSE_LAYERS),
    "lfm2_moe-no_bias": ("lfm2_moe", {"use_expert_bias": False}),
    "mamba2-one_group": ("mamba2", {"n_groups": 1}),
    "nemotron_h-dense": ("nemotron_h", DENSE_HYBRID),
    "qwen3_next-dense": ("qwen3_next", {"mlp_only_layers": indices(1)}),
}
