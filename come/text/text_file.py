"""A text file of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from come.files import file_hash
from come.text.base import TEXT, TextSource

SUFFIXES = (".txt", ".jsonl", ".parquet")


@TEXT.register
class TextFile(TextSource):
    """Text from a `.txt` file (one document), or from a field of `.jsonl` or `.parquet` rows.

    Args:
        path: the file.
        field: the field that holds the text of a row.
    """

    name = "text_file"
    paper = ""
    source = "a file of the user's"

    def __init__(self, path: str | None = None, field: str | None = None) -> None:
        if not path:
            raise ValueError(
                "text_file needs a file: calibration.path=FILE or eval.path=FILE "
                f"({', '.join(SUFFIXES)})"
            )
        self.path = Path(path).expanduser()
        self.field = field or "text"

    @cached_property
    def identity(self) -> str:
        """Hash of the file's content."""
        self.check()
        return f"file {file_hash(self.path)} {self.field}"

    def check(self) -> None:
        """Raises ValueError for a missing or empty file, or one of an unknown kind."""
        if not self.path.is_file():
            raise ValueError(f"text file {self.path} does not exist")
        if self.path.suffix not in SUFFIXES:
            raise ValueError(
                f"text file {self.path}: the ending must be one of {', '.join(SUFFIXES)}"
            )
        if self.path.stat().st_size == 0:
            raise ValueError(f"text file {self.path} is empty")

    def documents(self) -> Iterator[str]:
        """The file's documents, in order."""
        self.check()
        try:
            if self.path.suffix == ".txt":
                yield self.path.read_text(encoding="utf-8")
            elif self.path.suffix == ".jsonl":
                with open(self.path, encoding="utf-8") as file:
                    for line in file:
                        if line.strip():
                            yield str(json.loads(line)[self.field] or "")
            else:
                yield from self._parquet()
        except KeyError as error:
            raise ValueError(
                f"text file {self.path} has a row without the field {error}; set calibration.field "
                "or eval.field to the one that holds the text"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"text file {self.path} cannot be read: {error}") from error

    def _parquet(self) -> Iterator[str]:
        from pyarrow import ArrowInvalid, parquet

        try:
            table = parquet.ParquetFile(self.path)
            names = table.schema_arrow.names
        except ArrowInvalid as error:
            raise ValueError(f"text file {self.path} is not parquet: {error}") from error
        if self.field not in names:
            raise KeyError(self.field)
        for batch in table.iter_batches(columns=[self.field]):
            yield from (str(text) for text in batch.column(0).to_pylist() if text)
