"""Complete jobs in this process, with settings composed as on the command line."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure

from come.cli import CONF, to_settings
from come.cli.overrides import as_groups, load_plugins, register_parts
from come.data.sources.pydocs import PyDocs
from come.evaluate.base import EVALUATIONS
from come.job.identity import job_hash
from come.job.run import run
from come.job.stages.prepare import prepare
from come.merge.method import PARTS
from come.schema import Settings
from come.schema.explicit import check_explicit
from tests.commands import small_job_overrides
from tests.test_zero_shot import PACKAGES, TASK

REMOVE_ONE_LAYER = ("merge=come", "merge.target_layers=5")
QUICK = ("eval=perplexity",)
ZERO_SHOT_ONLY = ("eval=zero_shot", "eval.zero_shot.batch_size=4")

_TOPICS = 16  # of the 78 of the Python documentation

gc.freeze()  # jobs with a training collect garbage, which need not visit every imported module


_registered: list[type] = []


def _register_parts() -> None:
    """Registers the parts again only if there are others than before."""
    registries = (*PARTS.values(), EVALUATIONS)
    parts = [registry.get(name) for registry in registries for name in registry.names()]
    if parts != _registered:
        register_parts()
        _registered[:] = parts


def settings(*overrides: str) -> Settings:
    load_plugins(overrides)
    _register_parts()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_settings(compose("config", overrides=as_groups(overrides)))


def job_settings(base: Path, *overrides: str) -> Settings:
    """Settings of a small job on a model of six layers."""
    words = [
        "model=local",
        f'model.path="{base}"',
        *small_job_overrides(*overrides),
        *REMOVE_ONE_LAYER,
    ]
    composed = settings(*words, *overrides)
    composed.check()
    check_explicit(composed, overrides)
    return composed


@contextmanager
def _less_work(*, drawn: bool = False) -> Iterator[None]:
    """Shortens what few tests look at: the Python documentation, figures, the harness's records."""
    documents = PyDocs.documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PyDocs, "documents", lambda source: islice(documents(source), _TOPICS))
        patch.setattr(PACKAGES, str)
        if not drawn:
            patch.setattr(Figure, "savefig", lambda figure, path, **options: path.touch())
        yield


def run_job(base: Path, folder: Path, *overrides: str, drawn: bool = False) -> Any:
    """Runs a small job and returns its result; `drawn` is whether its figures are rendered."""
    with _less_work(drawn=drawn):
        return run(job_settings(base, *overrides), folder)


def prepare_job(base: Path, folder: Path, *overrides: str) -> Any:
    """Runs the first stage of a job, which loads no weights."""
    composed = job_settings(base, *overrides)
    with _less_work():
        return prepare(composed, folder, job_hash(composed))


def local_task(folder: Path, task: str = TASK) -> list[str]:
    """Writes a local task of twenty questions; returns overrides to evaluate only this task."""
    folder.mkdir()
    rows = [
        {"question": f"What is {i}?", "choices": [f"{i}", f"a {i * 7}", "b"], "answer": i % 3}
        for i in range(20)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_qa.yaml").write_text(task.format(name="local_qa", data=folder / "data.jsonl"))
    return [
        f"eval.zero_shot.include_path={folder}",
        "eval.zero_shot.tasks=[local_qa]",
        *ZERO_SHOT_ONLY,
    ]
