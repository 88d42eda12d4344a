"""Decoder types that cannot be described as sublayers of one residual stream, and why."""

from __future__ import annotations

STREAMS = "it has several residual streams, which every layer mixes"

REFUSED: dict[str, str] = {
    "beam": "it scales the residual stream by a number that depends on the layer's place",
    "bitnet": "norms before its output projections couple all heads, and all channels of the MLP",
    "blt": "its layers are in four stacks, two of which read bytes and one patches",
    "deepseek_v4": STREAMS,
    "diffllama": "its attention depends on the layer's own index, which a merge changes",
    "doge": "it multiplies the residual stream itself by learned scales",
    "emu3": "transformers loads its text model alone, and cannot load it again once it is saved",
    "gemma3n": f"{STREAMS}, and inputs of its own for each layer",
    "gemma3n_text": f"{STREAMS}, and inputs of its own for each layer",
    "gpt_neox_japanese": "its last layer adds a bias outside the output projection of attention",
    "hrm_text": "it runs through its layers several times",
    "hy_v4": STREAMS,
    "inkling2_text": "its layers read the outputs of several earlier layers",
    "inkling_text": "a convolution over tokens follows every output projection",
    "jamba": "its configuration places attention and experts by periods, "
    "and cannot describe the layers that are left",
    "jetmoe": "its attention has experts for queries and outputs, in place of one projection",
    "longcat_flash": "the output of a layer's experts skips the second attention of that layer",
    "minimax": "its residual stream is what its norms return, scaled in every layer",
    "mllama": "its cross-attention layers run only for texts with images",
    "openai-gpt": "it normalises the residual stream itself after every sublayer",
    "qwen4_exp": STREAMS,
    "qwen4_exp_text": STREAMS,
    "zamba": "its attention layers share one transformer block",
    "zamba2": "its attention layers share transformer blocks, chosen by the layer's index",
    "zaya": "its layers scale the residual stream, and routers read the states of earlier routers",
}
"""Why types of decoders are not supported."""
