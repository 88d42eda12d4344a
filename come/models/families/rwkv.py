"""RWKV-4: a linear recurrence mixes tokens, then a gated MLP mixes channels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.changes import opaque
from come.models.families.embedding_norm import move_embedding_norm
from come.models.families.mixers import whole_mixer
from come.models.families.parts import Family, Preparation, ffn, same_layers
from come.models.layout import Norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from come.models.layout import ModelLayout

DECODER, NORM = "rwkv", "pre_ln"


def rwkv(config: PretrainedConfig) -> ModelLayout:
    """RWKV-4: time mixing, then channel mixing, both kept whole.

    All of their units read the same mixture of a token and the one before it, whose weights are one
    vector of a layer, and a norm cannot absorb them. The output of channel mixing is multiplied by
    a gate, sigmoid(R n_t), channel by channel.

    Raises:
        ValueError: the recurrence has another width than the residual stream.
    """
    if config.attention_hidden_size != config.hidden_size:
        raise ValueError(
            f"this RWKV has attention_hidden_size={config.attention_hidden_size}, and transformers "
            f"keeps states for hidden_size={config.hidden_size} only"
        )
    width = config.hidden_size
    mixer = whole_mixer("attention", width, output="output", norm=Norm("ln1"), returns=2)
    module = "feed_forward"
    mixing = ffn(
        config.intermediate_size,
        inputs=(f"{module}.key",),
        output=f"{module}.value",
        norm=Norm("ln2"),
        silenced=((module, 2),),
    )
    mixing = replace(opaque(mixing, module), channel_gate=f"{module}.receptance")
    names = {"stack": f"{DECODER}.blocks", "final_norm": f"{DECODER}.ln_out"}
    # With a batch, transformers adds states of [batch, hidden] to tokens of [batch, 1, hidden].
    return same_layers(config, mixer, mixing, **names, returns=3, one_sequence=True)


def prepare(model: PreTrainedModel) -> None:
    """Makes all layers alike; the logits stay the same, and so do the names in checkpoints.

    The norm of the embeddings leaves the first layer. Outputs and states are no longer halved every
    few layers, which protects float16 from overflow: the factors are those of places in the
    original depth. `rescale_every` becomes 0, which transformers reads as never.
    """
    decoder: Any = model.get_submodule(DECODER)
    if decoder.layers_are_rescaled:  # by a forward pass in evaluation mode
        was_training, decoder.training = decoder.training, True
        decoder._rescale_layers()
        decoder.training = was_training
    model.config.rescale_every = 0
    move_embedding_norm(decoder, decoder.embeddings, decoder.blocks, NORM)


FAMILIES: dict[str, Family] = {"rwkv": rwkv}
PREPARED: dict[str, Preparation] = {"rwkv": prepare}
