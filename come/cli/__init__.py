"""The command `come`: Hydra composes the configuration in conf/ and runs its jobs.

No other subpackage imports Hydra.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from come.cli.errors import (
    OUT_OF_MEMORY,
    STORAGE_ERRORS,
    USER_ERRORS,
    is_interrupt,
    is_out_of_memory,
    no_such_setting,
    user_line,
)
from come.cli.grid import DRY_RUN, GridReport
from come.cli.overrides import (
    as_groups,
    load_plugins,
    model_of_run,
    register_parts,
    renamed,
)
from come.cli.show import all_values, captured
from come.cli.words import check_overrides, check_sweep, flag_words, read_flags
from come.data.sampling import SOURCE as SELF_GENERATED
from come.evaluate.base import EVALUATIONS
from come.files import LISTING
from come.job.identity import job_hash
from come.merge.method import PARTS
from come.merge.selection.trial_kl import REPEAT_WEIGHT
from come.registry import load_plugin
from come.report.listing import make_report
from come.schema import Settings
from come.schema.explicit import check_explicit, method_changes

_ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)

CONF = next(p for p in (_ROOT / "conf", _ROOT.parent / "conf") if p.is_dir())  # wheel, or clone
INVALID = "invalid"  # used in place of the job hash if the settings are invalid


class JobFailedError(Exception):
    """A job of a sweep failed with a user error; the message is the printed line."""


@functools.cache
def schema() -> dict[str, Any]:
    """The structured configs that conf/ is merged into; their fields define types and defaults."""
    hints = get_type_hints(Settings)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    return {"plugins": [], "from_run": None, "eval": {}} | {
        name: OmegaConf.structured(group) for name, group in groups.items()
    }


def to_settings(config: DictConfig) -> Settings:
    """Converts a composed configuration to typed settings, and resolves its interpolations.

    Raises:
        ValueError: a setting or its value is not allowed.
    """
    types = schema()
    _check_names(config, types)
    own = OmegaConf.masked_copy(config, list(types))
    OmegaConf.resolve(own)
    for path in own.plugins:
        load_plugin(path)
    merged: Any = OmegaConf.merge(types, own)
    values: dict[str, Any] = {name: merged[name] for name in types}
    for name, value in values.items():
        values[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    values["eval"] = {name: EVALUATIONS.create(name, own) for name, own in values["eval"].items()}
    return Settings(**values)


def _check_names(config: DictConfig, types: dict[str, Any]) -> None:
    """Raises ValueError for settings that do not exist, which Hydra allows where `+` adds them."""
    for group in sorted(set(map(str, config)) - {"hydra"}):
        node = config._get_node(group)
        value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        if (line := renamed(group, value)) is not None:
            raise ValueError(line)
        if group not in types:
            raise ValueError(no_such_setting(group))
        if OmegaConf.is_config(types[group]):
            for name in config[group]:
                if name not in types[group]:
                    raise ValueError(no_such_setting(f"{group}.{name}"))


def main() -> int:
    """Runs the command line: a single job or all jobs of a sweep.

    A user error is printed as one line on stderr. Any other error keeps its traceback.

    Returns:
        The exit code: 0 on success, 1 after a user error, 130 after an interrupt. If a job of a
        sweep fails, the other jobs still run.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra must not shorten errors
    logging.raiseExceptions = False  # a full disk must not print a traceback per line of the log

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if DRY_RUN in os.environ:
            _stop_log_file()
        try:
            settings = _job_settings(config)
            _warn_of_grid()
            settings.check()
            check_explicit(settings, HydraConfig.get().overrides.task)
            # slow to import, so only after the checks
            if DRY_RUN in os.environ:
                from come.job.dry_run import dry_run

                print("\n".join(dry_run(settings, folder)), flush=True)
                _remove_if_empty(folder)
            else:
                from come.job.run import run

                run(settings, folder)
        except Exception as error:
            hydra_config = HydraConfig.get()
            if hydra_config.mode == RunMode.MULTIRUN:
                _close_failed_job(folder, f"{hydra_config.job.name}.log", error)
                if isinstance(error, USER_ERRORS):
                    line = _print_error(f"job {hydra_config.job.num}: {user_line(error)}")
                    raise JobFailedError(line) from error
                raise
            if not isinstance(error, USER_ERRORS):
                raise
            _remove_if_empty(folder)
            _print_error(user_line(error))
            raise SystemExit(1) from None

    def start() -> None:
        flags, overrides = read_flags(sys.argv[1:])
        if flags.dry_run:
            os.environ[DRY_RUN] = "1"  # parallel launchers pass it to their processes
        load_plugins(overrides)
        register_parts()
        check_overrides(overrides, [*schema(), *(f"merge.{part}" for part in PARTS)])
        if flags.multirun:
            check_sweep(overrides)
        package = flags.package
        if flags.cfg == "job":
            flags.resolve, flags.package = True, None
        sys.argv[1:] = [*as_groups(overrides), *model_of_run(overrides), *flag_words(flags)]
        if flags.cfg == "job":
            print(all_values(_job_settings(OmegaConf.create(captured(job))), package))
        else:
            job()

    try:
        return _guarded(start)
    finally:
        if GridReport.running is not None:  # also after a failed job
            _finish_sweep(GridReport.running)
            GridReport.running = None
        os.environ.pop(DRY_RUN, None)


def _job_settings(config: DictConfig) -> Settings:
    """The settings of a job, with those that follow from its command line."""
    settings = to_settings(config)
    settings.tracking.group = settings.tracking.group or _experiment()
    if HydraConfig.get().runtime.choices.get("eval") == "none":
        settings.eval = {}  # experiments have settings of evaluations that they do not choose
    overrides = HydraConfig.get().overrides.task
    settings.merge.changes = method_changes(overrides)
    settings.command = shlex.join(["come", *overrides])
    return settings


def _guarded(job: Callable[[], Any]) -> int:
    """Runs the job or sweep and returns the exit code; prints a user error as one line."""
    try:
        return _guarded_from_errors(job)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130


def _guarded_from_errors(job: Callable[[], Any]) -> int:
    """The same, without interrupts."""
    try:
        job()
    except JobFailedError as error:
        # prints nothing if this process already printed it when the job failed
        _print_error(str(error))
        return 1
    except USER_ERRORS as error:
        _print_error(user_line(error))
        return 1
    except OSError as error:
        place = error.filename2 or error.filename  # of a copy, the file that is written
        if place is None and error.errno not in STORAGE_ERRORS:
            raise
        _print_error(
            f"{place or 'output'}: {error.strerror}; hydra.run.dir=FOLDER chooses the output "
            "folder, COME_CACHE=FOLDER the cache; the same command resumes"
        )
        return 1
    except (MemoryError, RuntimeError, ImportError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error(OUT_OF_MEMORY)
        return 1
    return 0


_printed: set[str] = set()


def _print_error(line: str) -> str:
    """Prints an error line to stderr, unless it was printed before; returns the line."""
    if line not in _printed:
        print(f"error: {line}", file=sys.stderr)
    _printed.add(line)
    return line


def _stop_log_file() -> None:
    """Stops logging to the job's folder, which shall leave no files."""
    for handler in logging.root.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logging.root.removeHandler(handler)
            handler.close()


def _close_failed_job(folder: Path, name: str, error: Exception) -> None:
    """Appends the traceback to the failed job's log; removes a refused job, which wrote nothing."""
    if isinstance(error, USER_ERRORS) and {p.name for p in folder.glob("*")} <= {".lock", name}:
        _stop_log_file()  # launchers log the error again
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):  # the disk may be full
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "a") as file:
            traceback.print_exc(file=file)


def _finish_sweep(folder: Path) -> None:
    """Removes Hydra's record of the sweep; prints the tables, with jobs of parallel launchers."""
    (folder.parent / "multirun.yaml").unlink(missing_ok=True)  # every job has resolved.yaml
    if (folder / LISTING).is_file() and DRY_RUN not in os.environ:
        print(f"\n{make_report(folder)}\ntables and figure: {folder}")
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # where it is empty


def _job_hash(*, _root_: DictConfig) -> str:
    try:
        settings = to_settings(_root_)
        settings.check()
        check_explicit(settings, _root_.hydra.overrides.task)
        return job_hash(settings)
    except USER_ERRORS:
        return INVALID


def _repeat_weight(*, _root_: DictConfig) -> float:
    """Default weight of repeated text in trial scores: above 0 if the model generates text."""
    text = _root_.calibration
    sources = text.mix if OmegaConf.is_dict(text.mix) else [] if text.path else [text.source]
    sampled = SELF_GENERATED in sources or text.num_continuations > 0
    return REPEAT_WEIGHT if sampled else 0.0


def _warn_of_grid() -> None:
    """Warns that without -m, only the base configuration of an experiment with a sweep runs."""
    hydra_config = HydraConfig.get()
    params = hydra_config.sweeper.get("params") or {}
    if hydra_config.mode == RunMode.RUN and params and _experiment():
        over = " ".join(f"{key}={value}" for key, value in params.items())
        log.warning(
            "experiment=%s is a grid over %s; without -m only its base configuration runs",
            _experiment(), over,
        )  # fmt: skip


def _experiment() -> str | None:
    """Name of the chosen experiment, or None; trackers group its jobs by this name."""
    name = HydraConfig.get().runtime.choices.get("experiment")
    return str(name) if name else None


def _remove_if_empty(folder: Path) -> None:
    """Removes the folder of a job that failed before it wrote anything, and an empty runs/."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
        folder.rmdir()
        if folder.parent.name == "runs":
            folder.parent.rmdir()


# Registered at import, so that the worker processes of parallel launchers have them too.
ConfigStore.instance().store(name="schema", node=schema())
OmegaConf.register_new_resolver("job_hash", _job_hash, replace=True)
OmegaConf.register_new_resolver("repeat_weight", _repeat_weight, replace=True)
