"""Documents given in Python as a text source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from come.data.rows import Document
from come.data.sources.base import TextSource


class Documents(TextSource):
    """A list of documents, which is read like a file with one document per row."""

    name = "documents"
    paper = ""
    source = "documents given in Python"

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    @property
    def identity(self) -> str:
        """Hash of the documents."""
        joined = "\n\n".join(self.texts)
        return f"documents {hashlib.sha256(joined.encode()).hexdigest()[:16]}"

    def documents(self) -> Iterator[Document]:
        """The documents, in order."""
        yield from self.texts
