"""A full disk, a read-only folder, two processes on one job, and a clock that jumps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from checks import half_written
from forked import FileEvents, Run, start
from jobs import Scenario, Workspace, scenarios
from kills import Reference, compared, undisturbed
from record import Record

KINDS = ("full disk", "read-only folder", "two processes", "jumping clock")
DISK = "24m"  # of the small disk; a job of the campaign writes at most a few MB
_FILLER = "filler.bin"


def disk(work: Workspace, record: Record, *, count: int = 120, only: str = "") -> None:
    """The part of the campaign: every kind on every job, in turn."""
    jobs = {n: s for n, s in scenarios(work).items() if only in ("", n) and not s.sweep}
    references: dict[str, Reference] = {}
    for index in range(count):
        kind = KINDS[0] if index % 2 == 0 else KINDS[1 + (index // 2) % 3]
        name = list(jobs)[(index // 2) % len(jobs)]
        case = f"disk-{record.seed}-{index:03d}-{name}-{kind.replace(' ', '-')}"
        if not record.wants(case):
            continue
        with small_disk(work.folder / "small") as folder:
            if folder is None:
                record.add(case, {}, kind=kind, stage=name, faults=0, skipped="mount needs root")
                continue
            if name not in references:
                references[name] = undisturbed(jobs[name], folder / "case")
            one(case, kind, jobs[name], references[name], folder / "case", record)


@contextlib.contextmanager
def small_disk(folder: Path):  # type: ignore[no-untyped-def]
    """A disk of a few MB in memory; yields None where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def one(
    case: str,
    kind: str,
    scenario: Scenario,
    reference: Reference,
    folder: Path,
    record: Record,
) -> None:
    """Disturbs a run, undoes the disturbance, completes the run, and compares."""
    rng = random.Random(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = scenario.command(folder / "run")
    at = rng.randint(1, reference.events)
    found: dict[str, str] = {}
    if kind == "two processes":
        runs, happened = _several(words, folder, reference, rng)
    elif kind == "jumping clock":
        runs, happened = (
            [start(words, folder, main=reference.main, arm=_jumps(rng)).wait()],
            "the clock jumps",
        )
    else:
        arm, happened = _disturbance(kind, folder, at, rng)
        printed = folder.parents[1] / "printed"  # not on the full disk
        runs = [start(words, folder, main=reference.main, arm=arm, printed=printed).wait()]
        for made in [folder, *folder.rglob("*")]:
            if made.is_dir():
                made.chmod(0o755)
        (folder / _FILLER).unlink(missing_ok=True)
        error = runs[0].errors
        if runs[0].code != 0 and (len(error) != 1 or len(error[0]) > 1200):
            found["unclear"] = runs[0].err[-500:]
    if any(run.traceback for run in runs):
        found["traceback"] = next(run.err for run in runs if run.traceback)[-900:]
    if any(run.hung for run in runs):
        found["hang"] = happened
    if wrong := half_written(folder):
        found["half_written"] = "; ".join(wrong)[:500]
    last = start(words, folder, main=reference.main).wait()
    found |= compared(last, folder / "run", reference)
    record.add(case, found, kind=kind, stage=scenario.name, happened=happened,
               codes=[run.code for run in runs], said=runs[0].errors[:1])  # fmt: skip


def _disturbance(
    kind: str, folder: Path, at: int, rng: random.Random
) -> tuple[Callable[[], None], str]:
    """Prepares a fault before change `at` of a file."""
    if kind == "full disk":
        left = rng.choice([0, 0, 4096, 65536])
        events = FileEvents(folder, at, lambda: _fill(folder, left))
        return events.arm, f"{left} bytes left from change {at} on"

    def close() -> None:
        for made in [folder / "run", *(folder / "run").rglob("*"), folder / "cache"]:
            if made.is_dir():
                made.chmod(0o555)

    events = FileEvents(folder, at, close)

    def arm() -> None:
        _drop_override()
        events.arm()

    return arm, f"read-only from change {at} on"


def _fill(folder: Path, left: int) -> None:
    """Fills the disk up to `left` bytes."""
    with open(folder / _FILLER, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        with contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        file.truncate(max(0, file.tell() - left))


def _drop_override() -> None:
    """Gives up the capabilities with which root ignores the permissions of folders."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = tuple((n, ctypes.c_uint32) for n in ("effective", "permitted", "inheritable"))

    libc, header, data = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (Data * 2)()
    libc.capget(ctypes.byref(header), data)
    for own in ("effective", "permitted"):
        setattr(data[0], own, getattr(data[0], own) & ~0b110)
    if libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _several(
    words: list[str], folder: Path, reference: Reference, rng: random.Random
) -> tuple[list[Run], str]:
    """Two or three processes run the same job; in half of the cases the first one is killed."""
    number, kill = rng.choice([2, 3]), rng.random() < 0.5
    started = []
    for index in range(number):
        started.append(
            start(words, folder, main=reference.main, printed=folder / "printed" / str(index))
        )
        time.sleep(rng.uniform(0, 2.0))
    if kill:
        started[0].spend(rng.uniform(0, 1.0) * reference.seconds)
        started[0].send(signal.SIGKILL)
    runs = [process.wait() for process in started]
    wrong = [run for run in runs[kill:] if run.code != 0]
    for run in wrong:
        run.err += "\nTraceback (most recent call last): the other process failed"
    return runs, f"{number} processes{', the first is killed' if kill else ''}"


def _jumps(rng: random.Random) -> Callable[[], None]:
    """The wall clock jumps by up to thirty years between two readings."""
    year = 365 * 86400.0

    def arm() -> None:
        real, real_ns = time.time, time.time_ns

        def now() -> float:
            return real() + rng.choice([0.0, -30 * year, 30 * year, -3600.0, 3600.0])

        time.time = now
        time.time_ns = lambda: int(now() * 1e9) + 0 * real_ns()

    return arm
