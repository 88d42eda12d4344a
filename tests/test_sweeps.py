"""End-to-end sweeps and experiments."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT, communicate


def test_sweep_folders_are_named_by_job_hash(command, base, tmp_path):
    code, _, errors = communicate(
        command("merge.m=2,3", "merge.target_layers=4", "eval=none", "-m", model=base)
    )
    assert code == 0, errors
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 2
    found = [json.loads(path.read_text()) for path in results]
    assert sorted(r["settings"]["merge"]["m"] for r in found) == [2, 3]
    assert [path.parent.name for path in results] == [r["job"] for r in found]


@pytest.mark.slow
def test_sweep_writes_table_and_figure(command, tmp_path):
    grid = (
        "merge=come,shortgpt",
        "calibration.seed=0,1",
        "merge.save_at=[22,21]",
        "eval=[perplexity,continuations]",
    )
    code, output, errors = communicate(command(*grid, "-m"))
    assert code == 0, errors
    folder = tmp_path / "runs" / "grid-sweep"
    table = (folder / "table.md").read_text()
    assert table in output
    lines = table.splitlines()
    assert lines[0] == "|  | 22 layers | 21 layers |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| come", "| shortgpt"]
    assert all(line.count("[") == 2 for line in lines[2:4])  # mean and spread over the seeds
    assert (folder / "figure.png").stat().st_size > 0
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted((r["overrides"]["merge"], r["overrides"]["calibration.seed"]) for r in rows) == [
        ("come", "0"),
        ("come", "1"),
        ("shortgpt", "0"),
        ("shortgpt", "1"),
    ]
    done = {r["job"]: (tmp_path / "runs" / r["job"] / "result.json").stat().st_mtime for r in rows}
    code, output, errors = communicate(command(*grid, "-m"))  # no job runs again
    assert code == 0, errors
    assert output.count("is already finished") == 4
    for job, changed in done.items():
        assert (tmp_path / "runs" / job / "result.json").stat().st_mtime == changed
    report = subprocess.run(
        [sys.executable, "-m", "come.report", str(folder), "--out", str(tmp_path / "again")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert report.stdout == table == (tmp_path / "again" / "table.md").read_text()


@pytest.mark.slow
def test_experiment_sets_the_axis_of_its_figure(command, tmp_path, text_file):
    grid = ("experiment=group_size", "merge.m=2,3", "merge.target_layers=22", "calibration.seed=0")
    code, _, errors = communicate(command(*grid, f"calibration.path={text_file}", "-m"))
    assert code == 0, errors
    folder = tmp_path / "runs" / "grid-group_size"
    assert json.loads((folder / "axes.json").read_text())["x"] == "merge.m"
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0] == "|  | merge.m | 22 layers |"
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["2", "3"]


def test_failed_job_does_not_stop_a_sweep(command, base, tmp_path):
    code, _, errors = communicate(
        command("merge.m=1,3", "merge.target_layers=4", "eval=none", "-m", model=base)
    )
    assert code == 1
    assert "error: job 0: merge.m=1: must be a whole number of at least 2" in errors
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["merge.m=2,two"],
        ["merge.m=2,3", "merge.mm=1"],
        ["merge.m=0,1"],
        ["merge.target_layers=40,41"],
        ["experiment=smoke", "merge.sensitivity=come,no"],
    ],
)
def test_refused_sweep_leaves_no_files(command_line, tmp_path, overrides):
    code, printed = command_line(*overrides, "-m")
    assert code == 1
    assert "error: " in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("runs*"))


EXPERIMENTS = {  # overrides that adapt the depths to the pico models
    "smoke": ["merge.target_layers=5"],
    "choices": ["merge.save_at=[22,21]"],
    "compare": ["merge.target_layers=19", "merge.save_at=[22]"],
    "positions": ["merge.groups=[[0,1]]"],
    "calibration_size": ["merge.target_layers=20", "merge.save_at=[22]"],
    "group_size": ["merge.target_layers=20"],
    "skewness": ["merge.target_layers=20", "merge.save_at=[22]"],
    "metrics": ["merge.target_layers=20", "merge.save_at=[22]"],
    "beyond": ["calibration.num_samples=8", "merge.target_layers=20", "merge.save_at=[22]"],
    "distill": [
        "merge.target_layers=21",
        "distill.tokens=512",
        "distill.seq_len=32",
        "distill.validation_samples=2",
    ],
    "ablation_small": ["merge.target_layers=21"],
    "main": ["eval=perplexity", "calibration=pydocs", "merge.sparsity=0.1"],
    "retention": ["merge.target_layers=20", "merge.save_at=[22]"],
    "domains": ["merge.target_layers=20", "merge.save_at=[22]", "calibration=self_generated"],
    "families": ["merge.target_layers=20", "merge.save_at=[22]"],
    "gemma": ["calibration.num_samples=8", "merge.target_layers=20", "merge.save_at=[22]"],
}


QUICK = {"smoke"}  # the other experiments are slow tests


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted(p.stem for p in ROOT.glob("conf/experiment/*.yaml"))
    ],
)
def test_every_experiment_runs(command, base, pico_folder, text_file, tmp_path, name):
    texts = {"choices": ["calibration"], "families": ["calibration", "eval.perplexity"]}
    paths = [f"{key}.path={text_file}" for key in texts.get(name, [])]
    folder = tmp_path / "out"
    words = (f"experiment={name}", *EXPERIMENTS[name], *paths, f"hydra.run.dir={folder}")
    model = base if name in QUICK else pico_folder
    code, _, errors = communicate(command(*words, model=model))
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    weights = list(folder.glob("model*/model*.safetensors"))
    assert bool(weights) == result["settings"]["merge"]["save_weights"]
    for depth in result["depths"][1:]:
        assert (folder / depth["folder"] / "come" / "plan.json").is_file()
