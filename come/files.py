"""Atomic writes of files and folders, content hashes, sizes, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from come.errors import one_line

Read = TypeVar("Read")
log = logging.getLogger(__name__)

PARTIAL = ".partial"
RESULT = "result.json"  # the last file that a job writes
LISTING = "jobs.jsonl"  # folder and overrides of every job of a sweep
AXES = "axes.json"  # x axis and title of the sweep's figure


def size_in_bytes(key: str, size: str) -> int:
    """A size such as "6GB" in bytes.

    Args:
        key: the setting, for the error message.
        size: the size, in B, KB, MB, GB, TB, KiB and so on.

    Raises:
        ValueError: it is not a size above 0.
    """
    from accelerate.utils import convert_file_size_to_int

    try:
        found = int(convert_file_size_to_int(size.upper()))  # a small b would be bits
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{key}={size}: must be a size such as 6GB, 800MB or 6GiB") from error
    if found <= 0:
        raise ValueError(f"{key}={size}: must be above 0")
    return found


def cache_folder() -> Path:
    """The cache for converted models and evaluations: $COME_CACHE, by default ~/.cache/come."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "come"
    return Path(os.environ.get("COME_CACHE") or default).expanduser()


def file_hash(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def local_hash(path: str) -> str | None:
    """Hash of the content at a path: a file, a folder with all its files, or a glob pattern.

    Returns:
        16 hexadecimal digits, equal for copies of the same content; None if the path matches no
        file.
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
    """Hash of this package's code, 16 hexadecimal digits: code changes may change results."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()[:16]


DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    SafetensorError,
)  # fmt: skip
"""What reading a damaged file of JSON or tensors raises."""


def read_again(path: Path, read: Callable[[Path], Read | None]) -> Read | None:
    """What `read` makes of a file that an earlier session wrote; None if it cannot be used.

    All files are written atomically, so a damaged file comes from a damaged disk or from a copy.
    What it holds is computed again, after a warning.

    Args:
        path: the file, which may be missing.
        read: reads the file and checks its content; None if it is of no use here.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except DAMAGED as error:
        log.warning("%s is damaged and is not used (%s)", path, one_line(error))
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file does not hold one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"holds no JSON object but {type(found).__name__}")  # noqa: TRY004
    return found


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically: a reader sees either the old or the complete new file."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically: a reader sees either the old or the complete new file."""
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which is renamed to `path` if the block ends without an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # unique per process
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raises OSError, with the path, in place of safetensors' error of a file that it writes."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"tensors cannot be written ({error})", str(path)) from error


def check_replaceable(path: Path, marks: Sequence[str]) -> None:
    """Raises ValueError unless `path` is missing, an empty folder, or holds a file of `marks`."""
    ours = any((path / mark).is_file() for mark in marks)
    if path.exists() and not ours and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and was not made by come; choose another folder")


@contextmanager
def new_folder(path: Path, marks: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `path` if the block ends without an error.

    An existing folder that holds one of `marks` is replaced. Leftovers of an interrupted attempt
    are removed.

    Args:
        path: final path of the folder.
        marks: files that identify a folder that this project wrote, as opposed to a user's folder.

    Raises:
        ValueError: `path` exists and was not written by this project.
    """
    path = Path(path)
    check_replaceable(path, marks)
    partial = path.with_name(path.name + PARTIAL)
    old = path.with_name(f"{path.name}.old{PARTIAL}")  # "model.old" may be a user's backup
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
