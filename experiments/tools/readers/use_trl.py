"""TRL: SFTTrainer evaluates the folder, trains it, and saves it; the result is read again."""

import math
from pathlib import Path

from datasets import Dataset
from protocol import Request, load, with_transformers
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

request = Request.read()
data = Dataset.from_dict({"input_ids": request.windows})
folder = Path(request.work) / "trained"
trainer = SFTTrainer(
    model=load(request.folder),
    processing_class=AutoTokenizer.from_pretrained(request.folder),
    train_dataset=data,
    eval_dataset=data,
    args=SFTConfig(
        output_dir=str(folder), max_steps=4, learning_rate=1e-4, use_cpu=True, report_to="none",
        per_device_train_batch_size=1, per_device_eval_batch_size=1, save_strategy="no",
        gradient_checkpointing=False, bf16=False,
    ),
)  # fmt: skip
tokens = sum(len(ids) - 1 for ids in request.windows)
losses = [trainer.evaluate(data.select([row]))["eval_loss"] for row in range(len(data))]
total = sum(loss * (len(ids) - 1) for loss, ids in zip(losses, request.windows, strict=True))
before = with_transformers(trainer.model, request)
request.report(
    "float32", tokens=before["tokens"], perplexity=math.exp(total / tokens), note="before training"
)
trainer.train()
trainer.save_model()
request.report(
    "float32",
    note="trained, saved",
    expected=with_transformers(trainer.model, request),
    **with_transformers(load(folder), request),
)
