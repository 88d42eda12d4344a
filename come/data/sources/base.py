"""The interface of text sources, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from come.data.rows import Document
from come.registry import Registry


class TextSource(ABC):
    """A corpus, read as documents in a fixed order.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the corpus, or "".
        source: description of where the text comes from.
        always_split: whether calibration and evaluation always use separate parts of the text,
            because the corpus has no held-out split.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    always_split: ClassVar[bool] = False
    part: tuple[float, float] | None = None  # fractions of the text to evaluate on, if set

    @property
    @abstractmethod
    def identity(self) -> str:
        """Identifies the text: equal for two sources with the same text, and never a path."""

    @property
    def content(self) -> str:
        """Identifies the corpus: equal for sources that read it by different fields or loaders."""
        return self.identity

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, in order, as text or as chats for the tokenizer's chat template.

        Raises:
            ValueError: the corpus is missing or cannot be read; the message says what to do.
        """

    def check(self) -> None:  # noqa: B027 - most sources have nothing to check
        """Runs cheap checks before anything is loaded.

        Raises:
            ValueError: the corpus is missing or its format is not supported.
        """


TEXT: Registry[TextSource] = Registry("text source", "come.data.sources", "calibration.source")
