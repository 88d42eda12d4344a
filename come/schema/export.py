"""Settings of what happens to the model after the run: `export` and `hub`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from come.export.gguf import TYPES, find_converter
from come.export.hub import check_push
from come.setting import HasSettings, setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class ExportSettings(HasSettings):
    """`export`: files for other programs, beside the model folder."""

    config_key = "export"

    format: str = setting("none", "format of the files", choices=("none", "gguf"), counts=False)
    types: Any = setting(
        ["f16"], "weight formats, one file each", kind=list, choices=TYPES, counts=False
    )
    converter: Optional[str] = setting(
        None,
        "llama.cpp's convert_hf_to_gguf.py, or its folder; null for the one on the PATH",
        kind=str,
        optional=True,
        counts=False,
    )

    def check(self) -> None:
        """Raises ValueError if the converter is not there or no format is given."""
        if self.format == "none":
            return
        if not self.types:
            raise ValueError("export.types=[] would write nothing; leave out export=gguf")
        find_converter(self.converter)


@dataclass
class HubSettings(HasSettings):
    """`hub`: uploads the finished model with its card to the Hugging Face hub."""

    config_key = "hub"

    push: Optional[str] = setting(
        None, "the repository, USER/NAME", kind=str, optional=True, counts=False
    )
    private: bool = setting(True, "whether a new repository is private", counts=False)

    def check(self) -> None:
        """Raises ValueError if `push` is not USER/NAME or there is no token."""
        if self.push is not None:
            check_push(self.push)
