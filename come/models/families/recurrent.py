"""Recurrences without state spaces, and models that run through their layers differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families.mixers import layers_of, mixer
from come.models.families.parts import Family, attention, ffn, same_layers
from come.models.layout import Norm, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def recurrent_gemma(config: PretrainedConfig) -> ModelLayout:
    """RecurrentGemma: a gated linear recurrence or local attention, then an MLP.

    Units of the recurrence are the blocks of its block-diagonal gates.
    """
    norm, blocks = Norm("temporal_pre_norm", 1.0), config.num_attention_heads
    width = config.lru_width // blocks
    gates = ("input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias")
    recurrence = mixer(
        "temporal_block",
        unit="block",
        count=blocks,
        columns=width,
        inputs=(
            *(Rows(name, (width,)) for name in ("linear_y", "linear_x")),
            *(Rows(name, (width,), reads=False) for name in ("conv_1d", "rg_lru.recurrent_param")),
            *(Rows(f"rg_lru.{name}", reads=False) for name in gates),
        ),
        output="linear_out",
        norm=norm,
        returns=2,
    )
    mixers = {
        "linear_attention": recurrence,
        "sliding_attention": attention(config, module="temporal_block", norm=norm),
    }
    mlp = ffn(
        config.intermediate_size // 2,
        inputs=("mlp_block.gate_proj", "mlp_block.up_proj"),
        output="mlp_block.down_proj",
        norm=Norm("channel_pre_norm", 1.0),
        silenced=(("mlp_block", 0),),
    )
    kinds = config.layers_block_type
    names = {"final_norm": "model.final_norm", "logit_cap": config.logits_soft_cap or 0.0}
    return layers_of([(mixers[kind], mlp) for kind in kinds], kinds, **names)


def xlstm(config: PretrainedConfig) -> ModelLayout:
    """xLSTM: matrix memories, whose heads are units, then an MLP of rounded width.

    Raises:
        ValueError: projections are fused.
    """
    if config.weight_mode != "single":
        raise ValueError(
            f"this xLSTM has weight_mode={config.weight_mode!r}; supported is 'single'"
        )
    heads, hidden = config.num_heads, config.hidden_size
    keys = int(hidden * config.qk_dim_factor) // heads
    values = int(hidden * config.v_dim_factor) // heads
    sizes = {"q": keys, "k": keys, "v": values, "ogate_preact": values}
    memory = mixer(
        "mlstm_layer",
        unit="head",
        count=heads,
        columns=values,
        inputs=(
            *(Rows(name, (size,)) for name, size in sizes.items()),
            *(Rows(name) for name in ("igate_preact", "fgate_preact")),
            Rows("multihead_norm", (values,), reads=False),
        ),
        norm=Norm("norm_mlstm"),
        returns=2,
    )
    multiple = config.ffn_round_up_to_multiple_of
    mlp = ffn(
        -int(-hidden * config.ffn_proj_factor // multiple) * multiple,
        inputs=("ffn.proj_up_gate", "ffn.proj_up"),
        output="ffn.proj_down",
        norm=Norm("norm_ffn"),
        silenced=(("ffn", 0),),
    )
    names = {"stack": "backbone.blocks", "final_norm": "backbone.out_norm"}
    cap = config.output_logit_soft_cap or 0.0
    return same_layers(config, memory, mlp, **names, returns=2, logit_cap=cap)


FAMILIES: dict[str, Family] = {"recurrent_gemma": recurrent_gemma, "xlstm": xlstm}
