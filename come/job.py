"""A job's name, and the files that say whether it is done."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from come.evaluation.tasks import tasks_identity
from come.files import RESULT, file_hash, package_hash, write_text
from come.merging.plan import Plan
from come.merging.saving import PLAN, plan_path
from come.models.checkpoint import fingerprint, identity
from come.models.loading import choose_device
from come.settings import ModelSettings, Settings, TextSettings

log = logging.getLogger(__name__)

PARTIAL_PLAN = "plan.partial.json"

# What changes how a job runs or what its card says, but no number.
_MODEL_KNOBS = ("name", "path", "device", "base_model")
_TEXT_KNOBS = ("source", *TextSettings.__dataclass_fields__)  # their content counts instead
_CALIBRATION_KNOBS = (*_TEXT_KNOBS, "store")
_DISTILL_KNOBS = (*_TEXT_KNOBS, "workers", "checkpoint_every", "gradient_checkpointing")
_EVAL_KNOBS = (*_TEXT_KNOBS, "name", "include_path")
_PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "accelerate", "peft",
)  # fmt: skip


def model_identity(model: ModelSettings) -> str:
    """What names a model whatever folder it is in: a hash of its files, or the hub id."""
    folder = Path(model.path or "").expanduser()
    if model.path and folder.is_dir():
        try:
            return identity(folder)
        except (ValueError, OSError):
            return f"unreadable {folder}"
    return str(model.path)


def job_hash(settings: Settings) -> str:
    """Hash of everything that determines a job's result: 12 hexadecimal digits.

    This package's own code counts, and that of plugins and of the packages that compute. Paths
    count by their content. Batch sizes count, since sums over tokens are rounded by batches, and
    so does the kind of device. Labels, stores and tracking do not count.
    """
    merge = _without(asdict(settings.merge), ("name", "plan"))
    calibration = _without(asdict(settings.calibration), _CALIBRATION_KNOBS)
    evaluation = _without(asdict(settings.eval), _EVAL_KNOBS)
    del evaluation["also"]
    parts: dict[str, Any] = {
        "code": [package_hash(), *(version(package) for package in _PACKAGES)],
        "device": choose_device(settings.model.device).type,
        "model": _without(asdict(settings.model), _MODEL_KNOBS),
        "model_identity": model_identity(settings.model),
        "merge": merge,
        "eval": evaluation,
        "eval_text": _text_identity(settings.eval) if settings.eval.perplexity else None,
    }
    if settings.merge.active and settings.eval.perplexity:  # which part of a text is held out
        calibrating = settings.calibration
        parts["held_out_from"] = None if calibrating.self_generated else _text_identity(calibrating)
    if settings.eval.also:
        parts["eval_also"] = {
            name: [_text_identity(text), _without(asdict(text), _TEXT_KNOBS)]
            for name, text in settings.eval.also.items()
        }
    if settings.eval.tasks:
        asked = settings.eval
        parts["tasks"] = tasks_identity(asked.tasks, asked.include_path, asked.limit)
    if settings.plugins:
        parts["plugins"] = [file_hash(Path(path).expanduser()) for path in settings.plugins]
    if settings.distill.active:
        own = _without(asdict(settings.distill), _DISTILL_KNOBS)
        parts["distill"] = own | {"text": _training_identity(settings)}
    if not settings.merge.active:
        parts["merge"] = None
    elif settings.from_run is not None:
        start = find_run(settings.from_run)
        parts["merge"] = [fingerprint(start), file_hash(plan_path(start)), settings.merge.keep]
    elif settings.merge.plan is not None:
        parts["plan"] = Plan.load(Path(settings.merge.plan)).hash
    else:
        self_generated = settings.calibration.self_generated
        text = "self_generated" if self_generated else _text_identity(settings.calibration)
        sources = [file_hash(path) for path in settings.merge.recipe().sources()]
        parts |= {"calibration": calibration, "calibration_text": text, "sources": sources}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def find_run(path: str) -> Path:
    """The model folder of a finished run, or of a path that is one itself.

    Raises:
        ValueError: there is no model with a plan.
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
def alone(folder: Path) -> Iterator[None]:
    """Holds a job's folder, so that no second process works in it; waits for one that does.

    Raises:
        ValueError: the folder cannot be made.
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
    """The result of a finished job, or None if it has not finished.

    Raises:
        ValueError: the folder holds the result of another job.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("job") != job:
        raise ValueError(
            f"{folder} holds the result of another job ({result.get('job')}, this is {job}); "
            "choose another hydra.run.dir or remove it"
        )
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, the last file of a job, atomically.

    Raises:
        ValueError: a number that is not finite, by its place.
    """
    check_finite(result, RESULT)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def check_finite(values: Any, place: str) -> None:
    """Raises ValueError, naming its place, for a number in nested values that is not finite."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_finite(value, f"{place}: {key}" if place == RESULT else f"{place}.{key}")
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            check_finite(value, f"{place}[{index}]")
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{place} is {values}, which is no result; the models are kept")


def partial_plan(folder: Path, job: str) -> Plan | None:
    """The plan of an interrupted compression of the same job, or None."""
    path = folder / PARTIAL_PLAN
    if not path.is_file():
        return None
    plan = Plan.load(path)
    return plan if plan.provenance.get("job") == job else None


def check_folder(folder: Path, needed: int) -> None:
    """Checks that a folder can be written and has room.

    Args:
        folder: the job's folder.
        needed: bytes that the job will write.

    Raises:
        ValueError: it cannot be made or written, or its disk is too full.
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
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output folder {folder}: {free / 1e9:.2f} GB free, and the run writes about "
            f"{needed / 1e9:.2f} GB; choose another disk with hydra.run.dir=FOLDER"
        )


def _training_identity(settings: Settings) -> Any:
    if settings.training_text is None:
        calibration = settings.calibration
        return ["self_generated", str(calibration.sampling), calibration.keep]
    return _text_identity(settings.training)


def _text_identity(text: TextSettings) -> str:
    try:
        return text.text_source().identity
    except (ValueError, OSError):
        return f"unreadable {text.path or text.source}"


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}
