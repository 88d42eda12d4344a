"""Reports settings on the command line that have no effect, so that none is silently ignored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from come.merge.method import Method
from come.schema import Settings

_GROUPS = ("merge", "calibration")  # hold settings besides those of the choice


def check_explicit(settings: Settings, overrides: Iterable[str]) -> None:
    """Checks that the overrides have an effect.

    Args:
        settings: the job's settings.
        overrides: overrides on the command line, such as "merge.m=2".

    Raises:
        ValueError: a setting has no effect; the message has the setting that disables it.
    """
    given = [override.lstrip("+").partition("=") for override in overrides]
    keys = [key.replace("/", ".") for key, _, value in given if value != "null" and key[0] != "~"]
    for prefixes, reason in _unread(settings):
        components = tuple(f"{prefix}." for prefix in prefixes if prefix not in _GROUPS)
        for key in keys:
            if key in prefixes or key.startswith(components):
                raise ValueError(f"{key} has no effect with {reason}; leave it out")


def method_changes(overrides: Iterable[str]) -> list[str]:
    """The overrides that change the named method, without their prefix: ["refit=ridge"]."""
    found = []
    for override in overrides:
        key, _, value = override.lstrip("+").replace("merge/", "merge.", 1).partition("=")
        group, _, own = key.partition(".")
        if group == "merge" and own.partition(".")[0] in Method.__dataclass_fields__:
            found.append(f"{own}={value}")
    return found


def _unread(settings: Settings) -> Iterator[tuple[list[str], str]]:
    """Keys of the method, text and distillation that nothing reads, each with the reason."""
    merge = settings.merge
    own = [f"merge.{key}" for key in (*merge.settings(), *merge.record())]
    kept = {"merge.save_weights", "merge.enabled", "merge.name", "merge.changes"}
    if settings.from_run is not None:
        yield ["merge", *(key for key in own if key not in kept)], "from_run"
    elif not merge.enabled:
        yield [key for key in own if key not in kept], "merge=none"
    elif merge.plan is not None:
        kept |= {"merge.plan", "merge.target_layers", "merge.save_at"}
        yield [key for key in own if key not in kept], "merge.plan"
    else:
        yield from _unread_parts(settings)
    if (calibration := settings.calibration).mix:
        chosen = [] if calibration.source in calibration.mix else ["calibration"]
        yield ["calibration.source", *chosen], "calibration.mix"
    if settings.export.format == "none":
        yield ["export.types", "export.converter"], "export=none"
    if settings.hub.push is None:
        yield ["hub.private"], "hub.push=null"
    if not settings.distill.active:
        names = [f"distill.{key}" for key in settings.distill.settings()]
        yield [*names, "distill.loss_weights"], "distill=none"


def _unread_parts(settings: Settings) -> Iterator[tuple[list[str], str]]:
    """Keys of components of the method that its other components do not use."""
    merge = settings.merge
    operator = f"merge.operator={merge.operator.name}"
    if merge.operator.drops or merge.operator.fixed_shares(2) is not None:
        yield ["merge.retention"], operator
    if not merge.operator.uses_units:
        yield ["merge.sensitivity"], operator
    elif not merge.retention.uses_scores:
        yield ["merge.sensitivity"], f"merge.retention={merge.retention.name}"
    if not merge.budget.quantity:
        yield ["merge.budget.windows"], "neither merge.budget.parameters nor merge.budget.latency"
    if merge.width == 1 and not merge.budget.quantity:
        yield ["merge.width_multiple"], "merge.width=1, which keeps all channels"
    if merge.refit.narrows_only:
        unread = ["schedule", "selection", "m", "allow_remerge", "protect_first", "protect_last"]
        reason = f"merge.refit={merge.refit.name}, which merges no layers"
        yield [f"merge.{key}" for key in unread], reason
    if merge.groups:
        yield ["merge.schedule", "merge.selection", "merge.m"], "merge.groups"
    elif merge.schedule.single_span:
        yield ["merge.m"], f"merge.schedule={merge.schedule.name}"
    if merge.drops_sublayers:
        unread = ["tokens", "norms", "kinds", "allow_remerge"]
        yield [f"merge.{key}" for key in unread], f"merge.schedule={merge.schedule.name}"
    if not merge.schedule.reads_selection:
        yield ["merge.selection"], f"merge.schedule={merge.schedule.name}"
