"""Saved model folders: copied files, config, tokenizer and model card."""

import json
import shlex
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from come.job.folder import find_run
from come.merge import saving
from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import BaseModel, Plan
from come.merge.saving import plan_path, save_model
from come.models.adapter import ModelAdapter
from come.models.companions import companion_files
from come.models.dialects import both_dialects, tokenizer_for_both
from come.models.loading import load_model
from come.report.card import _command
from tests.bases import BASES, LLAMA3, YARN, edit_json, save_base, save_sentencepiece_tokenizer
from tests.conftest import VOCAB
from tests.jobs import QUICK, run_job
from tests.methods import paper

pytestmark = pytest.mark.usefixtures("private_caches")


def config(folder):
    return json.loads((folder / "config.json").read_text())


def merge_and_save(base, folder, **options):
    """Merges two layers of a base model and saves the result."""
    model, tokenizer = load_model(base)
    windows = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(3))
    plan = compress(model, windows, paper(refit="ridge"), target_layers=5, progress=False)
    return save_model(model, options.pop("tokenizer", tokenizer), folder, plan, **options)


COPIED = {
    "tokenizer.json": b"\xff tokens",
    "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer",   "odd" : 1}',
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "tokenizer.model": b"\x00pieces",
    "tokenizer.model.v3": b"\x01pieces",
    "spiece.model": b"\x02",
    "vocab.json": b"{}",
    "merges.txt": b"a b",
    "tekken.json": b"{}",
    "qwen.tiktoken": b"x",
    "chat_template.jinja": b"{{ 1 }}",
    "chat_template.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ 2 }}",
    "generation_config.json": b'{"temperature": 0.6}',
    "LICENSE": b"mine",
    "USE_POLICY.md": b"be good",
}
NOT_COPIED = {
    "README.md": b"card",
    "optimizer.pt": b"",
    "trainer_state.json": b"{}",
    "tokenizer.bin": b"",
    "notes.txt": b"years of work",
    "data.jsonl": b"",
    "modeling_mine.py": b"",
    "refit.safetensors": b"",
    "original/tokenizer.model": b"",
}


def test_companion_files_are_copied_byte_for_byte(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    model, tokenizer = load_model(base)
    plan = Plan(BaseModel.of(ModelAdapter(model)), "concat", "mean")
    for name, content in (COPIED | NOT_COPIED).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    folder = save_model(model, tokenizer, tmp_path / "out", plan, base=base)
    for name, content in COPIED.items():
        assert (folder / name).read_bytes() == content, name
    for name in NOT_COPIED:
        assert not (folder / name).exists(), name
    top = {path.name for path in folder.iterdir()}
    assert top == {name.partition("/")[0] for name in COPIED} | {
        "come",
        "config.json",
        "model.safetensors",
    }


def test_config_changes_only_where_the_merge_requires(tmp_path):
    base = save_base(tmp_path / "base", "qwen2_gqa", v4=True)
    edit_json(base / "config.json", "layer_types", "head_dim", attn_pdrop=0.5, mine={"a": [1]})
    before, after = config(base), config(merge_and_save(base, tmp_path / "out"))
    changed = {key for key in before if after[key] != before[key]}
    assert changed == {"num_hidden_layers", "max_window_layers"}
    assert after["num_hidden_layers"] == 5
    assert set(after) - set(before) == {"layer_types"}  # one entry per layer, checked by readers
    assert after["torch_dtype"] == "float32"
    assert after["transformers_version"] == "4.44.0"  # some readers depend on it


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_config_has_rope_parameters_of_both_versions(rope):
    found = both_dialects({"rope_parameters": {"rope_theta": 5.0} | rope, "dtype": "bfloat16"})
    theta = rope.get("rope_theta", 5.0)
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == theta
    assert found["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    own = {"rope_theta": 7.0, "rope_scaling": None, "torch_dtype": "float16"}
    assert both_dialects(own) == own
    kinds = {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}
    assert both_dialects(kinds) == kinds


def test_tokenizer_config_for_both_versions():
    given = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "x": 1}
    assert tokenizer_for_both(given) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "x": 1,
    }
    known = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image": "<a>"}}
    assert tokenizer_for_both(known) == known
    listed = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": ["<a>"]}
    assert tokenizer_for_both(listed) == {
        "tokenizer_class": "LlamaTokenizer",
        "additional_special_tokens": ["<a>"],
    }


def test_no_generation_config_if_the_base_has_none(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    (base / "generation_config.json").unlink()
    assert not (merge_and_save(base, tmp_path / "out") / "generation_config.json").exists()


def test_auto_map_lists_only_existing_code(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    auto_map = {
        "AutoConfig": "configuration_mine.MyConfig",
        "AutoModel": "somebody/other--modeling.Model",
    }
    edit_json(base / "config.json", auto_map=auto_map)
    found = config(merge_and_save(base, tmp_path / "out"))
    assert found["auto_map"] == {"AutoModel": "somebody/other--modeling.Model"}
    (base / "configuration_mine.py").write_text("raise SystemExit('code of a checkpoint has run')")
    (base / "other.py").write_text("")
    folder = merge_and_save(base, tmp_path / "again")
    assert config(folder)["auto_map"] == auto_map
    assert (folder / "configuration_mine.py").is_file()
    assert (folder / "other.py").is_file()  # it may be imported by the first


def test_saved_model_loads_from_another_folder(tmp_path):
    base = save_base(
        tmp_path / "base", "llama_gqa", tokenizer=save_sentencepiece_tokenizer, v4=True
    )
    run_job(base, tmp_path / "out", *QUICK)
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(tmp_path / "out" / "model", moved)
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "out")
    for flags in ({}, {"dtype": "auto"}, {"use_safetensors": True}, {"trust_remote_code": False}):
        assert AutoModelForCausalLM.from_pretrained(moved, **flags).config.num_hidden_layers == 5
    tokenizer = AutoTokenizer.from_pretrained(moved)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    text = {path.name: path.read_text() for path in moved.glob("*.json")}
    assert not [name for name, found in text.items() if str(tmp_path) in found]


def test_tokenizer_changed_in_memory_is_saved(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    _, tokenizer = load_model(base)
    tokenizer.chat_template = "{{ 'mine' }}"
    folder = merge_and_save(base, tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ 'mine' }}"
    folder = merge_and_save(base, tmp_path / "again")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_save_a_model_without_a_base_folder(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    model, tokenizer = load_model(base)
    model.config._name_or_path = ""
    plan = Plan(BaseModel.of(ModelAdapter(model)), "concat", "mean")
    folder = save_model(model, tokenizer, tmp_path / "out", plan)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert config(folder)["rope_theta"] == 10000.0
    assert config(folder)["torch_dtype"] == "float32"


def test_runs_of_earlier_versions_are_loaded(tmp_path):
    """Their plan is next to the weights, and config.json refers to it."""
    base = save_base(tmp_path / "base", "llama_gqa")
    run_job(base, tmp_path / "old", "merge.refit=ridge", *QUICK)
    model = tmp_path / "old" / "model"
    assert "Refit `ridge`: " in (model / "README.md").read_text()
    for path in (model / "come").iterdir():
        path.rename(model / path.name)
    (model / "come").rmdir()
    edit_json(model / "config.json", come={"plan": "x", "merge_history": [[0]]})
    plan = Plan.load(plan_path(model))
    assert plan.num_layers == 5
    assert find_run(str(tmp_path / "old")) == model

    overrides = [f"from_run={tmp_path / 'old'}", "merge.target_layers=null"]
    result = run_job(base, tmp_path / "new", *overrides, *QUICK)
    assert result["plan"] == plan.hash
    again = tmp_path / "new" / "model"
    assert Plan.load(again / "come" / "plan.json").hash == plan.hash
    assert "come" not in config(again)
    rebuilt, tokenizer = load_model(base)
    apply(Plan.load(model / "plan.json"), rebuilt)
    assert save_model(rebuilt, tokenizer, model, plan) == model  # replaces the old folder
    assert sorted(path.name for path in model.glob("*.safetensors")) == ["model.safetensors"]
    states = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (again, model)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_run_without_saved_weights_cannot_be_continued(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    run_job(base, tmp_path / "out", "merge.refit=ridge", "merge.save_weights=false", *QUICK)
    with pytest.raises(ValueError, match="no merged model with its come/plan.json there"):
        find_run(str(tmp_path / "out"))


CARD = """---
license: other
license_name: mine
license_link: LICENSE
language: [en, de]
model_name: Base One
base_model: somebody/older
tags: [old]
---
# Base One
"""


def test_card_keeps_metadata_of_the_base_card(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    (base / "README.md").write_text(CARD)
    run_job(base, tmp_path / "out", "model.base_model=somebody/one", *QUICK)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    for line in (
        "base_model: somebody/one",
        "license: other",
        "license_name: mine",
        "- de",
        "model_name: Base One, 5 layers (come)",
        'from_pretrained("FOLDER OR HUB ID"',
        "tested\nwith transformers 4.57 and 5.23",
        "The licence is that of the base model (mine).",
        "## Limits",
    ):
        assert line in card, line
    assert "somebody/older" not in card


def test_card_without_base_metadata(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    (base / "README.md").write_text("---\n: [no yaml\n---\n")
    run_job(base, tmp_path / "out", *QUICK)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "base_model" not in card
    assert "license" not in card.partition("# base")[0]
    assert "model_name: base, 5 layers (come)" in card


def test_card_has_the_hub_id_from_the_config(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    edit_json(base / "config.json", _name_or_path="somebody/one")
    run_job(base, tmp_path / "out", *QUICK)
    assert "base_model: somebody/one" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_card_command_has_no_local_folders():
    paths = ["come", "model.path=/home/me/my model", "calibration.path=~/a.txt", "merge.m=2"]
    shown = _command({"command": shlex.join(paths)})
    assert "come 'model.path=my model' calibration.path=a.txt merge.m=2\n" in shown
    assert "/home" not in shown
    assert _command({"command": ""}) == ""


@pytest.mark.parametrize("name", list(BASES))
def test_companion_files_equal_those_of_every_base(name, tmp_path):
    base = BASES[name](tmp_path / "base")
    folder = merge_and_save(base, tmp_path / "out")
    for path in companion_files(base):
        same = (folder / path).read_bytes() == (base / path).read_bytes()
        old = "TokenizersBackend" not in (base / "tokenizer_config.json").read_text()
        assert same or (path.name == "tokenizer_config.json" and not old)


def test_weights_are_saved_in_shards(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    folder = merge_and_save(base, tmp_path / "out", shard_size="20KB")
    assert (
        max(path.stat().st_size for path in folder.glob("*.safetensors")) < 40_000
    )  # the embedding
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()


def test_weights_have_the_permissions_of_other_files(tmp_path, monkeypatch):
    whole = saving._save_weights

    def private(model, folder, size):
        whole(model, folder, size)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(saving, "_save_weights", private)
    folder = merge_and_save(save_base(tmp_path / "base", "llama_gqa"), tmp_path / "out")
    modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1
