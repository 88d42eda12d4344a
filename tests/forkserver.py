"""Runs run.py in processes forked from a server that has imported the package."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "come.cli",
        "come.job.run",
        "come.report.write",
        "scipy.stats",
        "transformers.models.llama",
        "tests.forkserver",
        "tests.conftest",
    ]
)


def fixed_products(device: object, dtype: object) -> float:
    """A constant speed of matrix products in operations per second, instead of a measurement."""
    return 1e11


class ForkedRun:
    """A run of `run.py` with the interface of `subprocess.Popen` that the tests use."""

    def __init__(self, words: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self._printed = Path(tempfile.mkdtemp(dir=cwd, prefix="printed-"))
        arguments = (words, str(cwd), environment, str(self._printed))
        self._process = FORKSERVER.Process(target=_run, args=arguments)
        self._process.start()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the process; returns stdout and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "timeout"
        return tuple((self._printed / name).read_text() for name in ("out", "err"))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def _run(words: list[str], cwd: str, environment: dict[str, str], printed: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        target = os.open(f"{printed}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(target, number)
    sys.argv = ["run.py", *words]
    import torch
    from torch.utils import collect_env

    from come.cli import main
    from come.job import estimate

    estimate._products = fixed_products
    collect_env.get_pretty_env_info = str  # lists the installed packages for the harness
    torch.set_num_threads(1)
    try:
        sys.exit(main())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
