"""The job hash: a hash of everything that determines a job's result."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from come.files import file_hash, package_hash
from come.job.folder import find_run
from come.job.processes import process_count
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.models.checkpoint import fingerprint, identity
from come.models.loading import check_configuration, choose_device, resolve_fast
from come.schema import ModelSettings, Settings

log = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "accelerate", "peft",
)  # fmt: skip


def model_identity(model: ModelSettings) -> str:
    """Identifies a model independently of its location: a hash of its files, or its hub id."""
    folder = Path(model.path or "").expanduser()
    if model.path and folder.is_dir():
        try:
            check_configuration(folder)  # before all weights are read to hash them
            return identity(folder)
        except (ValueError, OSError):
            return f"unreadable {folder}"
    return str(model.path)


def job_hash(settings: Settings) -> str:
    """Hash of everything that determines a job's result: 12 hexadecimal digits.

    The hash includes the code of this package and of plugins, and the versions of the packages
    that do the computation. For a path, it includes the content. It includes batch sizes and the
    number of processes, because they change the rounding of sums over tokens, and the device type.
    It excludes labels, the store of hidden states, and tracking.
    """
    device = choose_device(settings.model.device)
    parts: dict[str, Any] = {
        "code": [package_hash(), *(version(package) for package in _PACKAGES)],
        "device": device.type,
        "model": settings.model.counted() | {"dtype": resolve_fast(settings.model.dtype, device)},
        "model_identity": model_identity(settings.model),
        "merge": settings.merge.counted(),
        "eval": {name: [e.counted(), e.identity()] for name, e in settings.eval.items()},
    }
    if settings.merge.enabled and settings.held_out_texts:  # decides which part is held out
        parts["held_out_from"] = settings.calibration.text_identity()
    if settings.plugins:
        parts["plugins"] = [file_hash(Path(path).expanduser()) for path in settings.plugins]
    if settings.distill.active:
        parts["distill"] = settings.distill.counted() | {
            "text": _training_identity(settings),
            "precision": settings.distill.train_config(device.type).precision,
        }
    if not settings.merge.enabled:
        parts["merge"] = None
    elif settings.from_run is not None:
        start = find_run(settings.from_run)
        parts["merge"] = [
            fingerprint(start),
            file_hash(plan_path(start)),
            settings.merge.save_weights,
        ]
    elif settings.merge.plan is not None:
        parts["plan"] = Plan.load(Path(settings.merge.plan)).hash
    else:
        parts |= {
            "calibration": settings.calibration.counted(),
            "calibration_text": settings.calibration.text_identity(),
        }
        if process_count() > 1:  # sums are added up in parts
            parts["processes"] = process_count()
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _training_identity(settings: Settings) -> Any:
    if settings.training_text is None:
        calibration = settings.calibration
        return [
            "self_generated",
            str(calibration.sampling),
            calibration.keep_likeliest,
            calibration.chat,
        ]
    return settings.training.text_identity()
