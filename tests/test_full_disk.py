"""Tensors that cannot be written raise OSError with number and path: a job says it in one line."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from come.distill.progress import Progress, save_progress
from come.merge.plan import BaseModel, Plan
from come.merge.saving import save_model
from come.merge.trial_layers import TrialLayers
from come.models.adapter import ModelAdapter
from come.models.loading import load_tokenizer
from come.models.weights import layers_on_disk, save_weights
from tests.bases import save_base
from tests.conftest import pico
from tests.disk import on_disk


@contextmanager
def small_files():
    """Files of this process cannot grow over 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint(tmp_path):
    weight = nn.Parameter(torch.zeros(64, 64))
    return lambda: save_progress(tmp_path / "out", "job", Progress(step=1), {"w": weight}, {}, None)


def trial_layer(tmp_path):
    layers, layer = TrialLayers(tmp_path / "out"), ModelAdapter(pico("llama_gqa")).layer(2)
    return lambda: layers.add(2, 3, [(2, layer)])


def changed_layer(tmp_path):
    model = on_disk(pico("llama_gqa"), tmp_path)
    adapter = ModelAdapter(model)
    state = dict(adapter.layer_state(2))
    return lambda: adapter.write(2, state)


def shards(tmp_path):
    model = on_disk(pico("llama_gqa"), tmp_path)
    (tmp_path / "out").mkdir()
    assert layers_on_disk(model) is not None
    return lambda: save_weights(model, tmp_path / "out", 1 << 20)


def whole_model(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    model, tokenizer = pico("llama_gqa"), load_tokenizer(base)
    plan = Plan(BaseModel.of(ModelAdapter(model)), "concat", "fold")
    return lambda: save_model(model, tokenizer, tmp_path / "out" / "model", plan)


@pytest.mark.parametrize("made", [checkpoint, trial_layer, changed_layer, shards, whole_model])
def test_the_error_has_number_and_path(made, tmp_path):
    write = made(tmp_path)
    with small_files(), pytest.raises(OSError, match="tensors cannot be written") as found:
        write()
    assert found.value.errno == errno.EFBIG
    assert found.value.filename
    assert not (tmp_path / "out" / "model").exists()
