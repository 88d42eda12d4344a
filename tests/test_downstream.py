"""The downstream refit, against plain float64."""

import pytest
import torch

from come.merge.loop import compress
from tests.conftest import pico
from tests.methods import decoder_layers, paper, same_weights
from tests.reference import Reference
from tests.test_refit import plain_ridge

FAMILIES = ["llama_gqa", "llama_bias", "opt"]


def test_continued_plan_loses_its_downstream_refit(windows):
    method = paper(refit="ridge", downstream=0.3, protect_last=2)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=5, progress=False)
    deeper, direct = (
        compress(pico("llama_gqa"), windows, method, target_layers=4, plan=p, progress=False)
        for p in (plan, None)
    )
    assert plan.downstream.hashes
    assert deeper.hash == direct.hash
    assert plan.truncated(5).hash == plan.hash
    assert plan.truncated(5).downstream.hashes


def test_stops_have_their_own_downstream_refit(windows):
    method = paper(refit="ridge", downstream=0.3)
    seen = {}

    def on_step(plan):
        seen[plan.num_layers] = plan, [p.clone() for p in model.parameters()]

    model = pico("llama_gqa")
    compress(model, windows, method, target_layers=3, stops=[4], on_step=on_step, progress=False)
    separate = pico("llama_gqa")
    plan = compress(separate, windows, method, target_layers=4, progress=False)
    assert seen[4][0].hash == plan.hash
    assert all(map(torch.equal, seen[4][1], separate.parameters()))
    direct = pico("llama_gqa")
    compress(direct, windows, method, target_layers=3, progress=False)
    assert same_weights(model, direct)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighting", ["relative", "equal"])
@torch.no_grad()
def test_downstream_refit_is_a_regression_to_the_dense_states(weighting, family, windows):
    """After a merge of layers 2 and 3, later layers are refitted on their current inputs."""
    merged, refitted = pico(family), pico(family)
    groups = ((2, 3),)
    compress(merged, windows, paper(groups=groups), target_layers=5, progress=False)
    method = paper(groups=groups, downstream=0.5, refit__weights=weighting)
    plan = compress(refitted, windows, method, target_layers=5, progress=False)
    assert {key.split("/")[0] for key in plan.downstream.hashes} == {"3", "4"}
    dense = Reference(pico(family), windows)
    layers = decoder_layers(merged)
    for index in (3, 4):
        now = Reference(merged, windows)
        channels, states = now.inputs[index, "channel"], dense.h[index + 2].flatten(0, 1)
        old = now.output(index, "channel")
        post_attention = now.h[index + 1].flatten(0, 1) - old(channels)
        weights = 1 / states.square().mean(dim=1)
        if weighting == "equal":
            weights = torch.ones_like(weights)
        penalty = 0.5 * (weights[:, None] * channels.square()).sum(dim=0).mean()
        weight, _ = plain_ridge(
            channels, states - post_attention, weights, old.weight, old.bias, float(penalty)
        )
        layer = decoder_layers(refitted)[index]
        found = layer.fc2 if dense.is_opt else layer.mlp.down_proj
        torch.testing.assert_close(found.weight.double(), weight, rtol=1e-2, atol=1e-3)
        layers[index].load_state_dict(layer.state_dict())


def test_smaller_depth_of_a_plan_has_no_downstream_refit(windows):
    method = paper(refit="ridge", downstream=0.3, protect_last=2)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    assert plan.downstream.hashes
    assert not plan.truncated(5).downstream.hashes
