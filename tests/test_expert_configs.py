"""Configurations of mixtures of experts when layers are removed, and forms that are refused."""

import pytest

from come.models.adapter import ModelAdapter
from come.models.families import layout_of
from tests.decoders import DECODERS, pico_decoder


def test_dense_layers_stay_in_step():
    """Periods of layers with experts become lists when a layer is removed."""
    for name, keys in {
        "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [5]},
        "ernie4_5_moe": {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
        "llama4_text": {"moe_layers": [1, 3, 5]},
        "glm4_moe": {"first_k_dense_replace": 3},
    }.items():
        for removed in range(6):
            model = pico_decoder(name, 6, **keys)
            adapter = ModelAdapter(model)
            before = [layout.routed for layout in adapter.layout.layers]
            first, slot = (removed - 1, 0) if removed else (0, 1)
            state = adapter.layer_state(first + slot)
            adapter.replace(first, first + 1, state, slot)
            after = [layout.routed for layout in ModelAdapter(model).layout.layers]
            again = type(model.config)(**model.config.to_dict())
            expected = before[:removed] + before[removed + 1 :]
            assert after == expected == [layout.routed for layout in layout_of(again).layers]


def test_refused_variants():
    for model_type, keys, said in [
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 2, 2]}, "moe_topk"),
    ]:
        with pytest.raises(ValueError, match=said):
            layout_of(DECODERS[model_type](**keys))
