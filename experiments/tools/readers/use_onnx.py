"""ONNX, by optimum-onnx: exports the folder, saves it, and runs it in onnxruntime."""

from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from protocol import Request, tokenized, with_transformers

request = Request.read()
folder = Path(request.work) / "onnx"
ORTModelForCausalLM.from_pretrained(request.folder, export=True).save_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder)
request.report("float32", prompt_ids=tokenized(request), **with_transformers(model, request))
