"""experiments/bits/measure.py: rounded weights and their bytes."""

import pytest
import torch

from tests.commands import load_script
from tests.conftest import pico


@pytest.mark.parametrize(
    ("bits", "per_weight", "error"), [(16, 16, 1e-3), (8, 8.5, 0.005), (4, 4.5, 0.13)]
)
def test_rounding(bits, per_weight, error):
    model, dense = pico("llama_tied"), pico("llama_tied")
    with torch.no_grad():  # rows of whole blocks of 32 weights
        for each in (model, dense):
            for layer in each.model.layers:
                layer.mlp.down_proj.weight = torch.nn.Parameter(torch.ones(32, 32).tril())
    size = load_script("bits/measure").round_weights(model, bits)
    embeddings = model.get_input_embeddings().weight.numel()  # tied
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - embeddings
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    finer = 8.5 if bits == 4 else per_weight
    assert size == (matrices * per_weight + embeddings * finer) / 8 + vectors * 4
    for rounded, own in zip(model.parameters(), dense.parameters(), strict=True):
        assert (rounded - own).abs().max() <= error * own.abs().max()
        assert own.dim() > 1 or torch.equal(rounded, own)
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)
    )
