"""The jobs of the campaign: commands on a tiny random model, each with a stage of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

TEXT = [f"Line {i} of the text speaks of {i * i} layers in {i % 7} groups." for i in range(400)]
HELD_OUT = [f"Row {i} says that {i * 3} heads read {i % 11} tokens of it." for i in range(100)]
LAYERS, VOCABULARY = 6, 300


@dataclass(frozen=True)
class Workspace:
    """Folders of a campaign: the dense model, its texts, and a plan with solved tensors."""

    folder: Path

    @property
    def base(self) -> Path:
        """The dense model."""
        return self.folder / "base"

    @property
    def text(self) -> Path:
        """Calibration text."""
        return self.folder / "text.txt"

    @property
    def held_out(self) -> Path:
        """Evaluation text."""
        return self.folder / "held_out.txt"

    @property
    def merged(self) -> Path:
        """A finished run, whose plan and model other jobs read."""
        return self.folder / "merged"

    def create(self) -> None:
        """Writes the model and the texts; runs no job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text.write_text("\n".join(TEXT))
        self.held_out.write_text("\n".join(HELD_OUT))
        save_model(self.base)


def save_model(folder: Path, **config: object) -> None:
    """Saves a random LLaMA of 6 layers with a byte-level tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:20], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    shape: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            is_norm = "norm" in name
            parameter.copy_(
                1 + 0.3 * noise if is_norm else noise * 0.8 / parameter.shape[-1] ** 0.5
            )
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Scenario:
    """A command whose result must survive every fault.

    name: of the stage that it is about.
    words: overrides, without the folder of the run.
    sweep: whether it is a grid, whose jobs are in folders of their own.
    share: its share of the kills; 0 for jobs that run in new interpreters, which have kills of
        their own.
    """

    name: str
    words: tuple[str, ...]
    sweep: bool = False
    share: int = 4

    def command(self, folder: Path) -> list[str]:
        """The overrides of a run in `folder`."""
        if self.sweep:
            return [*self.words, f"hydra.sweep.dir={folder}", "-m"]
        return [*self.words, f"hydra.run.dir={folder}"]


def scenarios(work: Workspace) -> dict[str, Scenario]:
    """All jobs, by name."""
    model = ("model=local", f"model.path={work.base}")
    read = ("calibration=text_file", f"calibration.path={work.text}")
    sizes = ("calibration.num_samples=4", "calibration.seq_len=16")
    perplexity = (
        "eval=perplexity",
        f"eval.perplexity.path={work.held_out}",
        "eval.perplexity.seq_len=32",
        "eval.perplexity.max_tokens=256",
    )
    plain = (*model, *read, *sizes)
    both = ("eval=[perplexity,continuations]", *perplexity[1:], "eval.continuations.tokens=4")
    train = (
        "distill.tokens=640", "distill.seq_len=16", "distill.batch_size=4",
        "distill.validation_samples=2", "distill.checkpoint_every=2", "distill.validate_every=4",
    )  # fmt: skip
    found = [
        Scenario("memory", (*plain, "merge=come", "merge.target_layers=3", *perplexity)),
        Scenario(
            "disk",
            (
                *plain, "merge=come", "merge.target_layers=3", "model.weights=disk",
                "calibration.store=disk", *perplexity,
            ),
        ),
        Scenario("trials", (*plain, "merge=come_plus", "merge.target_layers=4", "eval=none")),
        Scenario("plan", (*model, "merge=from_plan", f"merge.plan={work.merged}/plan.json",
                          "eval=none"), share=3),
        Scenario(
            "shards",
            (
                *plain, "merge=come", "merge.save_at=[5,3]", "merge.shard_size=40KB", "eval=none",
                "model.weights=disk",
            ),
        ),
        Scenario("distill", (*plain, "merge=come", "merge.target_layers=4", "distill=come_sp",
                             *train, "eval=none")),
        Scenario("layerwise", (*plain, "merge=come", "merge.target_layers=4", "distill=come_mp",
                               *train, "eval=none"), share=2),
        Scenario("sampling", (*model, "calibration=self_generated", *sizes, "merge=come",
                              "merge.target_layers=4", "eval=none")),
        Scenario("evaluate", (*model, f"from_run={work.merged}", *both)),
        Scenario("dense", (*model, "merge=none", *both), share=2),
        Scenario("grid", (*plain, "merge=come", "merge.target_layers=4,5", "eval=none"),
                 sweep=True, share=2),
        Scenario("parallel", (*plain, "merge=come", "merge.target_layers=4,5", "eval=none",
                              "hydra/launcher=processes"), sweep=True, share=0),
    ]  # fmt: skip
    return {scenario.name: scenario for scenario in found}


def results(folder: Path) -> list[Path]:
    """The results of all jobs in a folder."""
    return sorted(path for path in folder.rglob("result.json") if path.is_file())


def read(path: Path) -> dict[str, object]:
    """A JSON file."""
    found: dict[str, object] = json.loads(path.read_text())
    return found
