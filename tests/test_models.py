"""Checkpoints, families and per-layer configs: loading, saving and error messages."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BitNetConfig, OPTConfig, Qwen2Config

from come.job.identity import job_hash
from come.merge.plan import BaseModel, Plan
from come.merge.saving import check_cache, save_model
from come.models.adapter import ModelAdapter
from come.models.checkpoint import check_checkpoint, find_checkpoint, fingerprint
from come.models.families import layout_of
from come.models.loading import inspect_model, load_model, load_weights, resolve_fast
from come.models.surgery import check_layer_config, reindex_config
from tests.bases import save_byte_level_tokenizer
from tests.conftest import LAYERS, pico
from tests.jobs import job_settings


def test_unsupported_families():
    with pytest.raises(ValueError, match="'bert' is not known; supported are the .* types"):
        layout_of(BertConfig())
    with pytest.raises(ValueError, match="'bitnet' is not supported: norms before its output"):
        layout_of(BitNetConfig())
    with pytest.raises(ValueError, match="normalises after each block"):
        layout_of(OPTConfig(do_layer_norm_before=False))
    with pytest.raises(ValueError, match="projects its embeddings from 16 to 32"):
        layout_of(OPTConfig(hidden_size=32, word_embed_proj_dim=16, num_attention_heads=4))


def test_unknown_layer_tensors_are_rejected():
    model = pico("llama_gqa")
    for layer in model.model.layers:
        layer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layer tensor 'extra.weight'.* is not known"):
        ModelAdapter(model)


def test_reindex_config():
    config = Qwen2Config(num_hidden_layers=6, max_window_layers=4, use_sliding_window=False)
    config.mlp_only_layers = [1, 4]
    config.no_rope_layers = [1, 1, 1, 0, 1, 1]
    reindex_config(config, [0, 1, 3, 4])
    assert config.num_hidden_layers == len(config.layer_types) == 4
    assert config.mlp_only_layers == [1, 3]
    assert config.no_rope_layers == [1, 1, 0, 1]
    assert config.max_window_layers == 3


def test_unknown_per_layer_config_is_rejected():
    config = Qwen2Config(num_hidden_layers=6)
    config.layer_scales = [0.1] * 6
    with pytest.raises(ValueError, match=r"config.layer_scales has one entry for each of the 6"):
        check_layer_config(config)


def test_cache_check_detects_stale_layer_indices(windows):
    """Removing layer 0 without updating the other layers' indices fails the check."""
    model = pico("llama_gqa")
    del model.model.layers[0]
    model.config.num_hidden_layers -= 1
    with pytest.raises((AssertionError, IndexError)):
        assert check_cache(model) < 1e-3


def test_cache_check_is_relative_to_the_logits(monkeypatch):
    """The logits with a cache are larger by a tenth of the largest logit."""
    model = pico("llama_gqa")
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs["use_cache"]:
            output.logits = output.logits + 0.1 * largest
        return output

    monkeypatch.setattr(model, "forward", changed)
    largest = 0.0
    with torch.no_grad():
        probe = (torch.arange(24) * 37 % model.config.vocab_size)[None]
        largest = forward(input_ids=probe).logits.abs().max()
        assert check_cache(model, length=24) == pytest.approx(0.1, rel=1e-3)


def test_load_and_fingerprint(pico_folder, tmp_path):
    model, tokenizer = load_model(pico_folder)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.bos_token_id == 1
    copied = tmp_path / "copy"
    shutil.copytree(pico_folder, copied)
    assert fingerprint(copied) == fingerprint(pico_folder)
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert fingerprint(copied) != fingerprint(pico_folder)
    shape = inspect_model(pico_folder, dtype="bfloat16")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weight_bytes == 2 * shape.parameters


@pytest.mark.parametrize(("able", "dtype"), [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
    ({"avx512_bf16": False, "avx2": True}, torch.float32), (None, torch.float32),
])  # fmt: skip
def test_fast_dtype(able, dtype, pico_folder, monkeypatch):
    """bfloat16 only where the processor has instructions for it; torch may not know."""
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert inspect_model(pico_folder, dtype="fast", device="cpu").dtype == dtype
    assert load_weights(pico_folder, dtype="fast", device="cpu").dtype == dtype
    assert inspect_model(pico_folder, dtype="float32").dtype == torch.float32


def test_fast_is_the_job_of_its_dtype(pico_folder):
    """The same machine has one hash for `fast` and for the dtype that it resolves to."""
    device = torch.device("cpu")
    fast, same = (
        job_hash(job_settings(pico_folder, f"model.dtype={dtype}", "model.device=cpu"))
        for dtype in ("fast", resolve_fast("fast", device))
    )
    assert fast == same
    assert fast != job_hash(job_settings(pico_folder, "model.dtype=float16", "model.device=cpu"))


def test_tied_parameters_count_once(tmp_path):
    model = pico("llama_tied")
    model.save_pretrained(tmp_path)
    assert inspect_model(tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_sharded_checkpoint(tmp_path):
    pico("llama_gqa").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    load_weights(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"checkpoint is incomplete: .* is missing"):
        load_weights(tmp_path)


def test_damaged_checkpoints(pico_folder, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(str(folder))
    with pytest.raises(ValueError, match=r"model.path is not set"):
        find_checkpoint(None)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no config.json: not a Hugging Face checkpoint"):
        check_checkpoint(folder)
    shutil.copytree(pico_folder, folder, dirs_exist_ok=True)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        check_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"only pickles \(pytorch_model.bin\).*save_pretrained"):
        check_checkpoint(folder)


def test_hub_repository_with_only_pickles(pico_folder, tmp_path, monkeypatch):
    """Pickles are not downloaded, so the folder has no weights."""
    requested = {}

    def download(name, revision, allow_patterns):
        requested.update(name=name, revision=revision, patterns=allow_patterns)
        shutil.copy(pico_folder / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("come.models.checkpoint.snapshot_download", download)
    folder = find_checkpoint("some/pickles", revision="main")
    assert requested["name"] == "some/pickles"
    assert requested["revision"] == "main"
    assert not {"*.bin", "*.pt", "*.py"} & set(requested["patterns"])
    with pytest.raises(ValueError, match=r"none are there. Pickles are neither.*save_pretrained"):
        inspect_model(folder)
    find_checkpoint("some/pickles", trust_remote_code=True)
    assert "*.py" in requested["patterns"]


def test_missing_weights_are_an_error(pico_folder, tmp_path):
    shutil.copytree(pico_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit its configuration, missing keys"):
        load_weights(tmp_path)


def test_hub_model_without_network():
    with pytest.raises(ValueError, match=r"neither a folder nor to be had.*model.path=FOLDER"):
        find_checkpoint("nobody/no-such-model")


def test_invalid_dtype_and_device(pico_folder):
    with pytest.raises(ValueError, match="model.dtype='float8': allowed are auto"):
        load_weights(pico_folder, dtype="float8")
    with pytest.raises(ValueError, match="model.device=tpux: allowed are auto, cpu"):
        load_weights(pico_folder, device="tpux")


def test_failed_save_keeps_the_previous_model(pico_folder, tmp_path, monkeypatch):
    model, tokenizer = load_model(pico_folder)
    plan = Plan(BaseModel.of(ModelAdapter(model)), "concat", "mean")
    for _ in range(2):  # the second one replaces the first
        save_model(model, tokenizer, tmp_path / "model", plan)
    before = fingerprint(tmp_path / "model")

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("come.models.companions.shutil.copyfile", broken)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, tmp_path / "model", plan)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert fingerprint(tmp_path / "model") == before


def test_save_does_not_replace_other_folders(pico_folder, tmp_path):
    model, tokenizer = load_model(pico_folder)
    (tmp_path / "thesis.txt").write_text("years of work")
    plan = Plan(BaseModel.of(ModelAdapter(model)), "concat", "mean")
    with pytest.raises(ValueError, match="was not made by come; choose another folder"):
        save_model(model, tokenizer, tmp_path, plan)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5' is not known; supported are the"),
        ({"model_type": "lama"}, "'lama' is not known; .* .similar: llama, "),
        ({"hidden_act": "no_such"}, "bad configuration"),
        ({"hidden_size": "wide"}, "bad configuration"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method=gptq"),
        ({"num_hidden_layers": 20}, "do not fit its configuration, unexpected keys"),
    ],
)
def test_invalid_configs(pico_folder, tmp_path, change, message):
    shutil.copytree(pico_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_load_in_half_precision(pico_folder):
    model = load_weights(pico_folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(pico_folder).dtype == torch.float32
    assert len(ModelAdapter(model).layers) == 24 != LAYERS


def test_folder_with_only_a_tokenizer(tmp_path):
    save_byte_level_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        check_checkpoint(tmp_path)
