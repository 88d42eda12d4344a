"""Atomic writes, where a file or folder has its final name only when it is whole; the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from glob import glob
from pathlib import Path

PARTIAL = ".partial"
RESULT = "result.json"  # the last file of a job
LISTING = "jobs.jsonl"  # what a sweep notes of its jobs
AXES = "axes.json"  # and of its figure


def cache_folder() -> Path:
    """Where converted models and cached evaluations live: $COME_CACHE, else ~/.cache/come."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "come"
    return Path(os.environ.get("COME_CACHE") or default).expanduser()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, 16 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def local_hash(path: str) -> str | None:
    """Hash of the content at a path: a file, a folder with all its files, or a pattern.

    Returns:
        16 hexadecimal digits, equal for copies; None where nothing is there.
    """
    root = Path(os.path.expanduser(path))
    if os.path.isfile(root):
        return file_hash(root)
    if os.path.isdir(root):
        files = sorted(found for found in root.rglob("*") if found.is_file())
        names = [file.relative_to(root).as_posix() for file in files]
    else:
        files = [Path(name) for name in sorted(glob(str(root), recursive=True))]
        files = [file for file in files if file.is_file()]
        names = [file.name for file in files]
    if not files:
        return None
    parts = [f"{name} {file_hash(file)}" for name, file in zip(names, files, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def package_hash() -> str:
    """Hash of this package's own code, 16 hexadecimal digits: other code may give other numbers."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in one step: a reader sees the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` in one step: a reader sees the old file or the whole new one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # jobs may share a cache
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(path: Path, marks: Sequence[str]) -> None:
    """Raises ValueError if `path` holds anything but a folder with one of the files `marks`."""
    ours = any((path / mark).is_file() for mark in marks)
    if path.exists() and not ours and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} is there and was not made by this project; choose another folder")


@contextmanager
def new_folder(path: Path, marks: Sequence[str]) -> Iterator[Path]:
    """Gives a folder to fill that takes the name `path` when the block ends without an error.

    A folder already there is replaced, if it holds one of `marks`; what an earlier interrupted
    attempt left is removed.

    Args:
        path: the folder.
        marks: files that tell a folder made by this project from one of the user's.

    Raises:
        ValueError: `path` holds something that is not ours to replace.
    """
    path = Path(path)
    check_replaceable(path, marks)
    partial = path.with_name(path.name + PARTIAL)
    old = path.with_name(f"{path.name}.old{PARTIAL}")  # "model.old" may be somebody's copy
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)
