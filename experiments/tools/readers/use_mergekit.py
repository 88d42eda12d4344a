"""mergekit: averages the folder with itself, which changes nothing; the result is read again."""

import json
from pathlib import Path

from protocol import Request, command, load, tokenized, with_transformers

request = Request.read()
config, folder = Path(request.work) / "merge.yaml", Path(request.work) / "merged"
copy = Path(request.work) / "copy"  # mergekit refuses the same path twice
copy.symlink_to(request.folder)
models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (request.folder, copy)]
config.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
command("mergekit-yaml", config, folder, "--copy-tokenizer")
request.report(
    "float32", prompt_ids=tokenized(request, folder), **with_transformers(load(folder), request)
)
