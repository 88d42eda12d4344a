"""The refit by Adam steps."""

import math

import pytest
import torch

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.refit import adam
from tests.conftest import pico
from tests.methods import paper, same_weights
from tests.reference import Reference


def test_adam_improves_on_ridge(windows):
    dense = Reference(pico("llama_bias"), windows).h

    def error(refit, **options):
        model = pico("llama_bias")
        method = paper(groups=((2, 3),), refit=refit, options=options)
        plan = compress(model, windows, method, target_layers=5, progress=False)
        assert same_weights(apply(plan, pico("llama_bias")), model)
        per_token = (Reference(model, windows).h[3] - dense[4]).square().mean(dim=-1)
        return float((per_token / dense[4].square().mean(dim=-1)).mean())

    closed = error("ridge")
    assert error("adam", steps=100, learning_rate=1e-3) < 0.8 * closed
    assert error("adam", steps=1, learning_rate=1e-9) == pytest.approx(closed, rel=1e-4)


def test_adam_follows_its_schedule(windows, monkeypatch):
    """A cosine from the first learning rate, and one batch after another."""
    rates, batches = [], []
    step, batch = torch.optim.Adam.step, adam.TargetBatch

    def recorded(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    monkeypatch.setattr(adam, "TargetBatch", lambda t, i: batches.append(i) or batch(t, i))
    method = paper(groups=((2, 3),), refit="adam", options={"steps": 4, "learning_rate": 1e-3})
    compress(pico("llama_gqa"), windows, method, target_layers=5, batch_size=2, progress=False)
    expected = [1e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates == pytest.approx(expected)
    assert batches == [0, 1, 2, 0]


def test_steps_are_float32_in_half_precision(windows, monkeypatch):
    seen, step = set(), torch.optim.Adam.step

    def recorded(self, *args):
        seen.update(p.dtype for group in self.param_groups for p in group["params"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    model = pico("llama_gqa").bfloat16()
    method = paper(groups=((2, 3),), refit="adam", options={"steps": 2})
    plan = compress(model, windows, method, target_layers=5, progress=False)
    assert seen == {torch.float32}
    assert {t.dtype for t in plan.steps[0].solved.tensors.values()} == {torch.bfloat16}
    assert same_weights(apply(plan, pico("llama_gqa").bfloat16()), model)
