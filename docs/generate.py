"""Pages made from the registries, the typed settings and results: methods, settings, tools."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from come.distill.objectives.base import DISTILL
from come.evaluate.base import EVALUATIONS
from come.merge.method import PARTS
from come.schema import Settings
from come.setting import HasSettings

DOCS = Path(__file__).parent
CONF = DOCS.parent / "conf"
TOOLS = DOCS.parent / "experiments" / "tools"


def link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""


def first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def methods() -> str:
    """Recipes of conf/merge and the entries of every registry."""
    lines = ["# Methods", "", "`merge=NAME` chooses a method: parts that work together.", ""]
    parts = list(PARTS)
    lines += [f"| merge | {' | '.join(parts)} | |", f"|{'---|' * (len(parts) + 2)}"]
    for path in sorted((CONF / "merge").glob("*.yaml")):
        text = path.read_text()
        if path.stem in ("none", "from_plan"):
            continue
        chosen: dict[str, str] = {}
        for entry in yaml.safe_load(text)["defaults"]:
            chosen |= entry if isinstance(entry, dict) else {}
        about = text.splitlines()[0].removeprefix("# ").split(": python run.py")[0]
        lines.append(f"| `{path.stem}` | {' | '.join(f'`{chosen[p]}`' for p in parts)} | {about} |")
    lines += ["", "Every part can be exchanged alone: `merge.PART=NAME`."]
    registries: dict[str, Any] = {f"merge.{part}": registry for part, registry in PARTS.items()}
    for key, registry in [*registries.items(), ("distill", DISTILL)]:
        lines += ["", f"## {key}", "", "| name | | source |", "|---|---|---|"]
        for name in registry.names():
            cls = registry.get(name)
            source = f"{cls.source} {link(cls.paper)}".strip()
            lines.append(f"| `{name}` | {first_line(cls)} | {source} |")
    return "\n".join(lines) + "\n"


def table(cls: type[HasSettings], prefix: str) -> list[str]:
    """A row for every setting of a class."""
    rows = []
    for key, entry in cls.settings().items():
        about = entry.metadata["setting"]
        default = cls.defaults()[key]
        shown = "from the calibration text" if str(default).startswith("${") else f"`{default}`"
        rows.append(f"| `{prefix}.{key}` | {shown} | {about.doc} | {about.allowed} |")
    for key, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and issubclass(kind, HasSettings):
            rows += table(kind, f"{prefix}.{key}")
    return rows


def settings() -> str:
    """Every setting of every group and part."""
    head = ["| setting | default | | allowed |", "|---|---|---|---|"]
    lines = ["# Settings", "", "`come --cfg job` prints the values that a command will use."]
    hints = get_type_hints(Settings)
    for group in fields(Settings):
        kind = hints[group.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            lines += ["", f"## {group.name}", "", *head, *table(kind, group.name)]
    for name in EVALUATIONS.names():
        lines += ["", f"## eval={name}", "", first_line(EVALUATIONS.get(name)), "", *head]
        lines += table(EVALUATIONS.get(name), f"eval.{name}")
    for part, registry in PARTS.items():
        entries = [registry.get(name) for name in registry.names()]
        for cls in entries:
            if cls.settings():
                lines += ["", f"## merge.{part}={cls.name}", "", *head]
                lines += table(cls, f"merge.{part}")
    return "\n".join(lines) + "\n"


def tools() -> str:
    """The tools that read a compressed model, from the committed results of `make tools`."""
    _, _, rest = (TOOLS / "README.md").read_text().partition("\n\n")
    return f"# Tools that read the result\n\n{rest.strip()}\n\n{(TOOLS / 'table.md').read_text()}"


def main() -> None:
    (DOCS / "tools.md").write_text(tools())
    (DOCS / "methods.md").write_text(methods())
    (DOCS / "settings.md").write_text(settings())


if __name__ == "__main__":
    main()
