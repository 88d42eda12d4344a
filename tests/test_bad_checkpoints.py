"""Checkpoints that cannot be merged: one line each, before any weights are loaded."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from come.models.loading import inspect_model, load_tokenizer, load_weights
from tests.bases import change_weights, edit_json, save_byte_level_tokenizer
from tests.conftest import pico
from tests.decoders import pico_decoder

LAYER = "model.layers.2."
UP, DOWN, GATE = (f"{LAYER}mlp.{name}_proj.weight" for name in ("up", "down", "gate"))
QUERY, KEY, VALUE = (f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv")
CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
MODEL = "model.safetensors"

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves small models: the folder of a model type, written once."""
    folders: dict[str, Path] = {}

    def save(model_type):
        if model_type not in folders:
            folders[model_type] = folder = tmp_path_factory.mktemp(model_type)
            save_byte_level_tokenizer(folder)
            if model_type == "llama":
                pico("llama_gqa").save_pretrained(folder)
            elif model_type == "llama shards":
                pico("llama_gqa").save_pretrained(folder, max_shard_size="20KB")
            else:
                pico_decoder(model_type).save_pretrained(folder)
        return folders[model_type]

    return save


def config(*without: str, **values: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", *without, **values)


def text_config(*without: str, **values: Any) -> Change:
    def change(folder):
        own = json.loads((folder / "config.json").read_text())["text_config"]
        rest = {key: value for key, value in own.items() if key not in without}
        edit_json(folder / "config.json", text_config=rest | values)

    return change


def quantised(method: str | None, **values: Any) -> Change:
    return config(quantization_config={"quant_method": method, **values})


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda folder: change_weights(folder, change)


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return tensors(lambda found: found.update({name: torch.zeros(shape, dtype=dtype)}))


def without(*names: str) -> Change:
    return tensors(lambda found: [found.pop(name) for name in names])


def cast(dtype: torch.dtype, *names: str) -> Change:
    return tensors(lambda found: found.update({name: found[name].to(dtype) for name in names}))


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def replaced(name: str, *without: str) -> Change:
    """Adds a file in place of others."""

    def change(folder):
        for other in without:
            (folder / other).unlink()
        (folder / name).write_text("{}")

    return change


def absent_from_index(folder: Path) -> None:
    path = folder / f"{MODEL}.index.json"
    index = json.loads(path.read_text())
    absent = sorted(set(index["weight_map"].values()))[1]
    kept = {name: file for name, file in index["weight_map"].items() if file != absent}
    path.write_text(json.dumps(index | {"weight_map": kept}))


def another_expert_width(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if ".layers.1." in name and ".experts.0.w" in name]:
        tensor = found[name]
        found[name] = (tensor[:, :4] if ".w2." in name else tensor[:4]).contiguous()


NARROW = all_of(put(UP, 16, 32), put(GATE, 16, 32), put(DOWN, 32, 16))
ONLY_2 = "of 6 layers, only 2 does not fit; take a checkpoint whose weights and config.json belong"
NOT_FLOATS = "as if they were quantised, and config.json has no quantization_config"

BAD: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    # code of the repository
    "code, unknown type": (
        "llama", config(model_type="own", auto_map=CODE),
        ("model type 'own' is not known", "code of its repository, auto_map", "docs/extend.md"),
    ),
    "code, no type": ("llama", config("model_type", auto_map=CODE), ("None", "auto_map")),
    # quantised weights
    **{
        method: ("llama", quantised(method), (f"quant_method={method})", "take the unquantised"))
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "hqq", "new")
    },
    "old bitsandbytes": ("llama", quantised(None, load_in_8bit=True), ("quantised weights",)),
    "fp8": ("llama", quantised("fp8"), ("=fp8", "FineGrainedFP8Config(dequantize=True)")),
    "mxfp4": ("gpt_oss", quantised("mxfp4"), ("=mxfp4", "Mxfp4Config(dequantize=True)")),
    "empty": ("llama", config(quantization_config={}), ("remove quantization_config",)),
    "old key": ("llama", config(compression_config={}), ("config.json has compression_config",)),
    "in a wrapper": (
        "gemma3", text_config(quantization_config={"quant_method": "gptq"}),
        ("config.json, in text_config, has quantization_config, quant_method=gptq",),
    ),
    "int8": ("llama", cast(torch.int8, UP, DOWN), ("are I8", NOT_FLOATS, UP, "(2 in all)")),
    "float8": ("llama", cast(torch.float8_e4m3fn, KEY), ("are F8_E4M3", NOT_FLOATS, KEY)),
    "float8 with scales": (
        "llama", all_of(cast(torch.float8_e4m3fn, UP), put(f"{UP}_scale_inv", 1)),
        (f"unexpected keys: {UP}_scale_inv", "some are F8_E4M3, as quantised weights are"),
    ),
    "packed": (
        "llama", all_of(without(UP), put(f"{LAYER}mlp.qweight", 4, 24, dtype=torch.int32)),
        (f"missing keys: {UP}", "some are I32, as quantised weights are"),
    ),
    # other types
    **{
        name: ("llama", config(model_type=name), (f"model type {name!r} is not known", "docs/"))
        for name in ("vit", "clip", "bert", "t5", "whisper", "llava", "frobnicator", "nemotron-nas")
    },
    "a list": ("llama", config(model_type=["llama"]), ("model type ['llama'] is not known",)),
    "a number": ("llama", config(model_type=3), ("model type 3 is not known",)),
    **{
        name: ("llama", config(model_type=name), (f"model type {name!r} is not supported: ",))
        for name in ("bitnet", "jamba")
    },
    "no text model": (
        "got_ocr2", text_config(model_type="bert"),
        ("'got_ocr2' is described with a text model of type qwen2", "text_config.model_type=bert"),
    ),
    "another text model": ("got_ocr2", text_config(model_type="gemma"), ("model_type=gemma",)),
    "unknown text model": (
        "got_ocr2", text_config(model_type="nosuch"), ("type for subconfig: nosuch.\n",)
    ),
    "default text model": ("gemma3", config("text_config"), ("26 layers, and the weights have 4",)),
    # layers that differ, and other tensors
    "FFN width": ("llama", NARROW, (f"keys: {DOWN} [32, 16] in place of [32, 24]", ONLY_2)),
    "KV heads": ("llama", all_of(put(KEY, 8, 32), put(VALUE, 8, 32)), (KEY, VALUE, ONLY_2)),
    "bias": ("llama", put(f"{LAYER}mlp.up_proj.bias", 24), ("unexpected keys: model.", ONLY_2)),
    "adapter in a layer": ("llama", put(f"{LAYER}q.lora_A", 2, 32), ("lora_A", ONLY_2)),
    "missing tensor": ("llama", without(UP), (f"missing keys: {UP} (1 in all)", ONLY_2)),
    "missing head": ("llama", without("lm_head.weight"), ("missing keys: lm_head.weight (1",)),
    "value head": (
        "llama", put("value_head.weight", 1, 32),
        ("unexpected keys: value_head.weight (1 in all); take", "or remove the unexpected tensors"),
    ),
    "expert width": (
        "mixtral", tensors(another_expert_width),
        ("model.layers.1.mlp.experts.down_proj (joined from several tensors, of", "only 1 does"),
    ),
    "per_layer_config": (
        "llama", all_of(NARROW, config(per_layer_config={"2": {"intermediate_size": 16}})),
        ("'intermediate_size' is a per-layer attribute and may vary across layers.\n",),
    ),
    "block_configs": ("llama", all_of(NARROW, config(block_configs=[{}] * 6)), ("block_configs",)),
    "list of widths": ("llama", config(intermediate_size=[24] * 6), ("'intermediate_size' exp",)),
    "vocabulary": ("llama", config(vocab_size=400), ("lm_head.weight [300, 32] in place of [400",)),
    "another type": ("llama", config(model_type="opt"), ("missing keys: ", "unexpected keys: ")),
    # the number of layers
    "more layers": (
        "llama", config(num_hidden_layers=4),
        ("unexpected keys: model.layers.4", "describes 4 layers, and the weights have 6;"),
    ),
    "fewer layers": (
        "llama", config(num_hidden_layers=8),
        ("missing keys: model.layers.6", "describes 8 layers, and the weights have 6;"),
    ),
    "no layers": ("llama", config(num_hidden_layers=0), ("describes 0 layers, and the",)),
    # files
    "adapter folder": (
        "llama", replaced("adapter_config.json", "config.json", MODEL), ("holds an adapter",)
    ),
    "GGUF folder": (
        "llama", replaced("model-Q4.gguf", "config.json", MODEL), ("(model-Q4.gguf)", "gguf_file=")
    ),
    "GGUF": ("llama", replaced("model-Q4.gguf", MODEL), ("GgufConfig(dequantize=True)",)),
    "pickles": ("llama", replaced("pytorch_model.bin", MODEL), ("pickles (pytorch_model.bin)",)),
    "other name": (
        "llama", replaced("consolidated.safetensors", MODEL),
        ("consolidated.safetensors are not model.safetensors, nor in an index",),
    ),
    "absent shard": (
        "llama shards", replaced("x", "model-00002-of-00009.safetensors"), ("00002-of-00009",)
    ),
    "index without a shard": ("llama shards", absent_from_index, ("missing keys: ", "only 0 does")),
    "cut header": ("llama", cut(MODEL, 200), ("truncated or damaged", "copy it again")),
    "cut data": ("llama", cut(MODEL, -9), ("truncated or damaged", "copy it again")),
}  # fmt: skip


def copied(saved, base: str, change: Change, folder: Path) -> Path:
    shutil.copytree(saved(base), folder, dirs_exist_ok=True)
    change(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_one_line_before_weights_are_loaded(case, saved, tmp_path, capfd):
    base, change, words = BAD[case]
    folder = copied(saved, base, change, tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        inspect_model(folder)
    line = f"{error.value}\n"
    assert not [word for word in words if word not in line], line
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("weights", ["memory", "disk"])
@pytest.mark.parametrize("case", ["code, unknown type", "in a wrapper", "int8", "bias", "a list"])
def test_command_line(case, weights, saved, tmp_path, command_line, monkeypatch):
    base, change, words = BAD[case]
    folder = copied(saved, base, change, tmp_path / "model")
    monkeypatch.setattr("come.job.job.load_weights", pytest.fail)
    # As transformers sets it where the environment says CI=true.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    hashed = []
    monkeypatch.setattr("come.models.checkpoint.file_hash", lambda path: f"{hashed.append(path)}")
    settings = (f"model.path={folder}", "merge.target_layers=3", f"model.weights={weights}")
    code, printed = command_line(*settings)
    assert code == 1
    assert printed.strip().startswith("error: ")
    assert printed.strip().count("\n") == 0
    assert all(word in printed for word in words)
    assert bool(hashed) == (case in ("int8", "bias"))  # known from file headers
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["model"]


def old_names(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if name.startswith("model.")]:
        found[name.removeprefix("model.")] = found.pop(name)


def old_masks(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if name.endswith("ln_1.weight")]:
        mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        found[name.replace("ln_1.weight", "attn.bias")] = mask


GOOD: dict[str, tuple[str, Change]] = {
    "names without a prefix": ("llama", tensors(old_names)),
    "old rotary buffers": ("llama", put(f"{LAYER}self_attn.rotary_emb.inv_freq", 4)),
    "float64": ("llama", cast(torch.float64, UP, DOWN)),
    "null quantization_config": ("llama", config(quantization_config=None)),
    "stale index": ("llama", replaced(f"{MODEL}.index.json")),
    "prediction of further tokens": ("qwen3_next", put("mtp.fc.weight", 8, 8)),
    "integer masks": ("gpt2", tensors(old_masks)),
    "experts one by one": ("mixtral", config()),
    "joined experts": ("gpt_oss", config()),
    "wrapper": ("gemma3", config()),
    "renamed head": ("gpt_neox", config()),
    "code, known type": ("llama", config(auto_map=CODE)),
}


@pytest.mark.parametrize("case", GOOD)
def test_other_checkpoints_load(case, saved, tmp_path, capfd):
    base, change = GOOD[case]
    folder = copied(saved, base, change, tmp_path)
    capfd.readouterr()
    inspect_model(folder)
    assert "".join(capfd.readouterr()) == ""
    model = load_weights(folder, device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_tied_head_may_be_absent(tmp_path):
    pico("llama_tied").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / MODEL)
    assert inspect_model(tmp_path).config.tie_word_embeddings


def test_code_of_known_types_does_not_run(saved, tmp_path):
    """The layouts describe the layers of transformers, so code of the repository is not used."""
    folder = copied(saved, "llama", config(auto_map=CODE), tmp_path)
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text("raise ImportError('this code is for another version')\n")
    model = load_weights(folder, device="cpu", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.")
    for weights in ("memory", "disk"):
        load_weights(folder, device="cpu", weights=weights, trust_remote_code=True)


def test_code_of_a_tokenizer_that_fails(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", f"{tmp_path}/cache")
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = copied(saved, "llama", config(auto_map=CODE), tmp_path / "model")
    (folder / "configuration_x.py").write_text("raise ImportError('for another version')\n")
    with pytest.raises(ValueError, match="no tokenizer can be read: for another version"):
        load_tokenizer(folder, trust_remote_code=True)
