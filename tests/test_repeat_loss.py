"""experiments/repeat_loss.py: kinds of tokens, and zeroed attention."""

import pytest
import torch

from tests.commands import load_script
from tests.conftest import pico


@pytest.fixture(scope="module")
def repeat_loss():
    return load_script("repeat_loss")


def test_kinds_of_tokens(repeat_loss):
    ids = torch.tensor([[1, 2, 3, 1, 2, 1, 3]])
    every, new, seen, pair = (kind[0].tolist() for kind in repeat_loss.token_kinds(ids))
    assert every == [True] * 6
    assert new == [True, True, False, False, False, False]
    assert pair == [False, False, False, True, False, False]
    assert seen == [False, False, True, False, True, True]


def test_token_nll_and_zeroing_one_attention_at_a_time(repeat_loss, windows):
    model = pico("llama_mha")
    before = repeat_loss.token_nll(model, windows)
    whole = model(input_ids=windows, labels=windows).loss
    assert float(before.mean()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for _, changed in repeat_loss.without_attention(model):
        assert not torch.allclose(repeat_loss.token_nll(changed, windows), before)
    assert torch.equal(repeat_loss.token_nll(model, windows), before)
