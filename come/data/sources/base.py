"""What a text source gives; the registry of text sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from come.data.rows import Document
from come.registry import Registry


class TextSource(ABC):
    """A corpus: documents in a fixed order.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the corpus, or "".
        source: where the text comes from, in words.
        always_split: whether it has no held-out split of its own although it is used for both
            calibration and evaluation, so that each takes its part of it.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    always_split: ClassVar[bool] = False
    part: tuple[float, float] | None = None  # the share of it that evaluates, where it is given

    @property
    @abstractmethod
    def identity(self) -> str:
        """Equal for two sources that hold the same text; never a path."""

    @property
    def content(self) -> str:
        """What two sources share that read one corpus, perhaps by other fields or loaders."""
        return self.identity

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, in order: text, or chats for the tokenizer's template.

        Raises:
            ValueError: the corpus is not there or cannot be read; says what to do.
        """

    def check(self) -> None:  # noqa: B027 - most sources have nothing to check
        """Cheap checks before anything is loaded.

        Raises:
            ValueError: the corpus cannot be there.
        """


TEXT: Registry[TextSource] = Registry("text source", "come.data.sources", "calibration.source")
