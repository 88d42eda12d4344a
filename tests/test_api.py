"""The Python API: `come.compress(model, tokenizer)`."""

import json

import pytest
import torch

import come
from come.data.documents import Documents
from come.merge.loop import compress as compress_layers
from come.models.loading import load_model
from tests.methods import same_weights

SMALL = {"num_samples": 4, "seq_len": 16, "progress": False}


@pytest.fixture
def loaded(pico_folder):
    return load_model(pico_folder)


def windows(rows=4, seq=16):
    return torch.randint(3, 300, (rows, seq), generator=torch.Generator().manual_seed(0))


def test_compress_with_defaults(loaded):
    model, tokenizer = loaded
    plan = come.compress(model, tokenizer, **SMALL)
    assert plan.num_layers == model.config.num_hidden_layers < 24  # 10% fewer parameters
    method = plan.provenance["recipe"]
    assert method["refit"]["name"] == "gauss_newton"
    assert method["selection"]["repeat_weight"] == 0.2  # the model wrote the text


def test_compress_calibrates_on_given_token_ids(loaded, pico_folder):
    model, tokenizer = loaded
    method = come.Method(m=2)
    plan = come.compress(
        model, tokenizer, text=windows(), method=method, target_layers=22, progress=False
    )
    other, _ = load_model(pico_folder)
    assert compress_layers(other, windows(), method, target_layers=22, progress=False) == plan
    assert same_weights(model, other)
    for text in (windows().flatten(), windows().flatten().tolist()):
        again, _ = load_model(pico_folder)
        come.compress(again, tokenizer, text=text, method=method, target_layers=22, **SMALL)
        assert same_weights(again, model)


def test_compress_accepts_documents_and_files(loaded, text_file, tmp_path):
    model, tokenizer = loaded
    come.compress(model, tokenizer, text=str(text_file), target_layers=23, **SMALL)
    documents = [f"Document {i} has layers, merged in depth order." for i in range(40)]
    plan = come.compress(model, tokenizer, text=documents, target_layers=22, **SMALL)
    plan.save(str(tmp_path / "plan.json"))
    assert come.Plan.load(str(tmp_path / "plan.json")) == plan


def test_documents_give_the_windows_of_a_file_with_the_same_rows(pico_folder, tmp_path):
    documents = [f"Document {i} has layers, merged in depth order." for i in range(60)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    models = []
    for text in (documents, path):
        model, tokenizer = load_model(pico_folder)
        come.compress(model, tokenizer, text=text, seed=3, target_layers=22, **SMALL)
        models.append(model)
    assert same_weights(*models)
    assert Documents(documents).identity != Documents(documents[1:]).identity
    with pytest.raises(ValueError, match="too short"):
        come.compress(*load_model(pico_folder), text=documents[:1], target_layers=22, **SMALL)


def test_explicit_groups_determine_the_depth(loaded):
    model, tokenizer = loaded
    method = come.Method(groups=[[3, 4], [10, 11, 12]], selection="sbi")
    plan = come.compress(model, tokenizer, text=windows(), method=method, progress=False)
    assert plan.num_layers == 21


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_layers": 20, "sparsity": 0.1}, "both target_layers=20 and sparsity=0.1"),
        (
            {"method": come.Method(groups=[[3, 4]]), "target_layers": 20},
            "both method.groups=.* and a depth",
        ),
        ({"text": torch.arange(5)}, "at least seq_len=16 token ids"),
        ({"text": torch.full((2, 16), 9999)}, "9999"),
    ],
)
def test_invalid_arguments(loaded, settings, message):
    with pytest.raises(ValueError, match=message):
        come.compress(*loaded, **SMALL | settings)
