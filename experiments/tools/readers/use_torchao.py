"""torchao: weights in 8 bits, by its configuration in transformers; saved and read again."""

from pathlib import Path

import torch
from protocol import Request, load, with_transformers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

request = Request.read()
rounded = load(request.folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
found = with_transformers(rounded, request)
request.report("8 bits", **found)
folder = Path(request.work) / "int8"
rounded.save_pretrained(folder)
again = load(folder, torch_dtype=torch.float32)
request.report("8 bits", note="saved", expected=found, **with_transformers(again, request))
