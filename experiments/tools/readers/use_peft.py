"""PEFT: a LoRA adapter that is trained, merged, and saved; the result is read again."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from protocol import Request, load, with_transformers

request = Request.read()
torch.manual_seed(0)
config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(load(request.folder), config)
request.report("float32", note="new adapter", **with_transformers(model, request))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for ids in request.windows[:4]:
    batch = torch.tensor([ids])
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
trained = with_transformers(model, request)
folder = Path(request.work) / "merged"
model.merge_and_unload().save_pretrained(folder)
request.report(
    "float32",
    note="trained, merged, saved",
    expected=trained,
    **with_transformers(load(folder), request),
)
