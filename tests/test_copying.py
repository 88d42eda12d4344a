"""The script that tells new tokens from repeated passages: what counts as which."""

import pytest
import torch

from tests.commands import load_script
from tests.conftest import pico


@pytest.fixture(scope="module")
def copying():
    return load_script("copying")


def test_what_is_new_seen_and_a_pair(copying):
    ids = torch.tensor([[1, 2, 3, 1, 2, 1, 3]])
    every, new, seen, pair = (kind[0].tolist() for kind in copying.kinds_of(ids))
    assert every == [True] * 6
    assert new == [True, True, False, False, False, False]
    assert pair == [False, False, False, True, False, False]
    assert seen == [False, False, True, False, True, True]


def test_the_loss_of_every_token_and_one_attention_silenced_at_a_time(copying, windows):
    model = pico("llama_mha")
    before = copying.token_nll(model, windows)
    whole = model(input_ids=windows, labels=windows).loss
    assert float(before.mean()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for _, silenced in copying.without_attention(model):
        assert not torch.allclose(copying.token_nll(silenced, windows), before)
    assert torch.equal(copying.token_nll(model, windows), before)
