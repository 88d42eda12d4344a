"""Models with their layers on disk, for tests."""

import tempfile
from pathlib import Path

from come.models.adapter import ModelAdapter
from come.models.loading import load_weights


def on_disk(model, folder=None, device="cpu"):
    """A copy of the model that reads its layers from disk."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        model.save_pretrained(place)
        loaded = load_weights(place, dtype="float32", device=device, weights="disk")
        if folder is None:
            rewrite_layers(loaded)
        return loaded


def rewrite_layers(model):
    """Writes all layers to scratch files that exist as long as the model."""
    adapter = ModelAdapter(model)
    for index in range(adapter.num_layers):
        adapter.write(index, dict(adapter.layer_state(index)))


def all_tensors(model):
    """All tensors of a model by name, including those of layers on disk."""
    adapter = ModelAdapter(model)
    name = adapter.layout.stack
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{name}.")}
    for index in range(adapter.num_layers):
        state = dict(adapter.layer_state(index))
        own |= {f"{name}.{index}.{key}": tensor for key, tensor in state.items()}
    return own
