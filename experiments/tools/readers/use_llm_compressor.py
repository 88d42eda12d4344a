"""llm-compressor: weights in 4 bits in groups of 64, saved and read again by transformers.

A group size has to divide the hidden size: 64 divides SmolLM2's 576, and the default 128 does not.
"""

from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from protocol import Request, load, with_transformers

request = Request.read()
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
model = load(request.folder)
oneshot(
    model=model,
    recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
)
found = with_transformers(model, request)
request.report("4 bits", **found)
folder = Path(request.work) / "w4a16"
model.save_pretrained(folder, save_compressed=True)
request.report("4 bits", note="saved", expected=found, **with_transformers(load(folder), request))
