"""REAP's score of routed experts."""

import pytest
import torch

from come.models.sublayers import run_layer
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.test_experts import by_expert, named, routing, states_of, tokens


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "dbrx"])
@torch.no_grad()
def test_reap_is_the_mean_over_routed_tokens(name):
    """g_e |E_e(x)|, from each expert by itself, for the tokens that the router sends to it."""
    adapter, states, keywords = states_of(named(name))
    ids = tokens(adapter.model)
    collector = StatisticsCollector(adapter, ("output_norm",))
    with LayerStream(adapter, ids, batch_size=4, progress=False) as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1, collector)
    for index in range(adapter.num_layers):
        layer, layout = adapter.layer(index), adapter.layer_layout(index)
        if layout.routed:
            sublayer = layout.sublayer("experts")
            given = routing(layer, sublayer, states, keywords[index])
            norms = by_expert(layer, sublayer.experts, given).norm(dim=-1)
            picked = given[1].T[None] == torch.arange(sublayer.count)[:, None, None]
            routed = picked.any(dim=1)
            assert (routed.sum(dim=1) > 0).all()
            assert not routed.all()
            expected = (norms * routed).sum(dim=1) / routed.sum(dim=1)
            found = collector.found[index].output_norms["expert"]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        states = run_layer(layer, states, keywords[index])
