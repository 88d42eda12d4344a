"""Small random models of every causal decoder type that transformers can build.

No parameter is at its initial value: biases are not zero and the scales of norms are not one, so
that a test notices every tensor that is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from tests.decoder_configs import HEADS, KEYS, SIDE, SIZES, WIDTH
from tests.decoder_forms import FORMS

# Types that hold the decoder of another type, with the keys of their other parts.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dots3_note": (
        "dots3_note_text",
        {key: {"adapter_out_dim": WIDTH} for key in ("vision_config", "audio_config")},
    ),
    "emu3": ("emu3_text_model", {}),
    "fuyu": ("persimmon", {"image_size": 28, "patch_size": 4}),
    "gemma3": ("gemma3_text", {"vision_config": SIDE, "mm_tokens_per_image": 4}),
    "gemma4": (
        "gemma4_text",
        {"vision_config": {**SIDE, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4}},
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        {
            "vision_config": {
                **{"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16},
                **{"mm_posemb_size": 8, "output_proj_dims": WIDTH},
            }
        },
    ),
    "got_ocr2": (
        "qwen2",
        {"vision_config": {**SIDE, "mlp_dim": 16, "output_channels": 16, "window_size": 2}},
    ),
    "llama4": ("llama4_text", {}),
    "mllama": ("mllama_text_model", {}),
    "moss_transcribe_diarize": ("qwen3", {"audio_config": {**SIDE, "max_source_positions": 20}}),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "qwen4_exp": ("qwen4_exp_text", {}),
}

ENCODER_DECODER, ENCODER = "decoder of an encoder-decoder", "bidirectional encoder with an LM head"
NOT_DECODERS: dict[str, str] = {
    **dict.fromkeys(
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
        "prophetnet trocr whisper".split(),
        ENCODER_DECODER,
    ),
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert "
        "rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl "
        "xmod".split(),
        ENCODER,
    ),
    "cpmant": "prefix language model: a text given at once is read in both directions",
    "reformer": "hashed attention, whose chunks depend on later tokens",
    "xlnet": "permutation language model",
    "gpt-sw3": "another name of gpt2",
    "musicgen": "audio codes, several per position",
    "musicgen_melody": "audio codes, several per position",
    "git": "image captions by a BERT",
    "gemma4_assistant": "draft head that reads another model's states and cache",
    "gemma4_unified_assistant": "draft head that reads another model's states and cache",
}
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its decoder",
}


def small_config(model_type: str, layers: int = 4, **keys: object) -> PretrainedConfig:
    """The small configuration of a model type; `keys` replace keys of its decoder."""
    if model_type in WRAPPERS:
        text_type, others = WRAPPERS[model_type]
        keys = {"text_config": small_config(text_type, layers, **keys).to_dict(), **others}
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)}
    own = dict(KEYS.get(model_type, {}))
    layers = max(layers, own.pop("layers", 0))
    chosen = {k: v for k, v in SIZES.items() if k in known} | own | keys
    return config_class(**{k: v(layers) if callable(v) else v for k, v in chosen.items()})


DECODERS: dict[str, Callable[..., PretrainedConfig]] = {
    model_type: partial(small_config, model_type)
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type not in NOT_DECODERS and model_type not in NOT_BUILT
}

VARIANTS: dict[str, Callable[..., PretrainedConfig]] = {
    name: partial(small_config, model_type, **keys)
    for name, model_type, keys in (
        ("codegen-8-heads", "codegen", {"n_head": 8}),
        ("cohere-no-norms", "cohere", {"use_qk_norm": False}),
        (
            "falcon-alibi",
            "falcon",
            {
                **{"new_decoder_architecture": False, "parallel_attn": False},
                **{"alibi": True, "bias": True, "num_kv_heads": HEADS},
            },
        ),
        ("falcon-one-kv", "falcon", {"new_decoder_architecture": False, "multi_query": True}),
        ("falcon-one-norm", "falcon", {"num_ln_in_parallel_attn": 1}),
        ("gpt_bigcode-heads", "gpt_bigcode", {"multi_query": False}),
        ("gpt_neox-serial", "gpt_neox", {"use_parallel_residual": False}),
        ("persimmon-no-norms", "persimmon", {"qk_layernorm": False}),
        ("phi-norms", "phi", {"qk_layernorm": True}),
        ("stablelm-parallel", "stablelm", {"use_parallel_residual": True}),
        *((name, model_type, keys) for name, (model_type, keys) in FORMS.items()),
    )
}
"""Other forms of a type, whose layers have other tensors or another order."""

STEPS = ("dt_bias", "dt_proj.bias", "dt_proj_bias")
KEPT = ("time_decay", "time_mix_key", "time_mix_value", "time_mix_receptance")


def pico_decoder(
    model_type: str, layers: int = 4, seed: int = 0, **keys: object
) -> PreTrainedModel:
    """A small random model in float32, for evaluation.

    Args:
        model_type: a key of `DECODERS` or `VARIANTS`.
        layers: number of decoder layers; more if the type needs more to have all kinds of layer.
        seed: of all weights.
        keys: keys of the configuration that replace its own.
    """
    config = {**DECODERS, **VARIANTS}[model_type](layers=layers, **keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in saved]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_values(model, name, parameter, generator))
        for name in buffers:
            saved[name].copy_(random_buffer(name, saved[name], generator))
    return model


def random_values(
    model: nn.Module, name: str, initial: Tensor, generator: torch.Generator
) -> Tensor:
    """New values of a parameter; its initial values tell scales, biases and maps apart."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    noise = torch.randn(initial.shape, generator=generator)
    if leaf == "A_log":  # decay rates of a recurrence
        return torch.rand(initial.shape, generator=generator) * 2 - 1
    if name.endswith(STEPS):  # softplus of it is the step of a recurrence
        return torch.rand(initial.shape, generator=generator) * 2 - 2
    if bool((initial == 1).all()):
        return 1 + 0.3 * noise
    if "Norm" in type(owner).__name__ and leaf == "weight":  # the scale is 1 + weight
        return 0.3 * noise
    if initial.dim() < 2 or "bias" in leaf or leaf in KEPT:
        return initial + 0.1 * noise
    if isinstance(owner, nn.Embedding):
        return 0.3 * noise
    return noise / math.sqrt(inputs_of(owner, initial))


def inputs_of(owner: nn.Module, weight: Tensor) -> int:
    """Number of inputs that each output of a linear map adds up."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return weight[0].numel()
    return weight.shape[0 if isinstance(owner, Conv1D) else -1]


def random_buffer(name: str, initial: Tensor, generator: torch.Generator) -> Tensor:
    """New values of a saved buffer if it holds weights; its own values if it holds constants."""
    leaf = name.rpartition(".")[2]
    if leaf == "tid2eid":  # the experts of every token
        experts = SIZES["n_routed_experts"]
        order = torch.rand(len(initial), experts, generator=generator).argsort(dim=1)
        return order[:, : initial.shape[1]]
    if initial.is_floating_point() and leaf.endswith(("_bias", "_biases", "layer_scalar")):
        return initial + 0.1 * torch.randn(initial.shape, generator=generator)
    return initial
