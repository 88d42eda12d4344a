"""Heals a compressed model with transformers' Trainer, from its saved folder.

    python experiments/distill/hf_trainer.py runs/HASH/model --text my.txt --out healed
    python experiments/distill/hf_trainer.py runs/HASH/model --text my.txt --out healed --teacher ID

A beginning for recipes of one's own. Without --teacher the loss is that of the next token, with it
the KL divergence from the dense model's distribution. Arguments that are not listed are those of
TrainingArguments, such as --learning_rate 1e-4 --num_train_epochs 2. All weights train.

`come distill=heal` needs less memory: it stores the teacher's states and computes logits in blocks.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

RECIPE = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05, "logging_steps": 10, "save_strategy": "no", "report_to": "none",
}  # fmt: skip


class Windows(torch.utils.data.Dataset):
    """A text in windows of equal length, without the remainder."""

    def __init__(self, path: Path, tokenizer: Any, seq_len: int) -> None:
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        self.ids = torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class TeacherTrainer(Trainer):
    """Trains on the KL divergence from a teacher's distribution, mean over tokens, nats."""

    def __init__(self, teacher: PreTrainedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        **ignored: Any,
    ) -> Any:  # fmt: skip
        """KL( teacher || model ) on the windows of a batch."""
        outputs = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"]).logits
        own, wanted = (
            functional.log_softmax(logits.float(), dim=-1) for logits in (outputs.logits, wanted)
        )
        loss = (wanted.exp() * (wanted - own)).sum(dim=-1).mean()
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a compressed model")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the healed model")
    parser.add_argument("--teacher", default="", help="folder or id of the dense model")
    parser.add_argument("--seq-len", type=int, default=256)
    own, others = parser.parse_known_args()
    for name, value in RECIPE.items():
        if f"--{name}" not in others:
            others += [f"--{name}", str(value)]
    words = ["--output_dir", str(own.out), *others]
    (arguments,) = HfArgumentParser([TrainingArguments]).parse_args_into_dataclasses(words)
    model = AutoModelForCausalLM.from_pretrained(own.model)
    dtype = model.dtype
    model.float()
    tokenizer = AutoTokenizer.from_pretrained(own.model)
    given = {
        "model": model, "args": arguments, "processing_class": tokenizer,
        "train_dataset": Windows(own.text, tokenizer, own.seq_len),
    }  # fmt: skip
    if own.teacher:
        trainer = TeacherTrainer(AutoModelForCausalLM.from_pretrained(own.teacher), **given)
    else:
        trainer = Trainer(**given)
    trainer.train()
    model.to(dtype)
    trainer.save_model(str(own.out))
    for name in ("come", "README.md"):  # the plan and the card of the merge
        source, target = own.model / name, own.out / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
