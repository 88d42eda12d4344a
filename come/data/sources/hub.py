"""Datasets of the Hugging Face hub, and local files read with the same loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from come.data.rows import Document, row_document
from come.data.sources.base import TEXT, TextSource
from come.errors import one_line
from come.files import local_hash


@TEXT.register
class Hub(TextSource):
    """Rows of a dataset, read in order with the streaming loader of `datasets`.

    Dataset scripts are not run. Local files need no network: `dataset=json`, `text` or `parquet`
    with `data_files`.

    Args:
        dataset: hub id, or the name of a builder.
        subset: configuration of the dataset.
        split: split of the dataset; None for "train".
        revision: branch, tag or commit.
        field: field with the text or the chat, or several fields separated by "+", which are
            joined by newlines; None for "text".
        data_files: files for a builder.
    """

    name = "hub"
    paper = ""
    source = "Hugging Face hub"

    def __init__(
        self,
        dataset: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        field: str | None = None,
        data_files: str | None = None,
    ) -> None:
        if not dataset:
            raise ValueError(
                "a hub source needs a dataset: calibration.dataset or eval.perplexity.dataset"
            )
        self.dataset = dataset
        self.subset = subset
        self.split = split or "train"
        self.revision = revision
        self.field = field or "text"
        self.data_files = data_files

    @property
    def identity(self) -> str:
        """Dataset, subset, split, revision and field, with a content hash for local files."""
        files = (self.data_files and local_hash(self.data_files)) or self.data_files
        dataset = local_hash(self.dataset) or self.dataset
        parts = (dataset, self.subset, self.split, self.revision, self.field, files)
        return " ".join(str(part) for part in parts if part)

    @property
    def content(self) -> str:
        """The content hash of local `data_files`, or else dataset, subset and split."""
        files = local_hash(self.data_files) if self.data_files else None
        return files or " ".join(filter(None, (self.dataset, self.subset, self.split)))

    def documents(self) -> Iterator[Document]:
        """The text or chat of every row, in order."""
        for row in self._rows():
            try:
                yield row_document(row, self.field)
            except ValueError as error:
                raise ValueError(
                    f"dataset {self.identity}: {error}; calibration.field or eval.perplexity.field "
                    "names the field of the text"
                ) from error

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        from datasets import load_dataset

        try:
            rows = load_dataset(
                self.dataset,
                self.subset,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
                streaming=True,
            )
            yield from rows
        except (OSError, RuntimeError, ConnectionError, ValueError) as error:
            raise ValueError(
                f"dataset {self.identity} cannot be read: {one_line(error)}. Without network take "
                "calibration=pydocs, or a file of your own: calibration=text_file "
                "calibration.path=FILE"
            ) from error
