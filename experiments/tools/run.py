"""Installs tools that read model folders, runs them on compressed models, and compares.

    python experiments/tools/run.py                     # all of them: hours, and 10 GB
    python experiments/tools/run.py --only PEFT TRL     # some of them

Every tool gets an environment of its own in --work. What is done is not done again: a model, an
environment, a tool on a model (unless its script, its packages or the model changed). A tool that
cannot be installed or run is a row with the reason; --again runs it once more. The folder --out
gets results.jsonl and table.md; rows of tools that were not run stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "readers"), str(HERE.parents[1])]

from catalogue import REASONS, TOOLS, Tool  # noqa: E402
from environments import CannotInstallError, Environment, environment  # noqa: E402
from models import MODELS, make  # noqa: E402
from readers.protocol import Request, write_request  # noqa: E402
from table import judge, table  # noqa: E402

SECONDS = 3000
FIELDS = ("folder", "prompts", "prompt_ids", "texts", "windows", "new_tokens")
Rows = list[dict[str, Any]]


def fingerprint(tool: Tool, probe: dict[str, Any]) -> str:
    """Hash of what a result depends on: script, packages, and the model with its reference."""
    digest = hashlib.sha256()
    for name in (tool.script, "protocol"):
        digest.update((HERE / "readers" / f"{name}.py").read_bytes())
    digest.update(json.dumps([tool.install, probe["hash"], probe["prompts"]]).encode())
    return digest.hexdigest()[:16]


def run_tool(tool: Tool, model: str, probe: dict[str, Any], made: Environment, work: Path) -> Rows:
    """Runs a tool's script on a model; returns a row for every form, or one with the reason."""
    shutil.rmtree(work, ignore_errors=True)
    scratch, out = work / "scratch", work / "answers.jsonl"
    scratch.mkdir(parents=True)
    given = {key: probe[key] for key in FIELDS}
    given |= {"model": model, "work": str(scratch), "out": str(out), "package": tool.package}
    write_request(Request(**given), work / "request.json")
    script = HERE / "readers" / f"{tool.script}.py"
    log = work / "log.txt"
    try:
        with log.open("w") as file:
            code = subprocess.run(
                [str(made.python), str(script), str(work / "request.json")],
                cwd=scratch,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | made.variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            ).returncode
        reason = last_line(log) if code else ""
    except subprocess.TimeoutExpired:
        reason = f"took more than {SECONDS} seconds"
    shutil.rmtree(scratch, ignore_errors=True)
    answers = [json.loads(line) for line in out.open()] if out.is_file() else []
    rows = [judge(answer, probe) for answer in answers]
    return [*rows, {"reason": reason or "reported nothing"}] if reason or not rows else rows


def last_line(log: Path) -> str:
    """The last line of a log, usually the exception, cut to a readable length."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    found = next((line for line in reversed(lines) if line), "failed without a message")
    return re.sub(r"(?:/[\w.+-]+)+/", "", found)[:300]  # without the folders of this machine


def finished(path: Path, key: str, again: bool) -> Rows | None:
    """The rows of an earlier run with the same fingerprint; None if there are none."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    failed = any("reason" in row for row in saved["rows"])
    return None if saved["key"] != key or (again and failed) else saved["rows"]


def write(out: Path, new: Rows, tools: Sequence[Tool]) -> str:
    """Replaces rows in results.jsonl, and writes table.md; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    old = [json.loads(line) for line in path.open()] if path.is_file() else []
    replaced = {(row["tool"], row["model"]) for row in new}
    rows = [row for row in old if (row["tool"], row["model"]) not in replaced] + new
    order = [tool.name for tool in tools]
    rows = [row for row in rows if row["tool"] in order]
    rows.sort(key=lambda row: (order.index(row["tool"]), MODELS.index(row["model"])))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = table(rows, order, MODELS, REASONS)
    (out / "table.md").write_text(shown)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="TOOL")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--again", action="store_true", help="runs what failed once more")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs" / "tools")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    known = {tool.name.lower(): tool for tool in TOOLS}
    for name in arguments.only:
        if name.lower() not in known:
            parser.error(f"there is no tool {name!r}; choose from {', '.join(known)}")
    chosen = [known[name.lower()] for name in arguments.only] or list(TOOLS)
    work = arguments.work.resolve()
    probes = {name: make(name, work / "models" / name) for name in arguments.models}
    for tool in chosen:
        for model, probe in probes.items():
            if model in tool.models:
                rows = _rows(tool, model, probe, work, arguments.again)
                write(arguments.out, rows, TOOLS)
    print((arguments.out / "table.md").read_text())


def _rows(tool: Tool, model: str, probe: dict[str, Any], work: Path, again: bool) -> Rows:
    """Rows of a tool and a model, from an earlier run if it is finished."""
    name = tool.name.replace(" ", "-")
    folder, key = work / "results" / name / model, fingerprint(tool, probe)
    path = folder / "rows.json"
    rows = finished(path, key, again)
    if rows is None:
        print(f"{tool.name}: {model}", flush=True)
        began = time.perf_counter()
        try:
            made = environment(tool, work / "envs" / name)
            rows = run_tool(tool, model, probe, made, folder)
        except CannotInstallError as error:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{"reason": f"not installed: {error}"}]
        seconds = round(time.perf_counter() - began, 1)
        rows = [{"tool": tool.name, "model": model, **row, "seconds": seconds} for row in rows]
        path.write_text(json.dumps({"key": key, "rows": rows}))
        for row in rows:
            print("   ", json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
