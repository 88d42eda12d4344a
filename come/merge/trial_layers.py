"""The layers that trial merges fit, in files, until whole sets of them have been compared."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from come.files import PARTIAL, new_file, read_again, storage_errors
from come.models.adapter import ModelAdapter
from come.stream.stream import Route

NAME = "trial-layers-"


class TrialLayers:
    """Fitted layers by the span that each replaces, in files first-last-place.safetensors.

    A layer in main memory would be one of a dozen and more; in files they cost disk, as much as
    that many layers of the model.

    Args:
        parent: the folder in which a folder of files is made; None for the system's temporary one.
        kept: job and model, "JOB-MODEL", of files in `parent` for later sessions; None for files of
            this process.
    """

    def __init__(self, parent: Path | None = None, kept: str | None = None) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._files: dict[tuple[int, int], Path] = {}
        if parent is not None and kept is not None:
            self._folder = parent / (NAME + kept)
            for path in self._folder.glob("*.safetensors"):
                if span := read_again(path, _span):
                    self._files[span] = path

    def add(self, first: int, last: int, route: Route) -> None:
        """Writes the layer that replaces the span first..last, the only one of its route."""
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(PARTIAL, NAME, self._parent))
        self._folder.mkdir(parents=True, exist_ok=True)
        ((place, layer),) = route
        state = {name: tensor.detach().contiguous() for name, tensor in layer.state_dict().items()}
        path = self._folder / f"{first}-{last}-{place}.safetensors"
        with storage_errors(path), new_file(path) as partial:
            save_file(state, partial)
        self._files[first, last] = path

    def __contains__(self, span: tuple[int, int]) -> bool:
        return span in self._files

    def route(self, adapter: ModelAdapter, first: int, last: int) -> Route:
        """The layer that replaces the span first..last, read from its file."""
        path = self._files[first, last]
        place = int(path.stem.split("-")[2])
        return [(place, adapter.copy_layer(place, load_file(path)))]

    def clear(self) -> None:
        """Removes all files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._files = None, {}


def _span(path: Path) -> tuple[int, int]:
    """First and last layer of a file whose header and length are sound."""
    with safe_open(path, "pt"):
        first, last, _ = map(int, path.stem.split("-"))
        return first, last


def remove_trial_layers(folder: Path, job: str | None = None) -> None:
    """Removes trial layers in a job folder, except those of the job."""
    for left in folder.glob(f"{NAME}*"):
        if job is None or not left.name.startswith(f"{NAME}{job}-"):
            shutil.rmtree(left, ignore_errors=True)


def trial_layers_bytes(folder: Path) -> int:
    """Size of all trial layers in a job folder, which its next start reads or removes."""
    size = 0
    with suppress(FileNotFoundError):  # another process of the job has just removed them
        for path in folder.glob(f"{NAME}*/*.safetensors"):
            size += path.stat().st_size
    return size
