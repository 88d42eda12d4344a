"""Fuzzing: whatever a file or an override holds, the answer is a value or one line.

Every target runs in a forked child with a limit on its memory, a limit on its time, and a hook
that refuses to open for writing, rename or remove anything outside of its folder, to start
programs, to connect, and to unpickle.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from forked import start
from jobs import Workspace, scenarios
from record import Record

SECONDS = 60  # of CPU time for one example
MEMORY = 3 << 30  # bytes of address space beyond what the process has
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link")
_FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class",
              "socket.connect")  # fmt: skip
Target = Callable[[Workspace, Path, random.Random], None]


def fuzz(work: Workspace, record: Record, *, count: int = 4000, only: str = "") -> None:
    """The part of the campaign: batches of examples of every target, a child for each batch."""
    batch = 50
    for index in range(count // batch):
        name = list(TARGETS)[index % len(TARGETS)]
        case = f"fuzz-{record.seed}-{index:04d}-{name}"
        if only not in ("", name) or not record.wants(case):
            continue
        folder = work.folder / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        run = start([], folder, main=partial(examples, name, work, folder, case, batch))
        ended = run.wait(600)
        found: dict[str, str] = {}
        if ended.hung or ended.code == -signal.SIGXCPU:
            found["hang"] = ended.out[-300:]
        elif ended.code != 0:
            outside = "OutsideError" in ended.err
            found["outside" if outside else "traceback"] = ended.err[-1500:]
        record.add(case, found, kind=name, faults=batch)


def examples(name: str, work: Workspace, folder: Path, case: str, count: int) -> int:
    """Runs examples in this process; the exit code is 1 if one raised what is not a user error."""
    guard(folder)
    bad = 0
    for number in range(count):
        print(f"{case} {number}", flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        with contextlib.redirect_stdout(None):
            bad += not survives(TARGETS[name], work, folder, random.Random(f"{case} {number}"))
    return min(bad, 1)


def survives(target: Target, work: Workspace, folder: Path, rng: random.Random) -> bool:
    """Whether an example ends well or with a user error of one line."""
    from come.cli.errors import USER_ERRORS, user_line

    try:
        target(work, folder, rng)
    except USER_ERRORS as error:
        line = user_line(error)
        if "\n" in line or not line.strip():
            print(f"not one line: {line!r} of {error!r}", file=sys.stderr)
            return False
    except SystemExit as exit_:  # of argparse, after its own line
        return exit_.code in (0, 1, 2)
    except BaseException:
        traceback.print_exc()
        return False
    return True


class OutsideError(BaseException):
    """Something was opened for writing, changed or started outside of the folder."""


def guard(folder: Path) -> None:
    """Limits this process to writing in one folder, and its memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    allowed = (str(folder), "/dev/", "/proc/")

    def inside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a file descriptor
        return os.path.abspath(os.fsdecode(path)).startswith(allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            raise OutsideError(f"{event} {arguments!r:.300}")
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            writes = writes or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
            if writes and not inside(path):
                raise OutsideError(f"opened for writing: {path}")
        elif event in CHANGES and not inside(arguments[0]):
            raise OutsideError(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def target_plan(work: Workspace, folder: Path, rng: random.Random) -> None:
    """A plan: read, checked against the model, applied, and described in a card."""
    import torch

    from come.job.stages.prepare import _check_plan
    from come.merge.apply import apply
    from come.merge.plan import Plan
    from come.models.loading import inspect_model
    from come.report.card import _healing, units_kept

    path = folder / "plan.json"
    shutil.copy(work.merged / "refit.safetensors", folder)
    path.write_text(mutate.text(_json(work.merged / "plan.json"), rng))
    plan = Plan.load(path)
    shape = _cached(work, "shape", lambda: inspect_model(work.base))
    _check_plan(plan, str(path), shape, work.base)
    with torch.random.fork_rng(devices=[]):
        apply(plan, _model(work))
    _healing(plan)
    units_kept(plan)
    assert plan.hash


def target_tensors(work: Workspace, folder: Path, rng: random.Random) -> None:
    """The solved tensors of a plan, with hashes that fit whatever they hold."""
    import torch
    from safetensors.torch import load_file, save_file

    from come.merge.apply import apply
    from come.merge.plan import Plan, SolvedTensors

    tensors = load_file(work.merged / "refit.safetensors")
    data = _json(work.merged / "plan.json")
    name = rng.choice(list(tensors))
    dtype = rng.choice([torch.float32, torch.float64, torch.int64, torch.bool, torch.float16])
    shape = rng.choice([(0,), (1,), (32, 32), (2, 3, 4), (), (32, 48), (48, 32)])
    changed = rng.choice([name, f"{name}.x", "0/../../x", "downstream/0/mlp.down_proj.weight"])
    if rng.random() < 0.5:
        tensors[changed] = tensors[name].to(dtype, copy=True)
    else:
        tensors[changed] = torch.ones(shape, dtype=dtype)
    save_file(tensors, folder / "refit.safetensors")
    for key, tensor in tensors.items():
        step, _, own = key.partition("/")
        hashes = SolvedTensors({own: tensor}).hashes
        solved = data["downstream"] if step == "downstream" else data["steps"][int(step)]["solved"]
        solved.update(hashes)
    (folder / "plan.json").write_text(json.dumps(data))
    apply(Plan.load(folder / "plan.json"), _model(work))


def target_result(work: Workspace, folder: Path, rng: random.Random) -> None:
    """A result: of a finished job, in the table of a grid, and compared with another one."""
    from come.job.folder import finished_result
    from come.job.run import _clean_up
    from come.report.grid import read_grid, write_grid
    from come.report.pair import _read, compare

    result = _json(work.merged / "result.json")
    own = folder / "run"
    own.mkdir(exist_ok=True)
    (own / "result.json").write_text(mutate.text(result, rng))
    listing = {"folder": str(own), "overrides": ["merge.m=2"]}
    (folder / "jobs.jsonl").write_text(json.dumps(listing) + "\n")
    rows, missing = read_grid(folder)
    if rng.random() < 0.2:
        write_grid(folder, rows, missing)
    found = finished_result(own, result["job"])
    if found is not None:
        _clean_up(own, found)  # type: ignore[arg-type]
    compare(_read(own), _read(work.merged))


def target_config(work: Workspace, folder: Path, rng: random.Random) -> None:
    """The configuration of a model, or its index of shards."""
    from come.job.identity import model_identity
    from come.models.checkpoint import weight_files
    from come.models.loading import inspect_model
    from come.schema import ModelSettings

    for file in work.base.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(mutate.text(_json(work.base / "config.json"), rng))
    if rng.random() < 0.3:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "x": "y.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(mutate.text(index, rng))
        weight_files(folder)
    model_identity(ModelSettings(path=str(folder)))
    inspect_model(folder)


def target_safetensors(work: Workspace, folder: Path, rng: random.Random) -> None:
    """The file of the weights of a model."""
    from come.models.loading import inspect_model, load_weights

    for file in work.base.iterdir():
        shutil.copy(file, folder / file.name)
    weights = (work.base / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(mutate.safetensors(weights, rng))
    inspect_model(folder)
    load_weights(folder, weights=rng.choice(["memory", "disk"]), scratch=folder)


def target_overrides(work: Workspace, folder: Path, rng: random.Random) -> None:
    """Overrides, up to the settings and their checks."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from come.cli import CONF, to_settings
    from come.cli.overrides import as_groups, load_plugins, model_of_run, register_parts
    from come.cli.words import read_flags
    from come.schema.explicit import check_explicit

    scenario = rng.choice([s for s in scenarios(work).values() if not s.sweep])
    flags, words = read_flags(mutate.override(list(scenario.words), rng))
    load_plugins(words)
    register_parts()
    overrides = [*as_groups(words), *model_of_run(words)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        settings = to_settings(compose("config", overrides=overrides))
    settings.check()
    check_explicit(settings, overrides)
    assert flags is not None


def target_job_files(work: Workspace, folder: Path, rng: random.Random) -> None:
    """The other files of a job: trial scores, metrics, shapes, a training checkpoint."""
    import torch
    from safetensors.torch import save_file

    from come.distill.progress import STATE, Progress, load_progress
    from come.job.stages.evaluate import MetricCache
    from come.merge.trial_scores import TrialScores

    metric = _json(work.merged / "result.json")["depths"][0]["metrics"]
    files: dict[str, Any] = {
        "trials.json": {"job": "j", "scores": {"p/0-1": 0.5}},
        "metrics.json": {"job": "j", "metrics": {"dense: perplexity": metric}},
        STATE: {"job": "j", "tensors": "step-0000001.safetensors",
                "progress": vars(Progress(step=1, validation=[{"step": 1, "loss": 1.0}]))},
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(mutate.text(value, rng))
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    stored = {"weight/w": torch.ones(2, 3), "best/w": torch.ones(2, 3)}
    save_file(stored, folder / "step-0000001.safetensors")
    TrialScores(folder / "trials.json", "j")
    MetricCache(folder / "metrics.json", "j")
    load_progress(folder, "j", {"w": parameter}, torch.optim.AdamW([parameter]))


TARGETS: dict[str, Target] = {
    "plan": target_plan,
    "tensors": target_tensors,
    "result": target_result,
    "config": target_config,
    "safetensors": target_safetensors,
    "overrides": target_overrides,
    "job files": target_job_files,
}

_CACHE: dict[tuple[Path, str], Any] = {}


def _cached(work: Workspace, name: str, make: Callable[[], Any]) -> Any:
    key = work.folder, name
    if key not in _CACHE:
        _CACHE[key] = make()
    return _CACHE[key]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _model(work: Workspace) -> Any:
    from come.models.loading import load_weights

    return copy.deepcopy(_cached(work, "model", lambda: load_weights(work.base)))
