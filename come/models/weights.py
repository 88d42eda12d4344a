"""Decoder layers whose weights stay on disk: a layer is in memory only while it is used."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from come.files import PARTIAL, storage_errors, write_text
from come.memory import return_freed_memory
from come.models.buffers import make_buffers
from come.models.checkpoint import tensor_headers
from come.models.families import prepare
from come.models.layer_state import LayerState, LazyState
from come.weak import weak_method

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PREFIX = "weights-"  # of the folders of changed layers
_ATTRIBUTE = "come_layers"
_RENAMED = "; transformers stores this type under other names, so take model.weights=memory"
_BUFFERS = r"rotary_emb\.inv_freq$"  # in checkpoints of old versions


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: the file, the tensor's name there, and its shape."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor in main memory. The file is not kept mapped, which frees its pages."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name).clone()


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from the headers of its files."""
    return {
        name: StoredTensor(path, name, tuple(entry["shape"]))
        for path, name, entry in tensor_headers(folder)
    }


class LayersOnDisk:
    """Loads a decoder layer of a model when it runs, and frees the one that ran before.

    While layers run in order, the next one is read by a second thread. The parameters of a layer
    that is not loaded are on the meta device. Changed layers are written to files of their own,
    which are removed together with the model.

    Args:
        layers: the decoder layers of the model.
        tensors: for every layer its tensors on disk, by their names relative to the layer.
        dtype: dtype of loaded layers.
        device: device of loaded layers.
        folder: parent of the folder for changed layers; None for the system's temporary folder.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        tensors: Sequence[dict[str, StoredTensor]],
        dtype: torch.dtype,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.layers = layers
        self._tensors = dict[nn.Module, dict[str, StoredTensor]](zip(layers, tensors, strict=True))
        self._parent = folder
        self._folder: Path | None = None
        self._written = 0
        self._loaded: nn.Module | None = None
        self._prefetched: tuple[nn.Module, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layer reader")
        before = weak_method(self._before_forward)
        for layer in layers:
            layer.register_forward_pre_hook(before)

    def state(self, layer: nn.Module) -> LayerState:
        """The tensors of a layer, each read whenever it is needed."""
        return LazyState(
            {name: partial(self._tensor, layer, name) for name in self._tensors[layer]}
        )

    def load(self, layer: nn.Module) -> None:
        """Loads the weights of a layer to the device, unless they are already there.

        Raises:
            ValueError: a weight is not finite.
        """
        if layer is self._loaded:
            return
        order = list(self.layers)
        place = order.index(layer)
        in_turn = place > 0 and order[place - 1] is self._loaded
        prefetched, self._prefetched = self._prefetched, None
        self.free()
        is_prefetched = prefetched is not None and prefetched[0] is layer
        found = prefetched[1].result() if prefetched and is_prefetched else self._read(layer)
        if in_turn and place + 1 < len(order):
            following = order[place + 1]
            self._prefetched = following, self._reader.submit(self._read, following)
        tensors: dict[str, Tensor] = {}
        for name in list(found):
            tensors[name] = self._to_device(found.pop(name))
            low, high = torch.aminmax(tensors[name])
            if not (math.isfinite(low) and math.isfinite(high)):
                stored = self._tensors[layer][name].name
                raise ValueError(
                    f"the weights {stored} are not finite in {self.dtype}; "
                    "the checkpoint is damaged, or model.dtype is too narrow for it"
                )
        layer.load_state_dict(tensors, assign=True)
        self._loaded = layer

    def free(self) -> None:
        """Frees the weights of the loaded layer, and of the prefetched one."""
        layer, self._loaded, self._prefetched = self._loaded, None, None
        if layer is not None:
            state = layer.state_dict()
            blank = {name: torch.empty_like(state[name], device="meta") for name in state}
            layer.load_state_dict(blank, assign=True)

    def write(self, layer: nn.Module, state: LayerState) -> None:
        """Replaces all tensors of a layer on disk."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(PARTIAL, _PREFIX, self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._written += 1
        path = self._folder / f"{self._written}.safetensors"
        before = self._tensors[layer]
        tensors = {name: state[name].to("cpu", self.dtype).contiguous() for name in before}
        with storage_errors(path):
            save_file(tensors, path)
        if layer is self._loaded:
            self.free()
        self._prefetched = None
        self._tensors[layer] = {
            name: StoredTensor(path, name, tuple(tensor.shape)) for name, tensor in tensors.items()
        }
        for old in {stored.path for stored in before.values() if stored.path.parent == path.parent}:
            old.unlink()

    def read(self, layer: nn.Module, name: str) -> Tensor:
        """One tensor of a layer in main memory, in the dtype of loaded layers."""
        return self._tensors[layer][name].read().to(self.dtype)

    def _tensor(self, layer: nn.Module, name: str) -> Tensor:
        if layer is self._loaded:
            return layer.state_dict()[name]
        return self._to_device(self._tensors[layer][name].read())

    def _before_forward(self, layer: nn.Module, inputs: object) -> None:
        if "forward" not in vars(layer):  # a recorder that replaces the layer needs no weights
            self.load(layer)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _read(self, layer: nn.Module) -> dict[str, Tensor]:
        tensors = self._tensors[layer]
        found: dict[str, Tensor] = {}
        for path in {stored.path for stored in tensors.values()}:
            with safe_open(path, framework="pt") as file:
                for name, stored in tensors.items():
                    if stored.path == path:
                        found[name] = file.get_tensor(stored.name).clone()
        return found


def layers_on_disk(model: PreTrainedModel) -> LayersOnDisk | None:
    """The loader of a model's layers; None if all of its weights are in memory."""
    found: LayersOnDisk | None = vars(model).get(_ATTRIBUTE)
    return found


def remove_changed_layers(folder: Path) -> None:
    """Removes the changed layers of finished or killed runs from a job folder."""
    for left in folder.glob(f"{_PREFIX}*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def open_weights(
    folder: Path,
    config: PretrainedConfig,
    layers: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint with its decoder layers on disk, in evaluation mode.

    Embeddings, the final norm and the head are in memory.

    Args:
        folder: a checked checkpoint.
        config: its configuration.
        layers: name of the module list of decoder layers.
        dtype: dtype of the weights in memory.
        device: device of the weights in memory.
        scratch: parent of the folder for changed layers; None for the system's temporary folder.
        trust_remote_code: whether code of the repository may run.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    return_freed_memory()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    found = _places(folder, model)
    make_buffers(model, device)
    stored = {id(tensor): found[name] for name, tensor in _saved_tensors(model).items()}
    prepare(model)
    for name, tensor in _saved_tensors(model).items():
        if not name.startswith(f"{layers}."):
            _set(model, name, stored[id(tensor)].read().to(device, tensor.dtype))
    model.tie_weights()
    stack = model.get_submodule(layers)
    assert isinstance(stack, nn.ModuleList)
    tensors = [
        {name: stored[id(tensor)] for name, tensor in _saved_tensors(layer).items()}
        for layer in stack
    ]
    vars(model)[_ATTRIBUTE] = LayersOnDisk(stack, tensors, dtype, device, scratch)
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def save_weights(model: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    """Writes the weights of a model in shards, with their index; only one shard is in memory.

    Args:
        model: a model with layers on disk.
        folder: an existing folder.
        shard_bytes: maximum size of a shard, unless a single tensor is larger.
    """
    on_disk = layers_on_disk(model)
    assert on_disk is not None
    stored = {
        id(tensor): partial(on_disk.read, layer, name)
        for layer in on_disk.layers
        for name, tensor in _saved_tensors(layer).items()
    }
    named = {id(t): name for name, t in reversed(model.state_dict(keep_vars=True).items())}
    tensors = {named[id(tensor)]: tensor for tensor in _saved_tensors(model).values()}
    split = split_torch_state_dict_into_shards(
        {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()},
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {n: stored.get(id(tensors[n]), tensors[n].detach().cpu)() for n in names}
        with storage_errors(folder / file):
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _places(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Where every tensor of the model is stored, also under its name without the base's prefix.

    Raises:
        ValueError: a tensor is missing or has another shape, or a stored tensor is not used.
    """
    stored, prefix = stored_tensors(folder), f"{model.base_model_prefix}."
    found: dict[str, StoredTensor] = {}
    wrong: list[str] = []
    for name, tensor in _saved_tensors(model).items():
        names = [name, name.removeprefix(prefix), prefix + name]
        place = next((stored[other] for other in names if other in stored), None)
        if place is None or place.shape != tuple(tensor.shape):
            wrong.append(name)
        else:
            found[name] = place
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - found.keys()
    known = {place.name for place in found.values()} | shared
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    wrong += [
        name
        for name in sorted(stored.keys() - known)
        if not any(re.search(pattern, name) for pattern in (*ignored, _BUFFERS))
    ]
    if wrong:
        raise ValueError(
            f"model folder {folder}: its weights do not fit its configuration: missing, too many, "
            f"or of another shape are {', '.join(wrong[:3])} ({len(wrong)} in all)"
            + (_RENAMED if _is_renamed(model) else "")
        )
    return found


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module, and the buffers that belong to its checkpoint."""
    saved = module.state_dict()
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def _is_renamed(model: PreTrainedModel) -> bool:
    """Whether transformers stores the weights of this type of model under other names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(model.config.model_type))


def _set(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(value) if is_parameter else value)
