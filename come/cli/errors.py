"""One-line messages for user errors: the setting, the allowed values, and how to fix it."""

from __future__ import annotations

import difflib
import errno
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from come.cli.overrides import renamed
from come.errors import one_line
from come.evaluate.base import EVALUATIONS
from come.merge.method import PARTS
from come.registry import Registry
from come.schema import Settings

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk that may come without the name of a file."""
OUT_OF_MEMORY = (
    "out of memory; calibration.memory=SIZE limits what a merge uses, model.weights=disk and "
    "calibration.batch_size=1 need less; the same command resumes"
)
USER_ERRORS = (ValueError, HydraException, OmegaConfBaseException)

_EXPECTED = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "a valid bool": "true or false",
}


def user_line(error: Exception) -> str:
    """The message of a user error on one line."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MissingConfigException):
        return _no_such_choice(error)
    former = re.search(r"Could not override '(\S+?)'", str(error))  # in a defaults list
    if former is not None and (line := renamed(former[1])) is not None:
        return line
    cause = error.__cause__ if isinstance(error, HydraException) else None
    text = " ".join(one_line(part) for part in (error, cause) if part is not None)
    if text.startswith("Ambiguous value for argument"):
        override = text.split("'")[1]
        key, _, value = override.partition("=")
        return (
            f"{override}: several values are a sweep, which -m (--multirun) runs; one list is "
            f"written {key}=[{value}]"
        )
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        return _wrong_setting(text)
    return text


def is_interrupt(error: BaseException | None) -> bool:
    """Whether the exception is an interrupt, or was raised while one was handled.

    A library that cleans up after an interrupt can fail in doing so.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch could not allocate memory."""
    words = (
        "can't allocate memory",
        "cannot allocate memory",
        "out of memory",
        "start new thread",
        "failed to map segment",  # of a library that is imported when it is needed
        "error return without exception set",  # Python could not allocate the MemoryError
    )
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def near(name: str, names: list[str]) -> str:
    """Suggests close matches: "; did you mean x or y?", or "" if there are none."""
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def setting_names(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Keys of all settings and their groups, such as "merge.m" and "merge"."""
    hints = get_type_hints(cls)
    for entry in fields(cls):
        own = hints[entry.name]
        if is_dataclass(own):
            assert isinstance(own, type)
            yield from setting_names(own, f"{prefix}{entry.name}.")
        yield f"{prefix}{entry.name}"
    if cls is Settings:
        for name in EVALUATIONS.names():
            yield from (f"eval.{name}.{key}" for key in EVALUATIONS.get(name).settings())


def no_such_setting(name: str) -> str:
    """Message for a setting that does not exist, with its new name if it had this one before."""
    return renamed(name) or (
        f"{name}: no such setting{near(name, list(setting_names()))} (come --cfg job lists all of "
        "them)"
    )


def _part_of(name: str) -> str | None:
    """Message for an unknown setting of a method's component; None for any other setting."""
    for part, registry in PARTS.items():
        prefix = f"merge.{part}."
        if name.startswith(prefix):
            having = [n for n in registry.names() if name[len(prefix) :] in _settings(registry, n)]
            own = f"; merge.{part}={' or '.join(having)} has it" if having else ""
            known = sorted({key for n in registry.names() for key in _settings(registry, n)})
            hint = own or near(name[len(prefix) :], known)
            return (
                f"{name}: the chosen merge.{part} has no such setting{hint} "
                "(come --cfg job shows what is chosen)"
            )
    return None


def _evaluation_of(name: str) -> str | None:
    """Message for a setting of an evaluation that was not chosen; None for any other setting."""
    group, _, rest = name.partition(".")
    chosen, _, setting = rest.partition(".")
    if group != "eval" or chosen not in EVALUATIONS.names():
        return None
    if setting and setting not in _settings(EVALUATIONS, chosen):
        return None
    example = ",".join(dict.fromkeys(["perplexity", chosen]))
    return f"{name}: the evaluation {chosen} is not chosen; list it, as in eval=[{example}]"


def _settings(registry: Registry[Any], name: str) -> list[str]:
    return list(registry.get(name).settings())


def _unreadable(error: OverrideParseException) -> str:
    """Message for an override that Hydra cannot parse, with the correct quoting."""
    key, _, value = error.override.partition("=")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    word = shlex.quote(f'{key}="{quoted}"')
    return (
        f"{error.override} cannot be read ({one_line(error)}); a value with spaces or signs is "
        f"quoted twice, for the shell and for Hydra: {word}"
    )


def _no_such_choice(error: MissingConfigException) -> str:
    """Message for a config group that does not have the requested choice."""
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    names: list[str] = list(error.options or [])
    if not group or not names:
        return one_line(error)
    part = PARTS.get(group.removeprefix("merge/"))
    if (line := renamed(group, choice)) is not None:
        return line
    if part is not None:
        try:
            part.get(choice)
        except ValueError as known:
            return str(known)
    return f"{group}={choice}: no such choice{near(choice, names)}; available: {', '.join(names)}"


def _wrong_setting(text: str) -> str:
    """Message for a setting that does not exist or has the wrong type."""
    key = re.search(r"full_key: (\S+)", text)
    if key is None:
        return text
    name = key[1]
    if re.search(r"\bnot in ('|struct)", text):
        part = _part_of(name) or _evaluation_of(name)
        if part is not None:
            return part
        return no_such_setting(name)
    wrong = re.search(
        r"Value '(.*?)' .*?(converted to Integer|converted to Float|a valid bool)", text
    )
    if wrong is not None:
        return f"{name}={wrong[1]}: must be {_EXPECTED[wrong[2]]}"
    return text
