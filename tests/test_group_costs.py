"""experiments/group_costs.py: candidate spans, KL divergence and loss."""

import pytest
import torch

from tests.commands import load_script
from tests.conftest import pico


@pytest.fixture(scope="module")
def costs():
    return load_script("group_costs")


def test_candidates_have_the_lowest_angles_of_their_size(costs, windows, monkeypatch):
    monkeypatch.setattr(costs, "LOWEST", {2: 2, 3: 1})
    model = pico("llama_mha")
    found = costs.candidates(model, windows)
    assert [last - first + 1 for _, first, last in found] == [2, 2, 3]
    monkeypatch.setattr(costs, "LOWEST", {2: 99})
    every = costs.candidates(model, windows)
    assert len(every) == model.config.num_hidden_layers - 1
    assert every[:2] == found[:2]
    assert every == sorted(every)


def test_divergence_and_loss(costs, windows):
    dense, merged = pico("llama_mha"), pico("llama_mha", seed=1)
    assert costs.divergence(dense, dense, windows) == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        p = dense(input_ids=windows).logits.double().softmax(-1)
        q = merged(input_ids=windows).logits.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert costs.divergence(dense, merged, windows) == pytest.approx(kl.mean().item(), rel=1e-4)
    tail = costs.divergence(dense, merged, windows, begin=5)
    assert tail == pytest.approx(kl[:, 5:].mean().item(), rel=1e-4)
    likely = p[:, :-1].gather(-1, windows[:, 1:, None])
    assert costs.loss(dense, windows) == pytest.approx(-likely.log().mean().item(), rel=1e-4)
