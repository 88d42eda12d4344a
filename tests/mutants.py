"""Mutation testing with the fast tests: `make mutants` changes the package in one place at a time.

    make mutants ARGS="--sample 200"      a random sample of all mutants; a second run resumes

A mutant is killed if a test that covers its line fails: first the tests that cover it in their own
process, the short ones and those of little else before the others, then the tests that start
commands. Results are appended to `results.jsonl` in the output folder, and a summary is printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutations import ROOT, Mutant, mutants

_FORK = multiprocessing.get_context("fork")
_SHARED = ("torch", "transformers", "hypothesis", "omegaconf", "hydra", "matplotlib.pyplot")
"""Imports of the tests, loaded once before forking."""
PACKAGES = ("merge", "linalg", "evaluate", "job", "distill")


class Coverage:
    """Which tests cover a line, and how long they take; measured once per output folder."""

    def __init__(self, folder: Path, tree: Path) -> None:
        path = folder / "tests_of_lines.json"
        if not path.is_file():
            path.write_text(json.dumps(self._measure(folder, tree)))
        measured = json.loads(path.read_text())
        self._lines: dict[str, dict[str, list[str]]] = measured["lines"]
        self._seconds: dict[str, float] = measured["seconds"]
        self._commands = sorted(self._covering("tests/forkserver.py"), key=self._cost)
        self._in_file = {path: self._counts([path]) for path in self._lines if path[:5] == "come/"}
        self._in_total = self._counts(self._in_file)

    def _measure(self, folder: Path, tree: Path) -> dict[str, Any]:
        from coverage import CoverageData

        print("measuring coverage with one run of the fast tests", flush=True)
        data, times = folder / "coverage", folder / "times.xml"
        words = [
            sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m",
            "not slow and not gpu", "--cov=come", "--cov=tests", "--cov-context=test",
            "--cov-report=", f"--junitxml={times}",
        ]  # fmt: skip
        own = {"COVERAGE_FILE": str(data), "PYTHONPATH": str(tree)}
        ended = subprocess.run(words, cwd=tree, env=os.environ | own, check=False)
        if ended.returncode:
            raise SystemExit("the tests fail without a mutation; fix them first")
        measured = CoverageData(str(data))
        measured.read()
        lines = {
            str(Path(path).relative_to(tree)): {
                str(line): sorted({context.partition("|")[0] for context in contexts if context})
                for line, contexts in measured.contexts_by_lineno(path).items()
            }
            for path in measured.measured_files()
        }
        seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(
                case.get("time", 0)
            )
            for case in ElementTree.parse(times).iter("testcase")
        }
        return {"lines": lines, "seconds": seconds}

    def _covering(self, path: str, numbers: range | None = None) -> set[str]:
        found = self._lines.get(path, {})
        lines = found if numbers is None else map(str, numbers)
        return {test for line in lines for test in found.get(line, [])}

    def _counts(self, paths: Iterable[str]) -> Counter[str]:
        """How many lines of the files each test runs."""
        return Counter(
            test for path in paths for tests in self._lines[path].values() for test in tests
        )

    def _cost(self, test: str) -> float:
        return self._seconds.get(test, 1.0)

    def _seconds_by_share(self, test: str, path: str) -> float:
        """Seconds of a test over the share of the lines it runs that are in the mutated file."""
        return (0.05 + self._cost(test)) * self._in_total[test] / (1 + self._in_file[path][test])

    def tests(self, mutant: Mutant, limit: float) -> tuple[list[str], list[str]]:
        """The tests that cover the mutant's line, and the other tests that start commands.

        A line that runs when its file is imported belongs to all tests that cover the file.
        """
        lines = range(mutant.first, mutant.line + 1)
        found = self._covering(mutant.path, lines) or self._covering(mutant.path)
        own = sorted(found, key=lambda test: self._seconds_by_share(test, mutant.path))
        others = [test for test in self._commands if test not in own]
        return self._within(own, limit), self._within(others, limit)

    def _within(self, tests: list[str], limit: float) -> list[str]:
        """Tests that take at most `limit` seconds in total, first one per test function."""
        firsts: dict[str, str] = {}
        for test in tests:
            firsts.setdefault(test.partition("[")[0], test)
        ordered = [*firsts.values(), *(t for t in tests if t not in set(firsts.values()))]
        chosen, spent = [], 0.0
        for test in ordered:
            spent += self._cost(test)
            if chosen and spent > limit:
                break
            chosen.append(test)
        return chosen


def outcome(tree: Path, mutant: Mutant, source: str, coverage: Coverage, limit: float) -> str:
    """ "killed", "killed by a command", "survived", or "not run" if no test runs the line."""
    own, commands = coverage.tests(mutant, limit)
    path = tree / mutant.path
    original = path.read_text()
    path.write_text(source)
    try:
        if own and _fails(tree, own, limit):
            return "killed"
        if commands and _fails(tree, commands, limit):
            return "killed by a command"
    finally:
        path.write_text(original)
    return "survived" if own else "not run"


def _fails(tree: Path, tests: list[str], limit: float) -> bool:
    """Whether a test fails; runs them in a fork of this process, which has their imports."""
    process = _FORK.Process(target=_run_tests, args=(tree, tests))
    process.start()
    process.join(60 + 10 * limit)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode != 0


def _run_tests(tree: Path, tests: list[str]) -> None:
    os.setpgid(0, 0)  # so that killing the group also ends commands of the tests
    os.chdir(tree)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "come")]:
        del sys.modules[name]  # imported from this script's tree, not the mutated one
    import pytest

    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def copy_tree(folder: Path) -> Path:
    """Copies the tracked files to a folder in which mutants are written."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def summary(found: dict[str, dict[str, str]], total: int) -> str:
    """The share of killed mutants with its Wilson interval, and the survivors."""
    counts = Counter(entry["outcome"] for entry in found.values())
    tried = len(found)
    killed = sum(n for name, n in counts.items() if name.startswith("killed"))
    share, z = killed / tried, 1.96
    middle = (share + z * z / (2 * tried)) / (1 + z * z / tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried**2)) / (1 + z * z / tried)
    lines = [f"{entry['outcome']}: {name}" for name, entry in sorted(found.items())]
    lines = [line for line in lines if not line.startswith("killed")]
    return "\n".join(
        [
            *lines,
            f"{killed} of {tried} killed: {share:.1%} [{middle - half:.1%}, {middle + half:.1%}], "
            f"of {total} mutants",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200, help="mutants to try; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--limit", type=float, default=60, help="seconds of tests per mutant")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="retry the survivors")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mutants")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found_path = arguments.output / "results.jsonl"
    found = _read(found_path)
    everything = [
        pair
        for package in arguments.packages
        for path in sorted((ROOT / "come" / package).rglob("*.py"))
        for pair in mutants(path)
    ]
    random.Random(arguments.seed).shuffle(everything)
    chosen = everything[: arguments.sample or None]
    names = {mutant.name for mutant, _ in chosen}
    todo = [
        (mutant, source)
        for mutant, source in chosen
        if mutant.name not in found
        or (arguments.again and not found[mutant.name]["outcome"].startswith("killed"))
    ]
    folder = arguments.output.resolve()
    coverage = Coverage(folder, copy_tree(folder / "tree0"))
    for name in _SHARED:
        importlib.import_module(name)
    workers = [
        _FORK.Process(
            target=_work, args=(folder, job, todo[job :: arguments.jobs], coverage, arguments)
        )
        for job in range(arguments.jobs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = _read(found_path)
    print(summary({name: found[name] for name in names if name in found}, len(everything)))


def _work(
    folder: Path,
    job: int,
    todo: list[tuple[Mutant, str]],
    coverage: Coverage,
    arguments: argparse.Namespace,
) -> None:
    """Tests some of the mutants in a separate copy of the tree."""
    tree = copy_tree(folder / f"tree{job}") if job else folder / "tree0"
    for mutant, source in todo:
        result = outcome(tree, mutant, source, coverage, arguments.limit)
        entry = {"name": mutant.name, "outcome": result, **asdict(mutant)}
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{result}: {mutant.name}", flush=True)


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The results so far by mutant name; the last one counts."""
    entries = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
    return {entry["name"]: entry for entry in entries}


if __name__ == "__main__":
    main()
