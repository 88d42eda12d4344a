"""The reference documentation that ships with Python."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module

from come.data.sources.base import TEXT, TextSource


@TEXT.register
class PyDocs(TextSource):
    """CPython's reference documentation, `pydoc_data.topics`: English technical prose.

    Topics repeat sections of other topics. Only the first occurrence of every paragraph is kept,
    so that disjoint parts of the text share no paragraph. The size is about 100k tokens and
    depends on the Python version.
    """

    name = "pydocs"
    paper = ""
    source = "the documentation that ships with CPython (PSF licence)"
    always_split = True

    @property
    def identity(self) -> str:
        """Name and Python version."""
        return f"pydocs {platform.python_version()}"

    def documents(self) -> Iterator[str]:
        """One document per topic, in alphabetical order, without repeated paragraphs."""
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        seen: set[str] = set()
        for title in sorted(topics):
            fresh = []
            for paragraph in topics[title].split("\n\n"):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    fresh.append(paragraph.rstrip())
            if fresh:
                yield "\n\n".join(fresh)
