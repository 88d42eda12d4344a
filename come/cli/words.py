"""Checks the words of a command line before Hydra reads them, for one-line error messages."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

DRY_RUN_FLAG = "--dry-run"
_SWITCHES = (
    "--help -h", "--hydra-help", "--version", "--resolve", "--run -r", "--multirun -m",
    "--shell-completion -sc", DRY_RUN_FLAG,
)  # fmt: skip
_WITH_VALUE = (
    "--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd",
    "--experimental-rerun",
)  # fmt: skip
FLAGS = [
    flag
    for flags in (*_SWITCHES, *_WITH_VALUE, "--cfg -c", "--info -i")
    for flag in flags.split(" ")
]
"""The flags of Hydra, and --dry-run."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; come --help lists the settings")


def read_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separates flags from overrides, which may be in any order.

    Returns:
        The values of the flags, and the overrides.

    Raises:
        ValueError: a flag does not exist, has no value, or has a value that is not allowed.
    """
    parser = _Parser(add_help=False)
    for flags in _SWITCHES:
        parser.add_argument(*flags.split(" "), action="store_true")
    for flags in _WITH_VALUE:
        parser.add_argument(*flags.split(" "))
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    info = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=info)
    found, overrides = parser.parse_known_args(list(words))
    for word in overrides:
        if word.startswith("-"):
            near = difflib.get_close_matches(word, FLAGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(flag for flag in FLAGS if flag.startswith("--"))
            raise ValueError(f"{word}: no such flag{hint} (available: {known})")
    return found, overrides


def flag_words(flags: argparse.Namespace) -> list[str]:
    """The flags as words for Hydra, which does not know --dry-run."""
    found = []
    for name, value in vars(flags).items():
        flag = f"--{name.replace('_', '-')}"
        if value and flag != DRY_RUN_FLAG:
            found += [flag] if value is True else [flag, value]
    return found


def check_overrides(overrides: Sequence[str], groups: Sequence[str]) -> None:
    """Checks that every override has the form KEY=VALUE, and that no key is given twice.

    Args:
        overrides: words of the command line that are not flags.
        groups: the config groups, whose value is a choice.

    Raises:
        ValueError: an override has no key or no value, or two overrides have the same key.
    """
    seen: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.startswith("~"):
            continue
        plain = key.lstrip("+")
        if not plain:
            raise ValueError(f"{override}: the name of a setting is missing; write KEY={value}")
        if not equals:
            way = "CHOICE (come --help lists them)" if plain in groups else "VALUE"
            raise ValueError(f"{override}: a value is missing; write {plain}={way}")
        plain = plain.replace("merge/", "merge.", 1)
        if plain in seen:
            raise ValueError(
                f"{plain} is given twice, as {seen[plain]} and {override}; leave one of them out "
                f"(several values are a sweep: {plain}=A,B -m)"
            )
        seen[plain] = override


def check_sweep(overrides: Sequence[str]) -> None:
    """Raises ValueError if all jobs of a sweep would push to the same repository."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "hub.push" and value != "null" and not {"$", ","} & set(value):
            raise ValueError(
                f"{override}: every job of the sweep would push to this repository; name it after "
                f"what varies, as in 'hub.push={value}-${{merge.target_layers}}', or push a "
                "finished run with its own command"
            )
