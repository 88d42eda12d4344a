"""Random pico models of every family and layout, built from configs, and shared fixtures."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")

import builtins

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import come.cli
from come.merge.apply import source_layers_of
from come.merge.operators.base import OPERATORS
from come.merge.reconstruction import ReconstructionTargets
from come.models.adapter import ModelAdapter
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.commands import ROOT, small_job_overrides, without_repeated
from tests.forkserver import ForkedRun, fixed_products

torch.set_num_threads(1)

# `make test-shapes` resolves annotations at run time. The package imports these names only for type
# checking, because importing transformers takes seconds.
for name in ("PretrainedConfig", "PreTrainedModel", "PreTrainedTokenizerBase"):
    setattr(builtins, name, getattr(transformers, name))

LAYERS, VOCAB, WINDOWS, SEQ = 6, 300, 5, 16
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA, GQA, HEAD = {"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"head_dim": 8}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama_mha": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE | MHA | k)),
    "llama_gqa": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE | GQA | k)),
    "llama_bias": lambda **k: LlamaForCausalLM(
        LlamaConfig(**SHAPE | GQA | {"attention_bias": True, "mlp_bias": True} | k)
    ),
    "llama_tied": lambda **k: LlamaForCausalLM(
        LlamaConfig(**SHAPE | GQA | {"tie_word_embeddings": True} | k)
    ),
    "mistral_gqa": lambda **k: MistralForCausalLM(
        MistralConfig(**SHAPE | GQA | {"sliding_window": None} | k)
    ),
    "mistral_sliding": lambda **k: MistralForCausalLM(
        MistralConfig(**SHAPE | GQA | {"sliding_window": 6} | k)
    ),
    "qwen2_gqa": lambda **k: Qwen2ForCausalLM(Qwen2Config(**SHAPE | GQA | k)),
    "qwen3_gqa": lambda **k: Qwen3ForCausalLM(Qwen3Config(**SHAPE | GQA | HEAD | k)),
    "qwen3_wide": lambda **k: Qwen3ForCausalLM(Qwen3Config(**SHAPE | GQA | {"head_dim": 16} | k)),
    "opt": lambda **k: OPTForCausalLM(
        OPTConfig(
            **{n: v for n, v in SHAPE.items() if n != "intermediate_size"}
            | {"ffn_dim": 24, "word_embed_proj_dim": 32, "dropout": 0.0}
            | k
        )
    ),
    "opt_nobias": lambda **k: FAMILIES["opt"](**{"enable_bias": False} | k),
}


SUMMARY = "printed"
"""A test property with this name is printed at the end, also under pytest-xdist."""


def pytest_terminal_summary(terminalreporter):
    """Prints the summaries that tests recorded."""
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for name, text in getattr(report, "user_properties", ()):
            if name == SUMMARY and getattr(report, "when", "") == "call":
                terminalreporter.write_sep("=", report.nodeid)
                terminalreporter.write_line(text)


def pico(family: str, seed: int = 0, **config: object) -> PreTrainedModel:
    """A random model; norms, biases and weights all differ from their defaults."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * 0.8 / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(3, VOCAB, (WINDOWS, SEQ), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pico LLaMA of 24 layers, enough to interrupt a run, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the layers of a model, merged in depth order"] * 20, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    pico("llama_gqa", num_hidden_layers=24).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 1500 different lines."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [
        f"Line {i} of the text speaks of {i * i} layers in {i % 7} groups." for i in range(1500)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def private_caches(tmp_path, monkeypatch):
    """Caches of this test only, for jobs that run in this process."""
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def base(tmp_path):
    """A checkpoint of a pico model."""
    from tests.bases import save_base

    return save_base(tmp_path / "base", "llama_gqa")


@pytest.fixture
def stream(family, windows):
    adapter = ModelAdapter(pico(family))
    collector = StatisticsCollector(adapter, ("abs", "square", "mean", "output_norm"), "all")
    with LayerStream(adapter, windows, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1, collector)
        stream.found = collector.found
        yield stream


@pytest.fixture(autouse=True)
def fixed_machine_speed(request, monkeypatch):
    """Skips the speed measurement, which takes a second per job, except in tests marked speed."""
    if not request.node.get_closest_marker("speed"):
        monkeypatch.setattr("come.job.estimate._products", fixed_products)


@pytest.fixture(autouse=True)
def own_precision():
    """Forgets the precision of a training job, which accelerate keeps for the whole process."""
    yield
    if "accelerate" in sys.modules:
        AcceleratorState = sys.modules["accelerate"].state.AcceleratorState
        AcceleratorState._reset_state()


@pytest.fixture
def command(pico_folder, tmp_path, request):
    """Starts run.py in a forked process; tests marked slow or process get a new interpreter."""
    new_interpreter = any(request.node.get_closest_marker(name) for name in ("slow", "process"))

    def start(*overrides, model=pico_folder):
        environment = os.environ | {"COME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        words = [f"model.path={model}", "model=local"] if model else []
        sets_method = ("merge=", "experiment=", "+merge=", "from_run=")
        if not any(o.startswith(sets_method) for o in overrides):
            words.append("merge=come")
        words += small_job_overrides(*overrides)
        words = [*without_repeated(words, overrides), *overrides]
        if not new_interpreter:
            return ForkedRun(words, tmp_path, environment)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def command_line(pico_folder, tmp_path, monkeypatch, capfd):
    """Runs the command line in this process and returns exit code and output, for early exits."""

    def run(*overrides):
        monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("come.cli._printed", set())
        words = [
            "run.py",
            f"model.path={pico_folder}",
            "model=local",
            "merge=come",
            *small_job_overrides(*overrides),
        ]
        monkeypatch.setattr(sys, "argv", [*without_repeated(words, overrides), *overrides])
        capfd.readouterr()
        handlers = logging.root.handlers[:]
        try:
            code = come.cli.main()
        except SystemExit as exit_:
            code = exit_.code
        finally:
            logging.root.handlers[:] = handlers  # Hydra's handlers write to the job's folder
        return code, "\n".join(capfd.readouterr())

    return run


@pytest.fixture
def targets(windows):
    """Factory for reconstruction targets of layers 2 and 3 of a pico model, and their sources."""
    opened = []

    def make(family, windows=windows):
        adapter = ModelAdapter(pico(family))
        stream = LayerStream(adapter, windows, batch_size=2, progress=False)
        opened.append(stream)
        stream.embed()
        stream.advance(0, LAYERS - 1)
        stream.snapshot_dense()
        counts = adapter.unit_counts
        kept = {unit: [[*range(n // 2)], [*range(n // 2, n)]] for unit, n in counts.items()}
        sources = source_layers_of(
            adapter, [2, 3], OPERATORS.create("concat"), "fold", [0.5, 0.5], kept
        )
        return ReconstructionTargets(stream, 2, 3, original=3), sources

    yield make
    for stream in opened:
        stream.__exit__(None, None, None)
