"""OpenVINO, by optimum-intel: exports the folder, saves it, and runs what was saved."""

from pathlib import Path

from optimum.intel import OVModelForCausalLM
from protocol import Request, tokenized, with_transformers

request, options = Request.read(), {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
folder = Path(request.work) / "openvino"
OVModelForCausalLM.from_pretrained(
    request.folder, export=True, load_in_8bit=False, **options
).save_pretrained(folder)
model = OVModelForCausalLM.from_pretrained(folder, **options)
request.report("float32", prompt_ids=tokenized(request), **with_transformers(model, request))
