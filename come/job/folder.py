"""A job folder: its exclusive lock, its result, and the files that a resumed job reads."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from come.files import PARTIAL, RESULT, read_again, read_object, write_text
from come.merge.plan import Plan
from come.merge.saving import PLAN, plan_path
from come.merge.trial_layers import trial_layers_bytes
from come.models.checkpoint import check_checkpoint

log = logging.getLogger(__name__)

PARTIAL_PLAN = "plan.partial.json"
TRIALS = "trials.partial.json"
SHAPE = "shape.partial.json"
PARTIAL_METRICS = "metrics.partial.json"
STATES = "distill"  # the folder of training checkpoints


def find_run(path: str) -> Path:
    """The model folder at `path`, which is a finished run's folder or a model folder.

    Raises:
        ValueError: there is no model with weights and a plan at `path`.
    """
    folder = Path(path).expanduser()
    for model in (folder / "model", folder):
        if plan_path(model).is_file() and any(model.glob("model*.safetensors")):
            return model
    raise ValueError(
        f"from_run={path}: no merged model with its {PLAN} there; give the folder of a finished "
        "run that keeps its weights, or one of its model folders"
    )


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the job folder; blocks while another process holds it.

    Raises:
        ValueError: the folder cannot be created or written.
    """
    check_folder(folder, 0)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process runs this job; waiting for it: %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def finished_result(folder: Path, job: str) -> dict[str, Any] | None:
    """The result of a job, or None if the job has not finished.

    Raises:
        ValueError: the folder holds the result of another job.
    """
    result = read_again(folder / RESULT, lambda path: _read_result(path, job))
    if result is None:
        return None
    if result.get("job") != job:
        raise ValueError(
            f"{folder} holds the result of another job ({result.get('job')}, this is {job}); "
            "choose another hydra.run.dir or remove it"
        )
    return result


def _read_result(path: Path, job: str) -> dict[str, Any]:
    """A result; the models of this job's are whole, or their folders have been removed since."""
    result = read_object(path)
    if result.get("job") != job:
        return result
    kept = result["settings"]["merge"]["save_weights"]
    for depth in result["depths"][1:]:
        model = path.parent / _own(depth["folder"])
        if kept and model.is_dir():
            check_checkpoint(model)
            Plan.load(plan_path(model))
    return result


def _own(name: str) -> str:
    """The name of a model's folder in a job's; others are of no job.

    Raises:
        ValueError: it is another name, which may lead out of the job's folder.
    """
    if not re.fullmatch(r"model(-merged|-\d+)?", name):
        raise ValueError(f"{name!r} is not the folder of a model")
    return name


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json` atomically; it is the last file that a job writes.

    Raises:
        ValueError: a number is not finite; the message has its key.
    """
    check_finite(result, RESULT)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def check_finite(values: Any, place: str) -> None:
    """Raises ValueError, with the key, if a number in nested values is not finite."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_finite(value, f"{place}: {key}" if place == RESULT else f"{place}.{key}")
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            check_finite(value, f"{place}[{index}]")
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{place} is {values}, which is no result; the models are kept")


def remove_partial(folder: Path) -> None:
    """Removes what a killed process of the job was writing; needs the job's lock."""
    for left in folder.rglob(f"*{PARTIAL}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def partial_plan(folder: Path, job: str) -> Plan | None:
    """The partial plan of an interrupted compression of the same job, or None."""
    plan = read_again(folder / PARTIAL_PLAN, Plan.load)
    return plan if plan and plan.provenance.get("job") == job else None


def check_folder(folder: Path, needed: int, trials: int = 0) -> None:
    """Creates the job folder and checks that it is writable and that its disk has enough space.

    Args:
        folder: the job folder.
        needed: number of bytes that the job writes.
        trials: those of them that are layers of trial merges.

    Raises:
        ValueError: the folder cannot be created or written, or the free space is too small.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"come")
            file.flush()
    except OSError as error:
        raise ValueError(
            f"output folder {folder} cannot be written ({error.strerror}); "
            "choose another with hydra.run.dir=FOLDER"
        ) from error
    free = shutil.disk_usage(folder).free + trial_layers_bytes(folder)
    if free < needed:
        less = f", or merge.schedule.candidate_sets=1, which writes {trials / 1e9:.2f} GB less"
        raise ValueError(
            f"output folder {folder}: {free / 1e9:.2f} GB free, and the run writes about "
            f"{needed / 1e9:.2f} GB; choose another disk with hydra.run.dir=FOLDER"
            f"{less if trials else ''}"
        )
