"""transformers, version 4.57 or 5: loads the folder."""

from protocol import Request, load, tokenized, with_transformers

request = Request.read()
model = load(request.folder)
request.report("float32", prompt_ids=tokenized(request), **with_transformers(model, request))
