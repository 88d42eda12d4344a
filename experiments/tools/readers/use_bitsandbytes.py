"""bitsandbytes: weights in 8 and in 4 bits (NF4), by its configuration in transformers."""

import torch
from protocol import Request, load, with_transformers
from transformers import BitsAndBytesConfig

FORMS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}
request = Request.read()
for form, config in FORMS.items():
    model = load(request.folder, quantization_config=config, device_map="cpu")
    request.report(form, **with_transformers(model, request))
