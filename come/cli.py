"""Hydra: composes conf/ into `Settings` and names the job's folder. The only module that does."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from come.errors import one_line
from come.files import AXES, LISTING, write_text
from come.job.identity import job_hash
from come.report.listing import list_job, make_report
from come.report.points import PARAMETERS
from come.schema import Settings

CONF = Path(__file__).resolve().parents[1] / "conf"
INVALID = "invalid"  # the folder name of settings that do not pass their checks

USER_ERRORS = (ValueError, HydraException, OmegaConfBaseException)


class JobFailedError(Exception):
    """A job of a sweep ended with an error of the user's, whose line this is."""


class GridReport(Callback):
    """Hydra callback: lists the jobs of a sweep, and keeps its tables and figure up to date.

    They stand in `runs/grid-NAME/`, NAME being the experiment's, whose sweeps share a table, or
    "sweep"; `python -m come.report runs/grid-NAME` makes them again.

    Args:
        x: horizontal axis of the figure: "parameters", or a key that the jobs differ in.
        title: of the figure.
    """

    running: ClassVar[Path | None] = None
    """The folder of the sweep that this process runs."""

    def __init__(self, x: str = PARAMETERS, title: str = "") -> None:
        self.axes = {"x": x, "title": title}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep that is no experiment begins a list of its own."""
        folder = GridReport.running = self._folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "grid-sweep":
            (folder / LISTING).unlink(missing_ok=True)
        write_text(folder / AXES, json.dumps(self.axes))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Adds the job to the list and makes the tables and the figure anew."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = self._folder(config)
        entry = {
            "folder": str(config.hydra.runtime.output_dir),
            "overrides": list(config.hydra.overrides.task),
        }
        list_job(folder, entry)
        make_report(folder)

    def _folder(self, config: DictConfig) -> Path:
        name = config.hydra.runtime.choices.get("experiment") or "sweep"
        return Path(config.hydra.sweep.dir).absolute() / f"grid-{name}"


def to_settings(config: DictConfig) -> Settings:
    """The typed settings of a composed configuration, interpolations resolved."""
    own = OmegaConf.masked_copy(config, [f.name for f in fields(Settings)])
    OmegaConf.resolve(own)
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), own))
    assert isinstance(settings, Settings)
    return settings


def main() -> int:
    """Runs the command line: every job that it composes.

    An error of the user's is one line on stderr; any other error keeps its traceback.

    Returns:
        The exit code: 0, or 1 after an error. In a sweep the other jobs finish first.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach this function whole

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            settings = to_settings(config)
            settings.tracking.group = settings.tracking.group or _experiment()
            settings.check()
            from come.job.run import run  # slow to import; a wrong setting needs none of it

            run(settings, folder)
        except Exception as error:
            hydra_config = HydraConfig.get()
            if hydra_config.mode == RunMode.MULTIRUN:
                _keep_traceback(folder / f"{hydra_config.job.name}.log")
                if isinstance(error, USER_ERRORS):
                    line = _say(f"job {hydra_config.job.num}: {_line(error)}")
                    raise JobFailedError(line) from error
                raise
            if not isinstance(error, USER_ERRORS):
                raise
            if folder.name == INVALID:
                _remove_if_empty(folder)
            _say(_line(error))
            raise SystemExit(1) from None

    try:
        return _guarded(job)
    finally:
        if GridReport.running is not None:  # also behind a job that failed
            _finish_sweep(GridReport.running)
            GridReport.running = None


def _guarded(job: Callable[[], Any]) -> int:
    """Runs the sweep or job; an error of the user's is one line."""
    try:
        job()
    except JobFailedError as error:
        _say(str(error))  # once, if it was said here when the job failed
        return 1
    except USER_ERRORS as error:
        _say(_line(error))
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        _say(
            f"{error.filename}: {error.strerror}; hydra.run.dir=FOLDER chooses the output folder, "
            "COME_CACHE=FOLDER the cache"
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _line(error: Exception) -> str:
    """An error in one line, with its cause where Hydra keeps that apart.

    Of an override that cannot be read it shows the way to write it.
    """
    if not isinstance(error, OverrideParseException):
        cause = error.__cause__ if isinstance(error, HydraException) else None
        return " ".join(one_line(part) for part in (error, cause) if part is not None)
    key, _, value = error.override.partition("=")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    word = shlex.quote(f'{key}="{quoted}"')
    return (
        f"{error.override} cannot be read ({one_line(error)}); a value with spaces or signs is "
        f"quoted twice, for the shell and for Hydra: {word}"
    )


_said: set[str] = set()


def _say(line: str) -> str:
    """One line on stderr, once."""
    if line not in _said:
        print(f"error: {line}", file=sys.stderr)
    _said.add(line)
    return line


def _keep_traceback(path: Path) -> None:
    """Writes the traceback of the error at hand into a failed job's own log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        traceback.print_exc(file=file)


def _finish_sweep(folder: Path) -> None:
    """Makes the tables once more, from all jobs of a parallel launcher, and prints them."""
    shutil.rmtree(folder.parent / INVALID, ignore_errors=True)  # what invalid jobs left of a log
    if (folder / LISTING).is_file():
        print(f"\n{make_report(folder)}\ntables and figure: {folder}")


def _job_hash(*, _root_: DictConfig) -> str:
    try:
        settings = to_settings(_root_)
        settings.check()
        return job_hash(settings)
    except USER_ERRORS:
        return INVALID


def _experiment() -> str | None:
    """The experiment's name; a grid's jobs are one group for the trackers."""
    name = HydraConfig.get().runtime.choices.get("experiment")
    return str(name) if name else None


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


# Known to Hydra as soon as this module is, in the processes of parallel launchers too.
ConfigStore.instance().store(name="schema", node=Settings)
OmegaConf.register_new_resolver("job_hash", _job_hash, replace=True)
