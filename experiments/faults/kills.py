"""Kills runs at random moments and between two changes of files, then runs them to the end."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checks import digest, half_written, leftovers
from forked import LIMIT, FileEvents, Run, Started, composed, interpreter, start
from jobs import Scenario, Workspace, scenarios
from record import Record

CHAIN = 10  # kills of one job, before it is run to its end
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@dataclass
class Reference:
    """An undisturbed run: its hashes, CPU seconds, number of changes of files, and its code."""

    digest: dict[str, str]
    seconds: float
    events: int
    main: Callable[[], int] | None
    """Runs the job in a child; None for the command line."""


def undisturbed(scenario: Scenario, folder: Path) -> Reference:
    """Runs a job twice, undisturbed, in the folder of its cases: the hashes must be the same.

    The first run is the whole command line, the second one a job whose configuration is composed.
    """
    found: list[dict[str, str]] = []
    seconds, events = 0.0, 0
    main = None
    for through_main in (True, False):
        if not through_main and not scenario.sweep:
            main = composed(scenario.command(folder / "run"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        counted = FileEvents(folder)
        run = start(
            scenario.command(folder / "run"),
            folder,
            main=main,
            arm=counted.arm,
            after=lambda counted=counted: _events(folder).write_text(str(counted.count)),
        ).wait()
        assert run.code == 0, f"{scenario.name}: {run.err[-3000:]}"
        found.append(digest(folder / "run"))
        seconds = run.seconds
        events = int(_events(folder).read_text())
    assert found[0], scenario.name
    assert found[0] == found[1], f"{scenario.name} is not deterministic: {_differs(*found)}"
    return Reference(found[0], seconds, events, main)


def _events(folder: Path) -> Path:
    return folder / "printed" / "events"


def kills(work: Workspace, record: Record, *, count: int = 260, only: str = "") -> None:
    """The part of the campaign: chains of kills, each followed by a run to the end."""
    jobs = {n: s for n, s in scenarios(work).items() if only in ("", n)}
    order = sorted(
        (share / scenario.share, name)
        for name, scenario in jobs.items()
        for share in range(scenario.share)
    )
    references: dict[str, Reference] = {}
    for index in range(count // CHAIN):
        name = only or (order[index % len(order)][1] if index % 12 != 11 else "parallel")
        case = f"kill-{record.seed}-{index:03d}-{name}"
        if not record.wants(case):
            continue
        scenario = jobs[name]
        if name not in references:
            references[name] = undisturbed(scenario, work.folder / "case")
        one(case, scenario, references[name], work.folder / "case", record)


def one(case: str, scenario: Scenario, reference: Reference, folder: Path, record: Record) -> None:
    """Kills a run several times, completes it, and compares with the undisturbed run."""
    rng = random.Random(case)
    shutil.rmtree(folder, ignore_errors=True)
    kind = rng.choice([*SIGNALS, "SIGKILL", "out of memory", "file change", "file change"])
    if not scenario.share:
        kind = rng.choice(list(SIGNALS))
    elif rng.random() < 0.06:
        kind = "new interpreter"
    chain = CHAIN if scenario.share and kind != "new interpreter" else 2
    found: dict[str, str] = {}
    happened, seconds = [], 0.0
    groups: list[Started] = []
    ended = 0  # runs that the fault ended; the others were faster than it
    words = scenario.command(folder / "run")
    for _ in range(chain):
        run, what = _disturb(kind, words, folder, reference, rng, scenario, groups)
        happened.append(what)
        ended += run.code != 0
        if run.code == 0:  # faster than the fault: the next one meets a new run
            shutil.rmtree(folder / "run", ignore_errors=True)
        seconds += run.seconds
        if run.traceback:
            found["traceback"] = run.err[-700:]
        if run.hung:
            found["hang"] = what
        if wrong := half_written(folder):
            found["half_written"] = "; ".join(wrong)[:500]
    last = start(words, folder, main=reference.main).wait()
    for group in groups:  # workers of a parallel launcher whose parent was killed
        group.send(signal.SIGKILL, group=True)
    seconds += last.seconds
    found |= compared(last, folder / "run", reference)
    record.add(case, found, kind=kind, stage=scenario.name, faults=ended, happened=happened,
               seconds=round(seconds, 1))  # fmt: skip


def compared(run: Run, folder: Path, reference: Reference) -> dict[str, str]:
    """What is wrong with a run that must have completed with the result of the reference."""
    found: dict[str, str] = {}
    if run.hung:
        found["hang"] = "the last run"
    if run.traceback:
        found["traceback"] = run.err[-500:]
    own = digest(folder)
    if run.code != 0 or own != reference.digest:
        names = ", ".join(differing(reference.digest, own)) or "same"
        found["lost"] = f"exit {run.code}; {names}; {run.err[-300:]}"
    if left := leftovers(folder):
        found["leftover"] = ", ".join(left)[:300]
    return found


def _disturb(
    kind: str,
    words: list[str],
    folder: Path,
    reference: Reference,
    rng: random.Random,
    scenario: Scenario,
    groups: list[Started],
) -> tuple[Run, str]:
    if kind == "new interpreter":
        return _interpreter(words, folder, reference, rng)
    if kind == "file change":
        at = rng.randint(1, max(reference.events, 1))
        kill = FileEvents(folder, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return start(words, folder, arm=kill.arm, main=reference.main).wait(), f"before change {at}"
    after = rng.uniform(0.1, 1.0) * reference.seconds
    process = start(words, folder, main=reference.main)
    groups.append(process)
    process.spend(after)
    if kind == "out of memory":
        extra = rng.choice([0, 0, 1, 4]) << 20
        _limit_memory(process, extra)
        return process.wait(), f"{extra >> 20} MB more after {after:.2f} s of CPU time"
    group = scenario.sweep and rng.random() < 0.5
    process.send(SIGNALS[kind], group=group)
    return process.wait(), f"after {after:.2f} s of CPU time{', its group' if group else ''}"


def _limit_memory(process: Started, extra: int) -> None:
    """Lowers the address space of a running process to what it has, plus `extra` bytes."""
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + extra
        resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
    except (OSError, ProcessLookupError, IndexError):
        return


def _interpreter(
    words: list[str], folder: Path, reference: Reference, rng: random.Random
) -> tuple[Run, str]:
    """Kills `python run.py` at a random moment of the work after its imports."""
    process = interpreter(words, folder)
    while process.poll() is None and not (folder / "run").exists():
        time.sleep(0.01)
    after = rng.uniform(0.0, 1.0) * 60  # other imports follow
    until = time.monotonic() + after
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    code = process.wait(LIMIT)
    err = (folder / "printed" / "err").read_text(errors="replace")
    return Run(code, "", err, 0.0), f"{after:.1f} s after its folder"


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Names of files, or of parts of a result, that are not the same in two digests."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
