"""The teacher's hidden states on disk, so that training needs no teacher in memory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from come.distill.hidden_states import states_by_layer
from come.files import new_file, write_bytes, write_text
from come.models.adapter import ModelAdapter
from come.progress import ProgressBar
from come.stream.boundaries import MappedStates

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**16


class StoredStates:
    """Hidden states of all windows after some of the teacher's layers, in files of a folder.

    The states are in the teacher's dtype, so that they are those of a live teacher:
    2 bytes x hidden x layers a token in bfloat16. Each file, a shard, has the states of
    consecutive windows, [windows, layers, seq, hidden], and is mapped into memory only while
    windows of it are read. It appears under its name when it is complete, so an interrupted pass
    continues with the next shard. The token ids are stored beside them.

    Args:
        folder: folder of the files; only states of these windows, layers and weights may be in it.
        ids: token ids of the windows.
        after: teacher's layers after which states are stored; -1 for the output of the embeddings.
        hidden: size of the hidden states.
        dtype: the teacher's dtype.
        shard_tokens: largest number of tokens in a shard.
    """

    def __init__(
        self,
        folder: Path,
        ids: Int[Tensor, "windows seq"],
        after: Sequence[int],
        hidden: int,
        dtype: torch.dtype,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.ids, self.after, self.dtype = folder, ids, tuple(after), dtype
        self._hidden = hidden
        self._windows = max(1, shard_tokens // ids.shape[1])  # of a shard

    @property
    def size(self) -> int:
        """Bytes of all states."""
        return self.ids.numel() * len(self.after) * self._hidden * self.dtype.itemsize

    @property
    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        count = -(-len(self.ids) // self._windows)
        return [number for number in range(count) if not self._path(number).is_file()]

    def write(
        self, teacher: ModelAdapter, batch: int, *, rank: int = 0, processes: int = 1
    ) -> None:
        """Runs the teacher on the windows of all missing shards, or on a process's share of them.

        Args:
            teacher: the dense model.
            batch: windows of a forward pass.
            rank: index of this process.
            processes: number of processes, all of which must call this.

        Raises:
            ValueError: the disk is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".lock-{rank}-of-{processes}"):
            missing = self.missing
            own = [number for number in missing if number % processes == rank]
            if not own:
                return
            self._check_space(len(missing))
            shown = rank == 0
            total = sum(len(self._rows(number)) for number in own) * self.ids.shape[1]
            with ProgressBar(total=total, desc="teacher", unit="token", shown=shown) as bar:
                for number in own:
                    self._write_shard(number, teacher, batch, bar)
            if rank == 0:
                write_bytes(self.folder / "tokens.safetensors", save({"windows": self.ids}))
                about = {"after": self.after, "hidden": self._hidden, "dtype": str(self.dtype)}
                write_text(self.folder / "about.json", json.dumps(about))

    @torch.no_grad()
    def _write_shard(
        self, number: int, teacher: ModelAdapter, batch: int, bar: ProgressBar
    ) -> None:
        with new_file(self._path(number)) as partial, open(partial, "wb") as file:
            for rows in torch.tensor(self._rows(number)).split(batch):
                found = states_by_layer(teacher, self.ids[rows], max(self.after), self.after)
                states = torch.stack([found[index] for index in self.after], dim=1)
                raw = states.to(self.dtype).cpu().contiguous().view(torch.uint8)
                raw.numpy().tofile(file)
                bar.update(self.ids[rows].numel())

    def read(self, rows: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch seq hidden"], ...]:
        """The states of some windows after each layer of `after`, on the CPU."""
        found = []
        for row in rows.tolist():
            number, index = divmod(row, self._windows)
            seq, layers = self.ids.shape[1], len(self.after)
            shape = (len(self._rows(number)) * layers, seq, self._hidden)
            mapped = MappedStates(self._path(number), shape, self.dtype).open()
            found.append(mapped[index * layers : (index + 1) * layers].clone())
        return torch.stack(found).unbind(1)

    def _rows(self, number: int) -> range:
        return range(number * self._windows, min((number + 1) * self._windows, len(self.ids)))

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.bin"

    def _check_space(self, missing: int) -> None:
        count = -(-len(self.ids) // self._windows)
        needed, free = self.size * missing / count, shutil.disk_usage(self.folder).free
        if free < needed:
            raise ValueError(
                f"distill.teacher=stored: the teacher's hidden states take {needed / 1e9:.2f} GB "
                f"in {self.folder}, where {free / 1e9:.2f} GB are free; set COME_CACHE=FOLDER to a "
                "larger disk, lower distill.tokens, or take distill.teacher=live"
            )
