"""A text file of the user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from come.data.rows import Document, row_document
from come.data.sources.base import TEXT, TextSource
from come.files import file_hash

SUFFIXES = (".txt", ".jsonl", ".parquet")


@TEXT.register
class TextFile(TextSource):
    """Text from a `.txt` file (one document), or from fields of `.jsonl` or `.parquet` rows.

    Args:
        path: the file.
        field: field of a row with the text or the chat, or several fields separated by "+", which
            are joined by newlines; None for "text".
    """

    name = "text_file"
    paper = ""
    source = "a file of the user's"

    def __init__(self, path: str | None = None, field: str | None = None) -> None:
        if not path:
            raise ValueError(
                "text_file needs a file: calibration.path=FILE or eval.perplexity.path=FILE "
                f"({', '.join(SUFFIXES)})"
            )
        self.path = Path(path).expanduser()
        self.field = field or "text"

    @cached_property
    def identity(self) -> str:
        """Hash of the file's content; for rows also the file's kind and the field."""
        self.check()
        kind = "" if self.path.suffix == ".txt" else f" {self.path.suffix[1:]} {self.field}"
        return f"file {file_hash(self.path)}{kind}"

    @property
    def content(self) -> str:
        """Hash of the file's content."""
        self.check()
        return file_hash(self.path)

    def check(self) -> None:
        """Raises ValueError if the file is missing, empty or of an unknown kind."""
        if not self.path.is_file():
            raise ValueError(f"text file {self.path} does not exist")
        if self.path.suffix not in SUFFIXES:
            raise ValueError(
                f"text file {self.path}: the ending must be one of {', '.join(SUFFIXES)}"
            )
        if self.path.stat().st_size == 0:
            raise ValueError(f"text file {self.path} is empty")

    def documents(self) -> Iterator[Document]:
        """The file's documents, in order."""
        self.check()
        try:
            if self.path.suffix == ".txt":
                yield self.path.read_text(encoding="utf-8")
            elif self.path.suffix == ".jsonl":
                for number, row in self._json_rows():
                    yield self._document(row, f"line {number}")
            else:
                for number, row in enumerate(self._parquet_rows(), start=1):
                    if document := self._document(row, f"row {number}"):
                        yield document
        except UnicodeDecodeError as error:
            raise ValueError(f"text file {self.path} cannot be read: {error}") from error

    def _document(self, row: Any, place: str) -> Document:
        if not isinstance(row, dict):
            raise ValueError(  # noqa: TRY004 - the file's fault, not the caller's
                f"text file {self.path} cannot be read: {place} is no JSON object"
            )
        try:
            return row_document(row, self.field)
        except ValueError as error:
            raise ValueError(
                f"text file {self.path}, {place}: {error}; calibration.field or "
                "eval.perplexity.field names the field of the text"
            ) from error

    def _json_rows(self) -> Iterator[tuple[int, Any]]:
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"text file {self.path} cannot be read: line {number} is no JSON: {error}"
                    ) from error
                if line.strip():
                    yield number, row

    def _parquet_rows(self) -> Iterator[Any]:
        from pyarrow import ArrowInvalid, parquet

        try:
            table = parquet.ParquetFile(self.path)
            names = table.schema_arrow.names
        except ArrowInvalid as error:
            raise ValueError(f"text file {self.path} is not parquet: {error}") from error
        own = [name for name in names if name in (self.field, *self.field.split("+"))]
        for batch in table.iter_batches(columns=own or names):
            yield from batch.to_pylist()
