"""Recurrent and hybrid families: configurations after cuts, narrow weights, refused types."""

import json

import pytest
import torch
from transformers import AutoConfig

from come.merge.loop import compress
from come.models.adapter import ModelAdapter
from come.models.dialects import derived_config
from come.models.families import FAMILIES, REFUSED, check_model_type, layout_of
from come.models.surgery import reindex_config
from tests.decoder_configs import KEYS
from tests.decoders import DECODERS, VARIANTS, pico_decoder
from tests.methods import build_method, come_plus, read_recipe
from tests.test_decoders import tokens


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused(model_type):
    """A type that cannot be supported says why, in one line."""
    assert model_type not in FAMILIES
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported: ") as error:
        check_model_type(model_type)
    assert "\n" not in str(error.value)


def test_refused_forms():
    """Forms that are not supported name what is."""
    with pytest.raises(ValueError, match=r"8 projected channels .moe_latent_size"):
        layout_of(DECODERS["nemotron_h"](moe_latent_size=8))
    kinds = ["full", "full", "shared", "full"]
    with pytest.raises(ValueError, match="layer 2 of this model reads the tokens"):
        layout_of(DECODERS["glm_moe_dsa"](indexer_types=kinds))
    with pytest.raises(ValueError, match="weight_mode='fused'"):
        layout_of(DECODERS["xlstm"](weight_mode="fused"))


def test_cycle_of_kinds():
    """A cycle of kinds becomes a list of the kinds that are left."""
    config = DECODERS["recurrent_gemma"](layers=7)
    kinds = list(config.layer_types)
    reindex_config(config, [0, 2, 3, 6])
    assert config.layer_types == [kinds[index] for index in (0, 2, 3, 6)]


@pytest.mark.parametrize("kept", [1, 2, 3, 29, 61])
def test_depth_scale(kept):
    """A factor that depends on the number of layers stays the same."""
    config = DECODERS["minicpm3"](layers=62)
    before = layout_of(config).layers[0]
    reindex_config(config, range(kept))
    assert layout_of(config).layers == (before,) * kept


def test_second_name_of_depth():
    config = DECODERS["xlstm"](layers=6)
    reindex_config(config, [0, 1, 4])
    assert config.num_blocks == config.num_hidden_layers == 3


@pytest.mark.parametrize("model_type", ["mamba", "recurrent_gemma", "falcon_h1"])
def test_bfloat16(model_type):
    """The residual stream may be float32 beside weights in bfloat16."""
    model = pico_decoder(model_type).to(torch.bfloat16)
    layers = model.config.num_hidden_layers
    compress(
        model, tokens(model), come_plus(), target_layers=layers - 1, batch_size=4, progress=False
    )
    assert model(tokens(model), use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("recipe", ["shortgpt", "sleb", "sleb_swap"])
def test_drops_leave_attention(recipe):
    """The only layer with attention is never dropped."""
    for place in range(4):
        model = pico_decoder("lfm2", full_attn_idxs=[place])
        method = build_method(read_recipe(recipe), {})
        compress(model, tokens(model), method, target_layers=1, batch_size=4, progress=False)
        assert model.config.layer_types == ["full_attention"]


def test_a_set_without_attention_is_rejected(monkeypatch):
    """A schedule that chooses a set must not drop the only layer with attention."""
    model = pico_decoder("lfm2", full_attn_idxs=[1])
    chosen = "come.merge.schedules.pairwise.best_consistent_subset"
    monkeypatch.setattr(chosen, lambda linear, pairs, size: [1, 2])
    method = build_method(read_recipe("pairwise"), {})
    with pytest.raises(ValueError, match="would leave none with attention"):
        compress(model, tokens(model), method, target_layers=2, batch_size=4, progress=False)


def test_copy_after_gradients():
    """A layer that keeps its last state can be copied, also if the state belongs to a graph."""
    model = pico_decoder("recurrent_gemma")
    adapter = ModelAdapter(model)
    model(tokens(model), use_cache=False).logits.sum().backward()
    adapter.copy_layer(0, adapter.layer_state(0))


def legacy(folder, model_type, changes, dropped=()):
    """Writes a configuration as another version of transformers would, and reads it."""
    config = {**DECODERS, **VARIANTS}[model_type]()
    config.dtype = torch.float32
    config.save_pretrained(folder)
    path = folder / "config.json"
    given = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: given[key] for key in given if key not in dropped}))
    return AutoConfig.from_pretrained(folder)


def test_names_of_the_base(tmp_path):
    """Kinds of layer keep the names that the base has for them."""
    kinds = ["mamba", "mamba", "attention", "attention"]
    config = legacy(tmp_path, "granitemoehybrid-dense", {"layer_types": kinds})
    assert config.layer_types[0] == "linear_attention"
    reindex_config(config, [0, 2, 3])
    assert derived_config(tmp_path, config, tmp_path)["layer_types"] == [kinds[0], *kinds[2:]]


def test_computed_keys(tmp_path):
    """Keys that transformers computes from others change with them."""
    pattern = {"hybrid_override_pattern": "MM**--MM", "num_hidden_layers": 8}
    config = legacy(tmp_path, "nemotron_h-dense", pattern, ["layers_block_type"])
    reindex_config(config, [0, 1, 3, 4, 6, 7])
    found = derived_config(tmp_path, config, tmp_path)
    assert found["hybrid_override_pattern"] == "MM*-MM"
    assert found["num_hidden_layers"] == 6


def test_layers_counted_from_one(tmp_path):
    """Lists in a mapping that count layers from 1 are kept in step."""
    own = {"full_attn_layers": [3, 4], "kda_layers": [1, 2, 5, 6], "head_dim": 8, "num_heads": 4}
    changes = {"linear_attn_config": own, "first_k_dense_replace": 6}
    dropped = ["layer_types", "mlp_layer_types"]
    config = legacy(tmp_path, "kimi_linear-dense", changes, dropped)
    reindex_config(config, [0, 2, 3])
    found = derived_config(tmp_path, config, tmp_path)
    assert found["linear_attn_config"] == own | {"full_attn_layers": [2, 3], "kda_layers": [1]}
    assert found["layer_types"] == ["linear_attention", "full_attention", "full_attention"]


def test_sizes_by_layer(tmp_path):
    """Layers whose heads have other sizes keep them, also if the base lists them by older names."""
    older = [*2 * ["full_attention"], *2 * ["sliding_attention"]]
    sizes = {k: v for k, v in KEYS["dots3_note_text"].items() if k.startswith("swa_")}
    changes = {"layer_types": older, "swa_qk_rope_head_dim": 6, **sizes}
    dropped = ["per_layer_config", "rope_parameters"]
    config = legacy(tmp_path, "dots3_note_text", changes, dropped)
    before = layout_of(config).layers
    reindex_config(config, [0, 2, 3])
    assert layout_of(config).layers == (before[0], before[2], before[3])
    found = derived_config(tmp_path, config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert layout_of(AutoConfig.from_pretrained(tmp_path)) == layout_of(config)


def test_text_model_of_a_wrapper(tmp_path):
    """The configuration of a text model does not contain that of the model around it."""
    wrapper, text = DECODERS["qwen3_5"](), DECODERS["qwen3_5_text"]()
    wrapper.save_pretrained(tmp_path)
    text.dtype = torch.float32
    kinds = list(text.layer_types)
    reindex_config(text, [0, 2, 3])
    found = derived_config(tmp_path, text, tmp_path)
    assert found["model_type"] == "qwen3_5_text"
    assert "vision_config" not in found
    assert "text_config" not in found
    (tmp_path / "config.json").write_text(json.dumps(found))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.layer_types == [kinds[index] for index in (0, 2, 3)]
