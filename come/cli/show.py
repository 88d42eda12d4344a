"""`--cfg job`: prints every setting with the value that a job will use."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from come.errors import one_line
from come.merge.constraints import DEFAULT_SPARSITY
from come.models.checkpoint import local_checkpoint
from come.models.loading import inspect_model
from come.schema import Settings


def captured(show: Callable[[], Any]) -> dict[str, Any]:
    """The configuration that Hydra prints when `show` is called."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        show()
    return dict(yaml.safe_load(printed.getvalue()))


def all_values(settings: Settings, package: str | None = None) -> str:
    """All settings as YAML, with the depth that follows from a share of the parameters.

    Args:
        settings: the job's settings.
        package: key of the part to show, such as "merge"; None for all of them.

    Raises:
        ValueError: there is no such key.
    """
    values: Any = {key: value for key, value in settings.record().items() if key != "command"}
    note = ""
    if settings.merge.enabled and settings.merge.plan is None and settings.from_run is None:
        depth, note = _depth(settings)
        values["merge"]["target_layers"] = depth
    for name in (package or "").split("."):
        if name and name not in ("_global_", "_group_"):
            if not isinstance(values, dict) or name not in values:
                raise ValueError(f"--package {package}: there is no such part of the settings")
            values = values[name]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    lines = text.removesuffix("...\n").splitlines()
    shown = [line + note if line.strip().startswith("target_layers:") else line for line in lines]
    return "\n".join(shown)


def _depth(settings: Settings) -> tuple[int | None, str]:
    """The target depth, or None if it cannot be known without a download; and why, as a comment."""
    from come.job.stages.depth import stated_target, target_layers

    merge, model = settings.merge, settings.model
    if merge.target_layers is not None:
        return merge.target_layers, ""
    if merge.groups:
        reason = "follows from merge.groups"
    elif merge.searches_shape:
        return None, f"  # follows from the search for {merge.budget}, with merge.width"
    elif merge.sparsity is None and merge.save_at:
        return stated_target(merge, 0), "  # follows from merge.save_at"
    elif merge.sparsity is None and merge.narrows:
        reason = "follows from merge.width alone, which keeps all layers"
    elif merge.sparsity is None:
        reason = f"follows from the default merge.sparsity={DEFAULT_SPARSITY}"
    else:
        reason = f"follows from merge.sparsity={merge.sparsity}"
    folder: Path | None = local_checkpoint(model.path, model.revision)
    if folder is None:
        return None, f"  # {reason} and the model, which is not on this machine yet"
    try:
        shape = inspect_model(folder, trust_remote_code=model.trust_remote_code)
        return target_layers(merge, shape), f"  # {reason}"
    except ValueError as error:
        return None, f"  # {reason}, but: {one_line(error)}"
