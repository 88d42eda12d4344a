"""The reference documentation that comes with Python itself."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module

from come.data.sources.base import TEXT, TextSource


@TEXT.register
class PyDocs(TextSource):
    """CPython's reference documentation, `pydoc_data.topics`: English technical prose.

    Topics repeat each other's sections; every paragraph is kept once, where it first comes, so
    that parts cut by position share none. Its size depends on the version of Python, about
    100k tokens.
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
        """One document a topic, in alphabetical order, without repeated paragraphs."""
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
