"""onnxruntime-genai: its model builder writes ONNX from the folder, in float32 and in 4 bits."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai
from protocol import Request, command, perplexity

request = Request.read()


def run(folder: Path, form: str) -> None:
    """Reports what onnxruntime-genai computes."""
    model = onnxruntime_genai.Model(str(folder))

    def generator(length: int):
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        return onnxruntime_genai.Generator(model, parameters)

    def logits(ids: list[int]):
        running, rows = generator(len(ids) + 1), []
        for token in ids:
            running.append_tokens(np.array([[token]], dtype=np.int32))
            rows.append(np.asarray(running.get_logits()).reshape(-1))
        return np.stack(rows)

    tokens = []
    for ids in request.prompt_ids:
        running = generator(len(ids) + request.new_tokens)
        running.append_tokens(np.array([ids], dtype=np.int32))
        while not running.is_done():
            running.generate_next_token()
        tokens.append(running.get_sequence(0)[len(ids) :])
    request.report(form, tokens=tokens, perplexity=perplexity(request.windows, logits))


for form, precision in {"float32": "fp32", "4 bits": "int4"}.items():
    folder = Path(request.work) / precision
    command(
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", request.folder,
        "-o", folder, "-p", precision, "-e", "cpu", "-c", Path(request.work) / "cache",
    )  # fmt: skip
    run(folder, form)
