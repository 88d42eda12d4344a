"""Models whose layers are on disk, for tests."""

import tempfile
from pathlib import Path

from come.models.adapter import ModelAdapter
from come.models.loading import load_weights


def on_disk(model, folder=None, device="cpu"):
    """The same model with its layers in files."""
    with tempfile.TemporaryDirectory() as made:
        place = folder or Path(made)
        model.save_pretrained(place)
        loaded = load_weights(place, dtype="float32", device=device, weights="disk")
        if folder is None:
            rewrite_layers(loaded)
        return loaded


def rewrite_layers(model):
    """Writes all layers to files that live as long as the model."""
    adapter = ModelAdapter(model)
    for index in range(adapter.num_layers):
        adapter.write(index, dict(adapter.layer_state(index)))


def all_tensors(model):
    """All tensors of a model by name, also of its layers on disk."""
    adapter = ModelAdapter(model)
    name = adapter.architecture.layers
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(f"{name}.")}
    for index in range(adapter.num_layers):
        state = dict(adapter.layer_state(index))
        own |= {f"{name}.{index}.{key}": tensor for key, tensor in state.items()}
    return own
