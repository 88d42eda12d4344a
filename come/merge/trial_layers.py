"""The layers that trial merges fit, in files, until whole sets of them have been compared."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from come.files import PARTIAL, storage_errors
from come.models.adapter import ModelAdapter
from come.stream.stream import Route

NAME = "weights-trial-"  # like folders of changed layers, which a later start removes


class TrialLayers:
    """Fitted layers by the span that each replaces, in files of this process.

    A layer in main memory would be one of a dozen and more; in files they cost disk, as much as
    that many layers of the model.

    Args:
        parent: the folder in which a folder of files is made; None for the system's temporary one.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._places: dict[tuple[int, int], int] = {}

    def add(self, first: int, last: int, route: Route) -> None:
        """Writes the layer that replaces the span first..last, the only one of its route."""
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(PARTIAL, NAME, self._parent))
        ((place, layer),) = route
        state = {name: tensor.detach().contiguous() for name, tensor in layer.state_dict().items()}
        path = self._file(first, last)
        with storage_errors(path):
            save_file(state, path)
        self._places[first, last] = place

    def __contains__(self, span: tuple[int, int]) -> bool:
        return span in self._places

    def route(self, adapter: ModelAdapter, first: int, last: int) -> Route:
        """The layer that replaces the span first..last, read from its file."""
        place = self._places[first, last]
        return [(place, adapter.copy_layer(place, load_file(self._file(first, last))))]

    def clear(self) -> None:
        """Removes all files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._places = None, {}

    def _file(self, first: int, last: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{first}-{last}.safetensors"
