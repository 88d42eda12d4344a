"""A dataset of the Hugging Face hub, or local files through the same loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from come.files import file_hash
from come.text.base import TEXT, TextSource


@TEXT.register
class Hub(TextSource):
    """Rows of a dataset, read in order by `datasets`' streaming loader.

    No script of the dataset is run. Local files work without network: `dataset=json`,
    `text` or `parquet` with `data_files`.

    Args:
        dataset: hub id, or a builder's name.
        subset: configuration of the dataset.
        split: its split.
        revision: branch, tag or commit.
        field: field of the text; several fields of a row are named with "+" between them, and
            joined by newlines.
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
            raise ValueError("a hub source needs a dataset: calibration.dataset or eval.dataset")
        self.dataset = dataset
        self.subset = subset
        self.split = split or "train"
        self.revision = revision
        self.fields = (field or "text").split("+")
        self.data_files = data_files

    @property
    def identity(self) -> str:
        """Dataset, subset, split, revision and fields; of a local file its content."""
        file = Path(self.data_files or "")
        files = file_hash(file) if self.data_files and file.is_file() else self.data_files
        fields = "+".join(self.fields)
        parts = (self.dataset, self.subset, self.split, self.revision, fields, files)
        return " ".join(str(part) for part in parts if part)

    def documents(self) -> Iterator[str]:
        """The text of every row, in order."""
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
            for row in rows:
                yield self._text(row)
        except (OSError, RuntimeError, ConnectionError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(
                f"dataset {self.identity} cannot be read: {reason}. Without network take "
                "calibration=pydocs, or a file of your own: calibration=text_file "
                "calibration.path=FILE"
            ) from error

    def _text(self, row: Mapping[str, Any]) -> str:
        for field in self.fields:
            if field not in row:
                raise ValueError(f"no field {field!r} in a row; there are {', '.join(row)}")
        return "\n".join(str(row[field]) for field in self.fields if row[field])
