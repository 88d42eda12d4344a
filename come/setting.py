"""Settings: documented and validated fields of the dataclass that uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Setting:
    """Documentation and allowed values of a setting.

    Attributes:
        doc: what the setting does, one line.
        kind: type of the values: bool, int, float, str, list or dict.
        least: smallest allowed number, inclusive.
        above: exclusive lower bound.
        most: largest allowed number, inclusive.
        below: exclusive upper bound.
        choices: allowed strings, or allowed items of a list; empty if any are allowed.
        words: strings that are allowed in place of a number.
        optional: whether null is allowed.
        config: default in the composed configuration, if it is an interpolation; otherwise None.
        counts: whether the value is part of the job hash because it can change a result. False for
            labels and locations, and for paths, whose content is hashed instead.
    """

    doc: str
    kind: type
    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    optional: bool = False
    config: str | None = None
    counts: bool = True

    @property
    def allowed(self) -> str:
        """Description of the allowed values, for example "a whole number of at least 1"."""
        if self.kind is list and self.choices:
            return f"a list of {', '.join(self.choices)}"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        text = _WORDS.get(self.kind, "a mapping" if self.kind is dict else "a list")
        limits = {
            "of at least": self.least,
            "above": self.above,
            "of at most": self.most,
            "below": self.below,
        }
        given = [f"{words} {limit:g}" for words, limit in limits.items() if limit is not None]
        text = f"{text} {' and '.join(given)}" if given else text
        return ", or ".join([text, *self.words, *(["null"] if self.optional else [])])

    def accepts(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if value is None or (isinstance(value, str) and value in self.words):
            return self.optional if value is None else True
        if self.kind is dict:
            return isinstance(value, Mapping)
        if self.kind is list:
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            return listed and (not self.choices or set(value) <= set(self.choices))
        if isinstance(value, bool) != (self.kind is bool):
            return False
        if self.choices:
            return value in self.choices
        if self.kind is str or self.kind is bool:
            return isinstance(value, self.kind)
        if not isinstance(value, int | float) or (self.kind is int and isinstance(value, float)):
            return False
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any, doc: str, *, kind: type | None = None, **limits: Any) -> Any:
    """Creates a dataclass field that is a setting.

    Args:
        default: the default; a list or dict is copied for every instance.
        doc: what the setting does, one line.
        kind: type of the values; by default the type of `default`.
        limits: other attributes of `Setting`.
    """
    about = {"setting": Setting(doc, kind or type(default), **limits)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=about, kw_only=True)
    return field(default=default, metadata=about, kw_only=True)


class HasSettings:
    """Base of dataclasses with settings, whose values are validated when an instance is created.

    A setting that is named like a Python keyword has a trailing underscore in the class and none
    in the configuration: `lambda_` is `merge.refit.lambda`.

    Raises:
        ValueError: a value is not allowed; the message has its key and the allowed values.
    """

    config_key: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for key, entry in self.settings().items():
            value = getattr(self, entry.name)
            about: Setting = entry.metadata["setting"]
            if not about.accepts(value):
                place = f"{self.config_key}.{key}" if self.config_key else key
                raise ValueError(f"{place}={_shown(value)}: must be {about.allowed}")
            if about.kind is float and isinstance(value, int):
                object.__setattr__(self, entry.name, float(value))

    @classmethod
    def settings(cls) -> dict[str, Field[Any]]:
        """The dataclass fields of the settings, by configuration key."""
        if not hasattr(cls, "__dataclass_fields__"):
            return {}
        own = [entry for entry in fields(cls) if "setting" in entry.metadata]  # type: ignore[arg-type]
        return {entry.name.rstrip("_"): entry for entry in own}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Default values by key, as they appear in the composed configuration."""
        found = {}
        for key, entry in cls.settings().items():
            config = entry.metadata["setting"].config
            made = entry.default_factory() if callable(entry.default_factory) else entry.default
            found[key] = made if config is None else config
        return found

    def record(self) -> dict[str, Any]:
        """Values by key, as plain data."""
        return {key: getattr(self, entry.name) for key, entry in self.settings().items()}

    def counted(self) -> dict[str, Any]:
        """The values of `record` that can change a result and are part of the job hash."""
        own = self.settings().items()
        ignored = {key for key, entry in own if not entry.metadata["setting"].counts}
        return {key: value for key, value in self.record().items() if key not in ignored}


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
