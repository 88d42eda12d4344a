"""Other tools load the same tensors and tokenizer from a compressed model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import gguf.vocab
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.saving import save_model
from come.models.loading import load_model
from tests.bases import BASES
from tests.commands import ROOT
from tests.conftest import SUMMARY, VOCAB
from tests.methods import paper

TRANSFORMERS4 = Path(sys.prefix) / "transformers4"
ALLOWED_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".md"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folders of every base model, and of the model with two merged layers."""
    root = tmp_path_factory.mktemp("readers")
    windows = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(3))
    found = {}
    for number, (name, make) in enumerate(BASES.items()):
        base = make(root / f"base-{number}")
        model, tokenizer = load_model(base)
        plan = compress(model, windows, paper(refit="ridge"), target_layers=5, progress=False)
        found[name] = (base, save_model(model, tokenizer, root / f"result-{number}", plan))
    return found


def read(folders, out, version=None):
    """Runs tests.read_models in a new process with a version of transformers."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if version:
        environment["PYTHONPATH"] = str(version)
    words = [sys.executable, "-m", "tests.read_models", str(out), *map(str, folders)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(out).read_text())


@pytest.fixture(scope="module")
def readings(results, tmp_path_factory):
    """Output of tests.read_models for the merged models, by version and folder."""
    assert TRANSFORMERS4.is_dir(), (
        "make test-slow installs tests/transformers4.txt into the environment"
    )
    out = tmp_path_factory.mktemp("out")
    folders = [result for _, result in results.values()]
    both = {"5": read(folders, out / "5"), "4.57": read(folders, out / "4", TRANSFORMERS4)}
    assert both["5"]["version"].startswith("5.")
    assert both["4.57"]["version"].startswith("4.57")
    return {version: found["folders"] for version, found in both.items()}


def server_tensors(folder):
    """The tensors that vLLM and SGLang load: all safetensors files at the top level, or those that
    the index names."""
    files = {path.name: path for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: files[name] for name in json.loads(index.read_text())["weight_map"].values()}
    found = {}
    for path in files.values():
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def check_servers(base, result, readings):
    model = AutoModelForCausalLM.from_pretrained(result)
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = server_tensors(result)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    odd = [
        path.name
        for path in result.iterdir()
        if path.is_file() and path.suffix not in ALLOWED_SUFFIXES
    ]
    assert not odd
    assert (result / "come" / "plan.json").is_file()


def check_gguf(base, result, readings):
    """Reads what llama.cpp's converter reads: vocabularies, and top-level keys of config.json."""
    for folder in (base, result):
        vocabulary = gguf.SpecialVocab(folder, load_merges=True)
        found = {
            "merges": vocabulary.merges,
            "ids": vocabulary.special_token_ids,
            "add": vocabulary.add_special_token,
            "template": vocabulary.chat_template,
        }
        if (folder / "tokenizer.model").is_file():
            found["scores"] = list(gguf.vocab.SentencePieceVocab(folder).all_tokens())
            assert len({score for _, score, _ in found["scores"]}) > 10
        else:
            found["tokens"] = list(gguf.vocab.BpeVocab(folder).all_tokens())
        if folder == base:
            expected = found
    assert found == expected
    config = json.loads((result / "config.json").read_text())
    rope = AutoModelForCausalLM.from_pretrained(result).config.to_dict().get("rope_parameters")
    if rope:
        assert config["rope_theta"] == rope["rope_theta"]
        scaling = config["rope_scaling"] or {"rope_type": "default"}
        assert {k: v for k, v in rope.items() if k != "rope_theta"}.items() >= scaling.items()


def check_transformers4(base, result, readings):
    four, five = readings["4.57"][str(result)], readings["5"][str(result)]
    logits = torch.tensor(four["logits"]), torch.tensor(five["logits"])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for key in ("ids", "greedy", "dtype", "special", "template", "decoded"):
        assert four[key] == five[key], key


def check_transformers5(base, result, readings):
    """The saved model equals the merged model in memory."""
    found = readings["5"][str(result)]
    model, _ = load_model(base)
    assert found["dtype"] == str(model.dtype)
    apply(Plan.load(result / "come" / "plan.json"), model)
    with torch.no_grad():
        logits = model.float()(torch.tensor([found["ids"]])).logits[0, -40:, :40]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-4)


READERS = {
    "transformers 5": check_transformers5,
    "transformers 4.57": check_transformers4,
    "GGUF reader": check_gguf,
    "rules of vLLM, SGLang": check_servers,
}


@pytest.mark.slow
def test_every_reader_loads_the_same_model(results, readings, record_property):
    lines, failed = [], []
    for name, (base, result) in results.items():
        cells = []
        for reader, check in READERS.items():
            try:
                check(base, result, readings)
                cells.append("equal")
            except AssertionError as error:
                cells.append("DIFFERS")
                failed.append(f"{name}, {reader}: {error}")
        lines.append("".join(f"{cell:<24}" for cell in (name, *cells)))
    head = "".join(f"{cell:<24}" for cell in ("", *READERS))
    record_property(SUMMARY, "\n".join([head, *lines]))
    assert not failed, "\n".join(failed)
