"""Registries: short names for pluggable classes, which are discovered in their packages."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from come.setting import HasSettings

T = TypeVar("T")


KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
}
"""For each type of a parameter's default: the accepted types, and their name in error messages."""


class Registry(Generic[T]):
    """Maps short names to classes of one kind; imports every module of `package` on first use.

    A registered class has a `name`, which is its key, and states its origin: `paper` (arXiv id)
    and `source` (where the formula is defined, in words). It may have a `former` name, which is
    reported as renamed.

    Args:
        kind: what the entries are, for error messages ("sensitivity metric").
        package: dotted name of the package, which holds one module per entry.
        config_key: the configuration key that selects an entry ("merge.sensitivity").
    """

    def __init__(self, kind: str, package: str, config_key: str) -> None:
        self.kind = kind
        self.package = package
        self.config_key = config_key
        self._entries: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator that registers `cls` under `cls.name`.

        Raises:
            TypeError: the class has no `name`.
            ValueError: another class is registered under this name.
        """
        if not isinstance(getattr(cls, "name", None), str):
            raise TypeError(f"{cls.__qualname__} needs a class attribute 'name' (str)")
        name: str = getattr(cls, "name")  # noqa: B009 - T carries no bound with `name`
        if not cls.__module__.startswith(self.package):
            self._discover()  # a plugin must not take the name of a built-in entry
        known = self._entries.get(name)
        if known is not None and _identity(known) != _identity(cls):
            raise ValueError(
                f"{self.kind} {name!r} is already registered by {'.'.join(_identity(known))}"
            )
        self._entries[name] = cls
        return cls

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> type[T]:
        """The class registered under `name`.

        Raises:
            ValueError: there is no such entry. The message names its new name if it was renamed,
                otherwise close matches and all names.
        """
        self._discover()
        if name not in self._entries:
            for known in self._entries.values():
                if name == getattr(known, "former", None):
                    new = getattr(known, "name")  # noqa: B009 - T carries no bound with `name`
                    raise ValueError(f"{self.config_key}={name} is now {self.config_key}={new}")
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"{self.config_key}={name!r}: unknown {self.kind}{hint} "
                f"(available: {', '.join(self.names())})"
            )
        return self._entries[name]

    def create(self, name: str, settings: Mapping[str, Any] | None = None) -> T:
        """Builds entry `name` with the given settings; the others keep their defaults.

        Raises:
            ValueError: an unknown name or setting, or a value that is not allowed.
        """
        cls = self.get(name)
        known = cls.settings() if issubclass(cls, HasSettings) else {}
        place = getattr(cls, "config_key", "") or self.config_key
        for key in settings or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"{place}.{key}: {self.config_key}={name} has no such setting{hint} "
                    f"(it has {', '.join(known) or 'none'})"
                )
        return cls(**{known[key].name: value for key, value in (settings or {}).items()})

    def build(self, given: Any) -> T:
        """Builds an entry from its name or a mapping of name and settings; returns others as given.

        Raises:
            ValueError: see `create`.
        """
        if isinstance(given, str):
            return self.create(given)
        if isinstance(given, Mapping):
            return self.create(
                given["name"], {key: value for key, value in given.items() if key != "name"}
            )
        return cast(T, given)

    def options(self, name: str) -> list[str]:
        """Names of the constructor parameters of entry `name`."""
        return [p for p in inspect.signature(self.get(name)).parameters if p != "self"]

    def create_from(self, name: str, settings: Mapping[str, Any] = {}) -> T:
        """Builds entry `name` from `settings`, ignoring those that its constructor does not take.

        Raises:
            ValueError: the name is unknown, a required constructor parameter is missing, or the
                type of a setting does not match the parameter's default.
        """
        cls = self.get(name)
        chosen: dict[str, Any] = {}
        for parameter in inspect.signature(cls).parameters.values():
            if parameter.name in settings:
                chosen[parameter.name] = self._checked(name, parameter, settings[parameter.name])
            elif parameter.default is inspect.Parameter.empty:
                raise ValueError(f"{self.config_key}={name!r} needs the setting {parameter.name!r}")
        return cls(**chosen)

    def _checked(self, name: str, parameter: inspect.Parameter, value: Any) -> Any:
        """Returns the value if its type matches the parameter's default; otherwise ValueError."""
        default = type(parameter.default)
        if default not in KINDS or (value is None and "None" in str(parameter.annotation)):
            return value
        allowed, words = KINDS[default]
        if isinstance(value, allowed) and isinstance(value, bool) == (default is bool):
            return value
        if parameter.annotation in ("Any", Any):
            return value
        raise ValueError(
            f"{self.config_key}={name}: {parameter.name}={value!r} must be {words}, such as "
            f"{parameter.default!r}"
        )

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        try:
            for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
                importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._discovered = False
            raise


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def load_plugin(path: str | Path) -> None:
    """Runs a Python file that registers its own entries; loading the same file again is harmless.

    Args:
        path: the file, as given in the setting `plugins`.

    Raises:
        ValueError: the file does not exist, is not a Python file, or raises an exception.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"plugins has {path}, which is not a file")
    name = f"come_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugins has {path}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"plugins: {path} fails with {type(error).__name__}: {error}") from error
