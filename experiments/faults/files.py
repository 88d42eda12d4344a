"""Truncated, empty and foreign files in a job's folder and in the caches.

A job is killed before a random change of a file, or finished; then one of its files is damaged, and
the same command must end with the same result.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from checks import digest
from forked import FileEvents, start
from jobs import Scenario, Workspace, scenarios
from kills import Reference, compared, differing, undisturbed
from record import Record

JOBS = ("trials", "distill", "memory", "sampling", "layerwise", "shards", "evaluate")
FOREIGN = (
    "{}",
    "[]",
    "null",
    '{"job": "0"}',
    '{"job": 3, "depths": []}',
    '{"format": 1}',
    "[" * 5000,
)


def _truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _foreign(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(FOREIGN))


def _noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randint(1, 4096)))


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(4):
        data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _missing(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "empty": _empty,
    "foreign": _foreign,
    "noise": _noise,
    "missing": _missing,
}
OTHERS: dict[str, Callable[[Path, random.Random], None]] = {"folder": _folder}


def files(work: Workspace, record: Record, *, count: int = 100, only: str = "") -> None:
    """The part of the campaign."""
    jobs = scenarios(work)
    names = [name for name in JOBS if only in ("", name)]
    references: dict[str, Reference] = {}
    for index in range(count):
        name = names[index % len(names)]
        kind = list(DAMAGES)[(index // len(names)) % len(DAMAGES)]
        case = f"files-{record.seed}-{index:03d}-{name}-{kind}"
        if not record.wants(case):
            continue
        folder = work.folder / "case"
        if name not in references:
            references[name] = undisturbed(jobs[name], folder)
        one(case, kind, jobs[name], references[name], folder, record)


def one(
    case: str, kind: str, scenario: Scenario, reference: Reference, folder: Path, record: Record
) -> None:
    """Interrupts a job, damages one to three of its files, and completes it."""
    rng = random.Random(case)
    shutil.rmtree(folder, ignore_errors=True)
    words, run = scenario.command(folder / "run"), folder / "run"
    at = rng.randint(reference.events // 4, reference.events + reference.events // 4)
    kill = FileEvents(folder, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    start(words, folder, arm=kill.arm, main=reference.main).wait()
    own = [
        path
        for path in sorted([*run.rglob("*"), *(folder / "cache").rglob("*")])
        if path.is_file() and path.stat().st_size and path.suffix not in (".lock", ".png", ".md")
        and path.name not in ("run.log", "metrics.jsonl") and ".partial" not in path.as_posix()
        and (path.suffix in (".json", ".safetensors") or path.parent.name == "hashes")
    ]  # fmt: skip
    model = {path for path in own if path.parent.name == "come" and path.name == "plan.json"}
    damaged = [path for path in own if path not in model or kind != "missing"]
    chosen = rng.sample(damaged, min(len(damaged), rng.choice([1, 1, 2, 3])))
    for path in chosen:
        DAMAGES[kind](path, rng)
    last = start(words, folder, main=reference.main).wait()
    found = compared(last, run, reference)
    names = [path.relative_to(folder).as_posix() for path in chosen]
    foreign = run / "result.json" in chosen and "another job" in last.err
    configuration = {"config.json", "tokenizer.json", "generation_config.json",
                     "tokenizer_config.json"}  # fmt: skip
    companions = {
        path.relative_to(run).as_posix()
        for path in chosen
        if path.is_relative_to(run) and path.name in configuration
    }
    differ = set(differing(reference.digest, digest(run)))
    if "lost" in found and (foreign or "was not made by come" in last.err):
        # a result or a folder of somebody else is refused in one line, not overwritten
        if len(last.errors) == 1 and not last.traceback:
            del found["lost"]
    elif "lost" in found and last.code == 0 and differ and differ <= companions:
        del found["lost"]  # of a finished model: its companions are not read again
        record.add(case, found, kind=kind, stage=scenario.name, files=names, at=at, kept=True)
        return
    record.add(case, found, kind=kind, stage=scenario.name, files=names, at=at,
               said=last.errors[:1])  # fmt: skip
