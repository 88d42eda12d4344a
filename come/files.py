"""Atomic writes, where a file or folder has its final name only when it is whole; the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def cache_folder() -> Path:
    """Where converted models and cached evaluations live: $COME_CACHE, else ~/.cache/come."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "come"
    return Path(os.environ.get("COME_CACHE") or default).expanduser()


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in one step: a reader sees the old file or the whole new one."""
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill that takes the name `path` when the block ends without an error.

    A folder already there is replaced. What an earlier interrupted attempt left is removed.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
