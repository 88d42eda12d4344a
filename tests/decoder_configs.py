"""Keys of small configurations of the causal decoder types, with nothing at its default.

A configuration is made of the keys of `SIZES` that its class has, and of the keys of its type in
`KEYS`. A value may be a `PerLayer`: a list or number that depends on the number of layers. The key
"layers" is the least number of layers that a type needs to have all its kinds of layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PerLayer = Callable[[int], Any]
VOCAB, WIDTH, HEADS, WINDOW = 96, 32, 4, 6


def cycle(*kinds: object) -> PerLayer:
    """One kind for each layer, repeated in this order."""
    return lambda layers: [kinds[i % len(kinds)] for i in range(layers)]


def first(kind: object, *others: object) -> PerLayer:
    """One kind for the first layer, and the others in turn for the rest."""
    return lambda layers: [kind, *cycle(*others)(layers - 1)]


def indices(period: int, offset: int = 0) -> PerLayer:
    """The indices of the layers `offset`, `offset + period`, and so on."""
    return lambda layers: list(range(offset, layers, period))


def count(layers: int) -> int:
    """The number of layers itself."""
    return layers


LOCAL = cycle("sliding_attention", "sliding_attention", "full_attention")
LINEAR = cycle("linear_attention", "linear_attention", "full_attention")
HYBRID = cycle(*2 * ["linear_attention"], *2 * ["full_attention"])
DENSE_FIRST = first("dense", "sparse")
INDEXED = cycle("indexed_attention")

# Keys that many types have, by their meaning.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), count),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "attention_heads": HEADS,
    "head_dim": 16,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff"), 40),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **{"eos_token_id": 2, "pad_token_id": 0},
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), WINDOW),
    **{"use_sliding_window": True, "max_window_layers": 2, "attention_chunk_size": WINDOW},
    # Mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 28),
    **{"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "first_k_dense_replace": 1},
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 1.7),
    "mlp_only_layers": [0],
    "num_dense_layers": 1,
    # Latent attention
    **{"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6},
    **{"v_head_dim": 10, "index_topk": WINDOW, "index_head_dim": 16, "index_n_heads": 16},
    # Linear attention and state spaces
    **{"linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 10},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_n_heads": 4},
    **{"mamba_d_head": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8, "chunk_size": 8},
    **{"n_groups": 2, "state_size": 8, "conv_kernel": 3, "time_step_rank": 4, "mamba_dt_rank": 4},
    # Multipliers
    **{"embedding_multiplier": 1.3, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    **{"logits_scaling": 1.6, "logit_scale": 0.6, "final_logit_softcapping": 5.0},
    **{"attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 12, "clip_qkv": 2.5},
    **{"swiglu_limit": 1.5, "swiglu_alpha": 1.5},
}


def rope(factor: float = 1.0, theta: float = 10000.0) -> dict[str, Any]:
    """Rotary embeddings of a part of the channels."""
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}


def local_rope(factor: float = 1.0) -> dict[str, Any]:
    """Different rotary embeddings of layers with and without a window."""
    return {
        "sliding_attention": rope(factor, 100.0),
        "full_attention": rope(factor),
    }


LONG_TEXTS = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **LONG_TEXTS,
}
YARN_ROPE = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, **LONG_TEXTS}
ALL_HEADS = {"num_key_value_heads": HEADS}
LATENT = {**ALL_HEADS, "mlp_layer_types": DENSE_FIRST}
GEMMA4 = {
    "layer_types": LOCAL,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "layers": 6,
}
GEMMA3N = {
    "layer_types": LOCAL,
    "layers": 6,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 12,
    "altup_num_inputs": 3,
    "altup_active_idx": 1,
    "num_kv_shared_layers": 2,
    "laurel_rank": 6,
    "activation_sparsity_pattern": first(0.9, 0.0),
    "intermediate_size": first(48, 40),
}
INKLING = {
    "layer_types": cycle("hybrid_sliding", "hybrid_sliding", "hybrid"),
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 12,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 8,
    "log_scaling_n_floor": 4,
    "unpadded_vocab_size": VOCAB - 6,
    "conv_kernel_size": 3,
}
QWEN_LINEAR = {"layer_types": HYBRID, "rope_parameters": rope(0.25)}
SIDE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BLT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
}

KEYS: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2, "mup_enabled": True},
    "apertus": {"rope_parameters": LLAMA3_ROPE},
    "axk1": LATENT,
    "axk2": {**LATENT, "layer_types": INDEXED, "gated_norm_rank": 6},
    "bailing_hybrid": {
        **LATENT,
        "layer_types": LINEAR,
        "layers": 6,
        "layer_group_size": 3,
        "short_conv_kernel_size": 3,
        "num_mtp_layers": 0,
    },
    "blt": {
        "local_attention_window_len": WINDOW,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": BLT,
        "encoder_config": {**BLT, "hidden_size_global": 48},
        "decoder_config": {**BLT, "hidden_size_global": 48, "num_hidden_layers": 2},
        "global_config": lambda layers: {**BLT, "hidden_size": 48, "num_hidden_layers": layers},
    },
    "beam": {"mlp_layer_types": DENSE_FIRST},
    "bamba": {"attn_layer_indices": [2, 3]},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"layer_types": LOCAL},
    "cohere2_moe": {
        "layer_types": LOCAL,
        "mlp_layer_types": DENSE_FIRST,
        "prefix_dense_intermediate_size": 44,
    },
    "cohere_compass_text": {"layer_types": LOCAL, "rope_parameters": local_rope()},
    "codegen": {"rotary_dim": 4},
    "cwm": {"layer_types": LOCAL, "rope_parameters": LLAMA3_ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.5, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {**ALL_HEADS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": ALL_HEADS,
    "deepseek_v32": {**LATENT, "layer_types": INDEXED},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": cycle(
            "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"
        ),
        "mlp_layer_types": first("hash_moe", "moe"),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 6,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {
        **LATENT,
        "layer_types": cycle(*2 * ["indexed_attention"], *2 * ["sliding_attention"]),
        **{"shared_experts_intermediate_size": 28, "swa_num_attention_heads": 2},
        **{"swa_num_key_value_heads": 2, "swa_q_lora_rank": 14, "swa_kv_lora_rank": 10},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 10, "swa_v_head_dim": 12},
    },
    "doge": {"keep_window_size": 8},
    "exaone4": {"layer_types": LOCAL},
    "exaone_moe": {"layer_types": LOCAL, "mlp_layer_types": DENSE_FIRST},
    "falcon": {"new_decoder_architecture": True, "multi_query": False, "ffn_hidden_size": 40},
    "falcon_h1": {
        **{"mamba_d_ssm": 64, "mamba_rms_norm": True, "lm_head_multiplier": 0.8},
        **{"mlp_multipliers": [0.9, 0.6], "key_multiplier": 0.7, "attention_out_multiplier": 0.8},
        **{"attention_in_multiplier": 1.2, "ssm_multipliers": [0.6, 0.7, 0.8, 0.9, 1.1]},
        **{"ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8},
    },
    "flint": {"layer_types": first("full_attention", "sliding_attention", "full_attention")},
    "gemma2": {"layer_types": LOCAL},
    "gemma3_text": {"layer_types": LOCAL, "rope_parameters": local_rope()},
    "gemma3n_text": GEMMA3N,
    "gemma4_text": {
        **GEMMA4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": GEMMA4,
    "glm4_moe": {"use_qk_norm": True},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": {**LATENT, "indexer_types": cycle("full")},
    "gpt_neo": {"attention_types": lambda layers: [[cycle("global", "local")(layers), 1]]},
    "gpt_neox_japanese": {"rope_parameters": rope(0.5)},
    "gpt_oss": {"rope_parameters": {**YARN_ROPE, "truncate": False}},
    "gptj": {"rotary_dim": 4},
    "granite_swa": {"layer_types": LOCAL, "layer_rope_theta": cycle(100.0, 100.0, 10000.0)},
    "granitemoe_swa": {"layer_types": LOCAL, "layer_rope_theta": cycle(100.0, 100.0, 10000.0)},
    "granitemoehybrid": {"layer_types": HYBRID, "position_embedding_type": "rope"},
    "helium": {"head_dim": 8},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2, "embedding_scale": 1.5},
    "hy_v3": {"mlp_layer_types": DENSE_FIRST},
    "hy_v4": {**LATENT, "indexer_types": cycle("full", "shared"), "hc_mult": 2},
    "inkling_text": {**INKLING, "mlp_layer_types": DENSE_FIRST, "logits_mup_width_multiplier": 1.6},
    "inkling2_text": {
        **INKLING,
        **{"n_layers_per_attn_res_block": 2, "qk_l2_clip_threshold": 2.0},
        **{"rel_l2_clip_threshold": 2.0, "mlp_gate_softcap": 1.5, "mlp_up_softcap": 2.0},
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {
        **LATENT,
        **{"layer_types": HYBRID, "layers": 6, "linear_head_dim": 8, "linear_num_heads": 4},
    },
    "laguna": {
        "layer_types": LOCAL,
        "mlp_layer_types": DENSE_FIRST,
        "num_attention_heads_per_layer": cycle(4, 4, 8),
        "moe_routed_scaling_factor": 1.7,
        "moe_router_logit_softcapping": 3.0,
    },
    "lfm2": {"full_attn_idxs": [2, 3], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": cycle("conv", "conv", "full_attention"), "layers": 6},
    "lfm3": {
        "layer_types": cycle(*2 * ["conv"], *2 * ["sliding_attention"], *2 * ["full_attention"]),
        "layers": 6,
        "conv_L_cache": 3,
    },
    "llama4_text": {
        "no_rope_layer_interval": 2,
        "moe_layers": indices(1, 1),
        "intermediate_size_mlp": 44,
        "floor_scale": 4,
    },
    "longcat_flash": {**ALL_HEADS, "head_dim": 8, "ffn_hidden_size": 40, "zero_expert_num": 4},
    "mllama_text_model": {"cross_attention_layers": [2]},
    "minicpm3": {**ALL_HEADS, "scale_emb": 3, "dim_model_base": 16},
    "mellum": {"layer_types": LOCAL, "mlp_layer_types": DENSE_FIRST},
    "mimo_v2_flash": {
        "layer_types": LOCAL,
        "mlp_layer_types": DENSE_FIRST,
        "rope_parameters": local_rope(0.5),
    },
    "minimax": {
        "layer_types": cycle("full_attention", "linear_attention", "linear_attention"),
        **{"block_size": 8, "full_attn_alpha_factor": 1.2, "full_attn_beta_factor": 0.8},
        **{"linear_attn_alpha_factor": 1.1, "linear_attn_beta_factor": 0.9},
        **{"mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.7},
    },
    "minimax_m3_vl_text": {
        "layer_types": cycle("minimax_m3_sparse", "minimax_m3_sparse", "full_attention"),
        "mlp_layer_types": DENSE_FIRST,
        "dense_intermediate_size": 44,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": LOCAL},
    "ministral3": {"rope_parameters": {**YARN_ROPE, "llama_4_scaling_beta": 0.1, "mscale": 1.0}},
    "modernbert-decoder": {"layer_types": LOCAL, "local_attention": 2 * WINDOW},
    "moshi": {"sliding_window": 64},  # only its cache has the window
    "mpt": {"attn_config": {"clip_qkv": 2.5, "softmax_scale": 0.3}},
    "nemotron_h": {
        "layers_block_type": cycle(
            *2 * ["linear_attention"], *2 * ["moe"], *2 * ["full_attention"], *2 * ["mlp"]
        ),
        **{"layers": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16},
        "moe_shared_expert_intermediate_size": 28,
    },
    "olmo3": {"layer_types": LOCAL, "rope_parameters": local_rope()},
    "olmo_hybrid": {"layer_types": HYBRID},
    "opt": {"word_embed_proj_dim": WIDTH},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "phi3": {"rope_parameters": rope(0.75)},
    "phi4_multimodal": {
        "rope_parameters": rope(0.75),
        "vision_config": {**SIDE, "crop_size": 28},
        "audio_config": {
            **{k: v for k, v in SIDE.items() if not k.startswith(("image", "patch"))},
            "num_blocks": 1,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "qwen2_moe": {"layer_types": LOCAL},
    "qwen3_5_moe_text": QWEN_LINEAR,
    "qwen3_5_text": QWEN_LINEAR,
    "qwen3_next": {**QWEN_LINEAR, "layers": 6},
    "qwen4_exp_text": {
        "layer_types": cycle("linear_attention", "linear_attention", "indexed_attention"),
        "rope_parameters": rope(0.5),
        **{"hc_count": 2, "hc_lowrank": 6, "ple_layer_ids": [2], "ple_embed_dim": 16},
        **{"heads_per_ngram": 2, "ngram_vocab_size_base": 50},
        **{"make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2, "indexer_n_heads": 2},
        **{"indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": WINDOW},
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        **{"lru_width": 24, "logits_soft_cap": 5.0, "conv1d_width": 3, "layers": 5},
        "block_types": [*2 * ["recurrent"], *2 * ["attention"]],
    },
    "rwkv": {"attention_hidden_size": WIDTH, "rescale_every": 2, "context_length": 64},
    "stablelm": {"use_qkv_bias": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "youtu": {**ALL_HEADS, "pad_token_id": None},  # loading sets the row of padding to zero
    "vaultgemma": {"layer_types": LOCAL},
    "xlstm": {
        "hidden_size": 64,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
        "gate_soft_cap": 3.0,
        "output_logit_soft_cap": 5.0,
    },
    "zamba": {"layers_block_type": cycle(*2 * ["linear_attention"], "hybrid"), "layers": 6},
    "zamba2": {
        "layers_block_type": cycle("linear_attention", "hybrid"),
        "layers": 8,
        **ALL_HEADS,
        **{"num_mem_blocks": 2, "mamba_ngroups": 2, "use_shared_attention_adapter": True},
        **{"adapter_rank": 4, "use_mem_rope": True},
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "router_hidden_size": 12,
        "layer_types": cycle("hybrid_sliding", "hybrid_sliding", "hybrid"),
    },
}
