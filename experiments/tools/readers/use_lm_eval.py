"""lm-eval's command line: a task of log-likelihoods and one of greedy text, from local files."""

import json
import math
from pathlib import Path

from protocol import Request, command
from transformers import AutoTokenizer

request = Request.read()
work, tokenizer = Path(request.work), AutoTokenizer.from_pretrained(request.folder)
begin = tokenizer.bos_token_id
starts = [tokenizer.bos_token if ids[0] == begin else "" for ids in request.prompt_ids]
TASKS = {
    "come_texts": (
        [{"text": text} for text in request.texts],
        {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "come_greedy": (
        [{"text": start + text} for start, text in zip(starts, request.prompts, strict=True)],
        {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
            "generation_kwargs": {
                "until": [], "max_gen_toks": request.new_tokens, "do_sample": False,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}  # fmt: skip
for name, (documents, task) in TASKS.items():
    data = work / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    about = {"task": name, "dataset_path": "json", "test_split": "train"}
    files = {"dataset_kwargs": {"data_files": str(data)}}
    (work / f"{name}.yaml").write_text(json.dumps(about | files | task))
command(
    "lm_eval", "--model", "hf", "--model_args", f"pretrained={request.folder},dtype=float32",
    "--tasks", ",".join(TASKS), "--include_path", work, "--device", "cpu", "--batch_size", "1",
    "--output_path", work / "out", "--log_samples", HF_DATASETS_CACHE=str(work / "cache"),
)  # fmt: skip
(results,) = (work / "out").rglob("results_*.json")
bits = json.loads(results.read_text())["results"]["come_texts"]["bits_per_byte,none"]
size = sum(len(text.encode()) for text in request.texts)
tokens = sum(len(ids) - 1 for ids in request.windows)
(samples,) = (work / "out").rglob("samples_come_greedy_*.jsonl")
answers = sorted((json.loads(line) for line in samples.open()), key=lambda row: row["doc_id"])
request.report(
    "float32",
    continuations=[answer["resps"][0][0] for answer in answers],
    perplexity=math.exp(bits * math.log(2) * size / tokens),
)
