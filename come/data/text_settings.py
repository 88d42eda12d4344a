"""Settings that select the source of a text: calibration, training or held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from come.data.sampling import SOURCE as SELF_GENERATED
from come.data.sources.base import TEXT, TextSource
from come.setting import HasSettings, setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


def _word(doc: str) -> Any:
    return setting(None, doc, kind=str, optional=True, counts=False)


_REPLACED = ("pydocs", SELF_GENERATED, "calibration")  # defaults, which a path replaces


@dataclass
class TextSettings(HasSettings):
    """Selects the source of a text."""

    source: str = setting("pydocs", "registry name of a text source", counts=False)
    path: Optional[str] = _word("file of text_file, which it chooses when given alone")
    dataset: Optional[str] = _word("dataset or builder of hub")
    subset: Optional[str] = _word("configuration of the dataset")
    split: Optional[str] = _word("split of the dataset")
    revision: Optional[str] = _word("branch, tag or commit of the dataset")
    field: Optional[str] = _word('field of a row that holds the text; "a+b" joins several')
    data_files: Optional[str] = _word("files of a dataset builder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path and self.source in _REPLACED:
            self.source = "text_file"

    def text_source(self) -> TextSource:
        """The text source; the text is not read yet.

        Raises:
            ValueError: the name is unknown, or a setting that the source needs is missing.
        """
        name = "text_file" if self.path else self.source
        settings = {
            key: getattr(self, key) for key in TextSettings.__dataclass_fields__ if key != "source"
        }
        return TEXT.create_from(name, settings)

    def text_identity(self) -> str:
        """Identifies the text by its content, or by its name if it cannot be read."""
        try:
            return self.text_source().identity
        except (ValueError, OSError):
            return f"unreadable {self.path or self.source}"
