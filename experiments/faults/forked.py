"""Runs the command `come` in children forked from a process that has imported the package.

A child runs `come.cli.main` with arguments, folder, environment, stdout and stderr of its own, as
`python run.py` does after its imports. The parent computes nothing, so its threads and allocator
are those of a process that has only imported torch. Three things differ: the speed measurement of
the cost estimate is a constant, figures are empty files, and a fault may be armed in the child. A
share of the kills goes to real interpreters, where nothing differs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_SILENT": "true",
    "CI": "true",
    "COLUMNS": "100",
    "PYTHONPATH": str(ROOT),
}
LIMIT = 300.0  # seconds, after which a run counts as hanging


def preload() -> None:
    """Imports everything that a run needs, in the parent."""
    import torch

    torch.set_num_threads(1)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    import come.cli
    import come.job.run
    import come.job.stages.distill
    import come.report.write  # noqa: F401
    from come.job import estimate

    __import__("scipy.stats")
    __import__("transformers.models.llama.modeling_llama")
    __import__("peft")
    estimate._products = lambda device, dtype: 1e11
    Figure.savefig = lambda figure, path, **options: Path(path).write_bytes(b"")


@dataclass
class Run:
    """A finished or killed run: its exit code (negative: the signal), output and CPU seconds."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False

    @property
    def traceback(self) -> bool:
        """Whether it printed a traceback."""
        return "Traceback (most recent call last)" in self.err + self.out

    @property
    def errors(self) -> list[str]:
        """The lines that start with "error:"."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@dataclass
class Started:
    """A running child, in a process group of its own."""

    pid: int
    printed: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None
    used: float = 0.0

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            found, status, used = os.wait4(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
                self.used = used.ru_utime + used.ru_stime
        return self.code

    def spend(self, seconds: float) -> None:
        """Waits until the process has used so much CPU time, or has ended."""
        tick = os.sysconf("SC_CLK_TCK")
        while self.poll() is None:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            if (int(fields[11]) + int(fields[12])) / tick >= seconds:
                return
            time.sleep(0.004)

    def send(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process, or to its whole group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Run:
        """Waits; a run that exceeds the limit is killed and counts as hanging."""
        hung = False
        while self.poll() is None:
            if time.monotonic() - self.began > limit:
                hung = True
                self.send(signal.SIGKILL, group=True)
                limit = float("inf")
            time.sleep(0.003)
        assert self.code is not None
        out, err = ((self.printed / n).read_text(errors="replace") for n in ("out", "err"))
        return Run(self.code, out, err, self.used, hung)


def composed(words: Sequence[str]) -> Callable[[], int]:
    """A function that runs the same job as `main` with settings composed here, for a child.

    Composing the configuration is half of the CPU time of a small job, before it writes anything.
    """
    import shlex

    from hydra import compose, initialize_config_dir

    from come.cli import CONF, _guarded, to_settings
    from come.cli.overrides import as_groups, load_plugins, model_of_run, register_parts
    from come.job.run import run
    from come.schema.explicit import method_changes

    load_plugins(words)
    register_parts()
    overrides = [*as_groups(words), *model_of_run(words)]
    folder = next(w.partition("=")[2] for w in words if w.startswith("hydra.run.dir="))
    overrides = [w for w in overrides if not w.startswith("hydra.run.dir=")]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        settings = to_settings(compose("config", overrides=overrides))
    settings.merge.changes = method_changes(overrides)
    settings.command = shlex.join(["come", *(w for w in words if "hydra.run.dir" not in w)])

    def job() -> None:
        settings.check()
        run(settings, Path(folder))

    return lambda: _guarded(job)


def start(
    words: Sequence[str],
    cwd: Path,
    *,
    environment: Mapping[str, str] | None = None,
    arm: Callable[[], None] | None = None,
    main: Callable[[], int] | None = None,
    after: Callable[[], object] | None = None,
    printed: Path | None = None,
) -> Started:
    """Starts a command in a forked child.

    Args:
        words: command-line overrides.
        cwd: folder that it runs in, and in which its output and its cache are.
        environment: variables to add.
        arm: called in the child before the command, to prepare a fault.
        main: what the child runs; the command by default.
        after: called in the child at its end.
        printed: folder of its stdout and stderr; "printed" in `cwd` by default.
    """
    printed = printed or cwd / "printed"
    printed.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return Started(pid, printed)
    _child(words, cwd, printed, environment or {}, arm, main, after)
    raise AssertionError


def _child(
    words: Sequence[str],
    cwd: Path,
    printed: Path,
    environment: Mapping[str, str],
    arm: Callable[[], None] | None,
    main: Callable[[], int] | None,
    after: Callable[[], object] | None,
) -> None:
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            target = os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(cwd)
        os.environ.update({**ENVIRONMENT, "COME_CACHE": str(cwd / "cache"), **environment})
        sys.argv = ["run.py", *words]
        if arm is not None:
            arm()
        if main is None:
            from come.cli import main
        code = int(main() or 0)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            if after is not None:
                after()
        os._exit(code)


def interpreter(words: Sequence[str], cwd: Path) -> subprocess.Popen[bytes]:
    """Starts `python run.py` in a new interpreter, in a process group of its own."""
    (cwd / "printed").mkdir(parents=True, exist_ok=True)
    with open(cwd / "printed" / "out", "wb") as out, open(cwd / "printed" / "err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words],
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT, "COME_CACHE": str(cwd / "cache")},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


class FileEvents:
    """Calls a function at the n-th change of a file below a folder, before it happens.

    Python announces every open for writing, rename, removal and new folder to audit hooks, so this
    reaches the points between two changes, which a random moment seldom hits.
    """

    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")

    def __init__(self, folder: Path, at: int = -1, act: Callable[[], None] | None = None) -> None:
        self.folder = str(folder)
        self.at = at
        self.act = act
        self.count = 0

    def arm(self) -> None:
        """Starts to count, in this process."""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Counts one event."""
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        elif event not in self.CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if self.folder not in os.path.abspath(os.fsdecode(path)) or "/printed/" in os.fsdecode(
            path
        ):
            return
        self.count += 1
        if self.count == self.at and self.act is not None:
            self.act()
