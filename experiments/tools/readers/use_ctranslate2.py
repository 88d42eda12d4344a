"""CTranslate2: converts the folder, in float32 and with weights in 8 bits."""

import math
from pathlib import Path

import ctranslate2
from protocol import Request, command
from transformers import AutoTokenizer

request = Request.read()
tokenizer = AutoTokenizer.from_pretrained(request.folder)
for form, kind in {"float32": "float32", "8 bits": "int8_float32"}.items():
    folder = Path(request.work) / kind
    command(
        "ct2-transformers-converter", "--model", request.folder, "--output_dir", folder,
        "--quantization", kind,
    )  # fmt: skip
    model = ctranslate2.Generator(str(folder), compute_type=kind)
    results = model.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in request.prompt_ids],
        max_length=request.new_tokens,
        min_length=request.new_tokens,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    scores = model.score_batch([tokenizer.convert_ids_to_tokens(ids) for ids in request.windows])
    total = sum(sum(score.log_probs) for score in scores)
    request.report(
        form,
        tokens=[result.sequences_ids[0] for result in results],
        perplexity=math.exp(-total / sum(len(ids) - 1 for ids in request.windows)),
    )
