"""lm-eval's command line: a task of log-likelihoods and one of greedy text, from local files.

lm-eval puts the begin token before a text itself, so a tokenizer that does so too must not.
"""

import json
import math
from pathlib import Path

from protocol import Request, command

request = Request.read()
work = Path(request.work)
TASKS = {
    "come_texts": (
        [{"text": text} for text in request.texts],
        {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "come_greedy": (
        [{"text": text} for text in request.prompts],
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
for name, more in {"come_texts": ",add_bos_token=False", "come_greedy": ""}.items():
    given = f"pretrained={request.folder},dtype=float32{more}"
    command(
        "lm_eval", "--model", "hf", "--model_args", given, "--tasks", name, "--include_path", work,
        "--device", "cpu", "--batch_size", "1", "--output_path", work / name, "--log_samples",
        HF_DATASETS_CACHE=str(work / "cache"),
    )  # fmt: skip
(results,) = (work / "come_texts").rglob("results_*.json")
bits = json.loads(results.read_text())["results"]["come_texts"]["bits_per_byte,none"]
size = sum(len(text.encode()) for text in request.texts)
tokens = sum(len(ids) - 1 for ids in request.windows)
(samples,) = (work / "come_greedy").rglob("samples_come_greedy_*.jsonl")
answers = sorted((json.loads(line) for line in samples.open()), key=lambda row: row["doc_id"])
request.report(
    "float32",
    continuations=[answer["resps"][0][0] for answer in answers],
    perplexity=math.exp(bits * math.log(2) * size / tokens),
)
