"""Python's documentation as training text and held-out text, and a tokenizer trained on it.

The documents are the topics of the language reference (`pydoc_data.topics`) and the docstrings of
every module of the standard library, both from the Python that runs this.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

HELD_OUT = 10  # one document in ten
END = "<|endoftext|>"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}

Document = tuple[str, str]  # title and text


class Texts(NamedTuple):
    """Text that is trained on, and text of other documents."""

    train: str
    test: str

    @property
    def hash(self) -> str:
        """Hash of both texts."""
        return hashlib.sha256("\0".join(self).encode()).hexdigest()[:16]


def documents() -> Iterator[Document]:
    """All topics and modules, with their titles."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    yield from sorted(topics.items())
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not _SKIPPED & set(relative.parts):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = docstrings(name, path.read_bytes())
            if text:
                yield name, text


def docstrings(module: str, source: bytes) -> str:
    """The docstrings of a module, its classes and functions, each after its signature."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = [module, ast.get_docstring(tree) or ""] if ast.get_docstring(tree) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                function = not isinstance(node, ast.ClassDef)
                arguments = f"({ast.unparse(node.args)})" if function else ""
                found += [f"{module}.{node.name}{arguments}\n{text}"]
    return "\n\n".join(found)


def split(titled: Iterable[Document]) -> Texts:
    """Splits by document; the held-out text has no paragraph of the training text.

    Whether a document is held out depends only on its title. Repeated paragraphs are kept once.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for title, text in titled:
        digest = hashlib.sha256(title.encode()).digest()
        parts[int.from_bytes(digest[:4], "big") % HELD_OUT == 0].append(text)
    seen: set[str] = set()
    train, test = (
        "\n\n".join(filter(None, [_new_paragraphs(text, seen) for text in part])) for part in parts
    )
    return Texts(train, test)


def _new_paragraphs(text: str, seen: set[str]) -> str:
    fresh = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            fresh.append(paragraph.rstrip())
    return "\n\n".join(fresh)


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens; token 0 is the end of text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        text.split("\n\n"), vocab_size=size, min_frequency=2, special_tokens=[END],
        show_progress=False,
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END
    )
