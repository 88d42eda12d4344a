"""Scales of norms after a merge: exact, and columns of about equal size."""

import pytest
import torch

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.norms import balanced_norms, fold_norms
from come.models.adapter import ModelAdapter
from come.models.sublayers import run_layer
from tests.conftest import pico
from tests.decoders import pico_decoder
from tests.methods import come_plus, paper
from tests.test_decoders import EACH, tokens


def uneven(model, seed=3):
    """The model with scales of its norms between 1/32 and 32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(
                    torch.exp2(10 * torch.rand(parameter.shape, generator=generator) - 5)
                )
    return model


def columns(state, roles, norm):
    """Root mean square of every column of the rows that read a norm, in float64."""
    rows = [
        state[name].double().movedim(role.input_axis, -1).flatten(0, -2)
        for name, role in roles.items()
        if role.norm and role.norm.module == norm and not name.endswith("bias")
    ]
    return torch.cat(rows).square().mean(0).sqrt()


@pytest.mark.parametrize("model_type", EACH)
@torch.no_grad()
def test_a_folded_layer_stays_the_same_bit_for_bit(model_type):
    adapter = ModelAdapter(pico_decoder(model_type))
    _, keywords = adapter.layer_inputs(tokens(adapter.model))
    states = torch.randn(4, 20, adapter.config.hidden_size, generator=torch.Generator())
    for index in range(adapter.num_layers):
        roles = adapter.roles(index)
        folded = dict(fold_norms(adapter.layer_state(index), roles))
        found = balanced_norms(folded, roles)
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
            n: (t.shape, t.dtype) for n, t in folded.items()
        }
        one, other = (
            run_layer(adapter.copy_layer(index, state), states, keywords[index])
            for state in (folded, found)
        )
        assert torch.equal(other, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_columns_have_about_equal_size(dtype):
    adapter = ModelAdapter(uneven(pico("llama_gqa")).to(dtype))
    roles = adapter.roles(1)
    folded = dict(fold_norms(adapter.layer_state(1), roles))
    found = balanced_norms(folded, roles)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        before, after = columns(folded, roles, norm), columns(found, roles, norm)
        assert before.max() / before.min() > 30
        assert after.max() / after.min() < 2.1
        logs = before.log2()
        expected = torch.exp2((logs - logs.mean()).round())
        assert torch.equal(found[f"{norm}.weight"].double(), expected)
        for name, role in roles.items():
            if role.norm and role.norm.module == norm:
                assert torch.equal(found[name].double() * expected, folded[name].double())


@torch.no_grad()
def test_columns_of_zeros_and_tiny_columns():
    adapter = ModelAdapter(pico("llama_gqa"))
    roles, state = adapter.roles(0), dict(adapter.layer_state(0))
    for name, role in roles.items():
        if role.norm:
            state[name] = state[name].clone()
            state[name][:, 0], state[name][:, 1] = 0, state[name][:, 1] * 1e-9
    found = balanced_norms(dict(fold_norms(state, roles)), roles)
    assert found["input_layernorm.weight"][0] == 1
    assert found["input_layernorm.weight"][1] == 2**-8
    assert all(tensor.isfinite().all() for tensor in found.values())


def rounded(weight, block=8):
    """4 bits with one scale for each block of adjacent weights of a row."""
    blocks = weight.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((blocks / scale).round() * scale).flatten(-2)


@torch.no_grad()
def test_rounding_to_few_bits_is_finer():
    """For states that are large in channels where the norm's scale is small, as in real models."""
    adapter = ModelAdapter(uneven(pico("llama_gqa")))
    roles = adapter.roles(1)
    folded = dict(fold_norms(adapter.layer_state(1), roles))
    found = balanced_norms(folded, roles)
    for name, role in roles.items():
        if role.norm:
            scale = found[f"{role.norm.module}.weight"]
            error = (rounded(found[name]) - found[name]).square().sum()
            before = ((rounded(folded[name]) - folded[name]) / scale).square().sum()
            assert error < 0.1 * before


@torch.no_grad()
def test_merged_layers_are_balanced_and_a_plan_gives_the_same(windows):
    """Of the default method: the plan alone rebuilds the balanced layer."""
    model, again = uneven(pico("llama_gqa")), uneven(pico("llama_gqa"))
    layers = model.config.num_hidden_layers
    plan = compress(
        model, windows, come_plus(selection="cosine", m=2), target_layers=layers - 1, progress=False
    )
    apply(plan, again)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    adapter, place = ModelAdapter(model), next(i for i, s in enumerate(plan.history) if len(s) > 1)
    roles, state = adapter.roles(place), dict(adapter.layer_state(place))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        size = columns(state, roles, norm)
        assert size.max() / size.min() < 2.1
        assert state[f"{norm}.weight"].unique().numel() > 1


def test_norms_that_are_not_folded_stay(windows):
    model = uneven(pico("llama_gqa"))
    before = {n: p.clone() for n, p in model.named_parameters() if "norm" in n}
    plan = compress(model, windows, paper(m=2), target_layers=model.config.num_hidden_layers - 1)
    place = next(i for i, span in enumerate(plan.history) if len(span) > 1)
    pair = [f"model.layers.{i}.input_layernorm.weight" for i in plan.history[place]]
    mean = torch.stack([before[name] for name in pair]).mean(0)
    found = model.model.layers[place].input_layernorm.weight
    torch.testing.assert_close(found.detach(), mean)
