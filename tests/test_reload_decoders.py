"""Merged decoders of every type, loaded in a new process."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from come.merge.loop import compress
from come.models.adapter import ModelAdapter
from tests.commands import ROOT
from tests.methods import paper
from tests.reload_decoders import results
from tests.test_decoders import TYPES, mergeable_decoder, tokens


@pytest.mark.slow
def test_merged_decoders_load_in_a_new_process(tmp_path):
    """The same logits and continuations, with the cache and without."""
    for model_type in TYPES:
        model, kinds = mergeable_decoder(model_type)
        layers = ModelAdapter(model).num_layers
        windows = tokens(model, 8)
        compress(model, windows, paper(kinds=kinds), target_layers=layers - 1, progress=False)
        found = results(model, tokens(model))
        assert torch.equal(found["cached"], found["uncached"]), model_type
        model.save_pretrained(tmp_path / model_type)
        save_file(
            {key: tensor.contiguous() for key, tensor in found.items()},
            tmp_path / model_type / "expected.safetensors",
        )
    ended = subprocess.run(
        [sys.executable, "-m", "tests.reload_decoders", *sorted(map(str, tmp_path.iterdir()))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert not ended.stdout, ended.stdout
