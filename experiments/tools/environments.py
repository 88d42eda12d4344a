"""One environment for every tool.

An environment is a virtual environment that also sees the packages of the project's environment,
so that pip installs only what a tool adds, and the versions that it needs instead. The version of
torch is fixed: another one would be a CUDA build of several GB. torchvision, torchaudio and
torchcodec are removed: those of PyPI do not fit a CPU build of torch and stop imports of
transformers; no tool here needs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from catalogue import Tool

SECONDS = 3600
READY = "installed.json"


class CannotInstallError(Exception):
    """A tool cannot be installed here; the message is the reason."""


@dataclass(frozen=True)
class Environment:
    """How a tool's scripts are run."""

    python: Path
    variables: dict[str, str]


def environment(tool: Tool, folder: Path) -> Environment:
    """The environment of a tool, which is made on the first call.

    Raises:
        CannotInstallError: pip failed.
    """
    if not tool.install:
        return Environment(Path(sys.executable), {})
    wanted = json.dumps([*tool.install, *map(list, tool.build)])
    marker = folder / READY
    if not marker.is_file() or marker.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        _side_folder(tool, folder) if tool.side_folder else _virtual_environment(tool, folder)
        folder.mkdir(exist_ok=True)
        marker.write_text(wanted)
    if tool.side_folder:
        return Environment(Path(sys.executable), {"PYTHONPATH": str(folder)})
    return Environment(folder / "bin" / "python", {})


def _side_folder(tool: Tool, folder: Path) -> None:
    shutil.rmtree(folder)
    _pip(Path(sys.executable), ["--no-deps", "--target", str(folder), *tool.install], {})


def _virtual_environment(tool: Tool, folder: Path) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)], {})
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / name / "site-packages"
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = list(tool.install)
    if tool.source:
        words = [str(_source(python, tool.install[0], folder)), *words[1:]]
    fixed = folder / "fixed.txt"
    fixed.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    _pip(python, ["--constraint", str(fixed), *words], dict(tool.build))
    unfit = ["torchvision", "torchaudio", "torchcodec"]
    _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unfit], {})


def _source(python: Path, requirement: str, folder: Path) -> Path:
    """Downloads and unpacks a source distribution; returns its folder."""
    source = folder / "source"
    if not source.is_dir():
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        _run([str(python), "-m", "pip", "download", "--quiet", *options, requirement], {})
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder / "unpacked", filter="data")
        (found,) = (folder / "unpacked").iterdir()
        found.rename(source)
        archive.unlink()
    return source


def _pip(python: Path, words: list[str], variables: dict[str, str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", *words], variables)


def _run(words: list[str], variables: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            words, env=os.environ | variables, capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CannotInstallError(f"pip took more than {SECONDS} seconds") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
        raise CannotInstallError(found[-1])
