"""Hydra: composes conf/ into `Settings` and names the job's folder. The only module that does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from come.files import AXES, LISTING, write_text
from come.job import job_hash
from come.settings import Settings

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf"
INVALID = "invalid"  # the folder name of settings that do not pass their checks

USER_ERRORS = (ValueError, HydraException, OmegaConfBaseException)


class JobFailedError(Exception):
    """A job of a sweep ended with an error that has been said."""


class GridReport(Callback):
    """Hydra callback: lists the jobs of a sweep, and keeps its table and figure up to date.

    They stand in `runs/grid-NAME/`, NAME being the experiment's, whose sweeps share a table, or
    "sweep"; `python -m come.report runs/grid-NAME` makes them again.

    Args:
        x: horizontal axis of the figure: "parameters", or a key that the jobs differ in.
        title: of the figure.
    """

    def __init__(self, x: str = "parameters", title: str = "") -> None:
        self.x = x
        self.title = title

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep that is no experiment begins a list of its own."""
        folder = self._folder(config)
        if folder.name == "grid-sweep":
            (folder / LISTING).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Adds the job to the list and makes the table and the figure anew."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        error = job_return._return_value if job_return.status == JobStatus.FAILED else None
        if isinstance(error, Exception) and not isinstance(error, JobFailedError):
            log.error("the job failed", exc_info=error)  # into its own log; the others go on
        folder = self._folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "folder": str(config.hydra.runtime.output_dir),
            "overrides": list(config.hydra.overrides.task),
        }
        with open(folder / LISTING, "a") as file:
            file.write(json.dumps(entry) + "\n")
        write_text(folder / AXES, json.dumps({"x": self.x, "title": self.title}))
        self._write(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table, made once more: jobs of a parallel launcher end side by side."""
        folder = self._folder(config)
        if (folder / LISTING).is_file():
            print(f"\n{self._write(folder)}\ntable and figure: {folder}")

    def _write(self, folder: Path) -> str:
        from come.report.grid import read_grid, write_grid  # plotting is slow to import

        with FileLock(folder / ".lock"):
            return write_grid(folder, *read_grid(folder), x=self.x, title=self.title)

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


def main(run: Callable[[Settings, Path], Any]) -> int:
    """Runs the command line: `run(settings, folder)` for every job that it composes.

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
            run(settings, folder)
        except USER_ERRORS as error:
            if folder.name == INVALID:
                _remove_if_empty(folder)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _say(f"job {HydraConfig.get().job.num}: {error}")
                raise JobFailedError from error
            _say(error)
            raise SystemExit(1) from None

    try:
        job()
    except JobFailedError:
        return 1  # said when it failed
    except USER_ERRORS as error:
        _say(error)
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


def _say(error: object) -> None:
    """One line on stderr."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keys = [line for line in lines[1:] if line.startswith("full_key:")]
    print(f"error: {' '.join([*lines[:1], *keys])}", file=sys.stderr)


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
