"""Sweeps that are killed, fail or run in parallel; their tables; evaluation without a merge."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from come.evaluate.base import Metric, Relative
from come.evaluate.paired import mean_difference
from come.report.grid import read_grid, write_grid
from come.report.grid_figure import draw_grid
from come.report.records import PARAMETERS, ModelRecord, model_records
from come.report.tables import metric_table
from tests.commands import ROOT, communicate, load_script

TWELVE_JOBS = [
    "merge/sensitivity=come,random",
    "merge/retention=bi_power,uniform",
    "calibration.seed=0,1,2",
    "merge.target_layers=21",
    "merge.save_weights=false",
    "eval=perplexity",
]
TWO_JOBS = ["merge.m=2,3", "merge.target_layers=20", "eval=[perplexity,continuations]"]


def results(folder):
    """Results by job, without times and resume counts."""
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        assert result["job"] == path.parent.name
        del result["compression"]
        found[result["job"]] = result
    return found


@pytest.mark.slow
def test_killed_grid_resumes_to_the_same_results(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, errors = communicate(command(*TWELVE_JOBS, f"hydra.sweep.dir={whole}", "-m"))
    assert code == 0, errors
    expected = results(whole)
    assert len(expected) == 12

    for at_least in (2, 7):  # finished jobs at the two kills
        process = command(*TWELVE_JOBS, f"hydra.sweep.dir={killed}", "-m")
        while len(list(killed.glob("*/result.json"))) < at_least:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*/result.json")}
    assert 7 <= len(before) < 12

    code, output, errors = communicate(command(*TWELVE_JOBS, f"hydra.sweep.dir={killed}", "-m"))
    assert code == 0, errors
    assert output.count("is already finished") == len(before)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert results(killed) == expected
    tables = [folder / "grid-sweep" / "table.md" for folder in (whole, killed)]
    assert tables[0].read_text() == tables[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "submitit_local"])
def test_parallel_jobs_give_the_same_results(command, tmp_path, launcher):
    pytest.importorskip({"processes": "joblib", "submitit_local": "submitit"}[launcher])
    serial, parallel = tmp_path / "serial", tmp_path / "parallel"
    code, _, errors = communicate(command(*TWO_JOBS, f"hydra.sweep.dir={serial}", "-m"))
    assert code == 0, errors
    code, output, errors = communicate(
        command(*TWO_JOBS, f"hydra.sweep.dir={parallel}", f"hydra/launcher={launcher}", "-m")
    )
    assert code == 0, errors
    assert len(results(serial)) == 2
    assert results(parallel) == results(serial)
    table = (parallel / "grid-sweep" / "table.md").read_text()
    assert table.count("|") > 8
    assert sorted(table.splitlines()) == sorted(
        (serial / "grid-sweep" / "table.md").read_text().splitlines()
    )
    assert table in output


@pytest.mark.parametrize("error", ["KeyError", pytest.param("ValueError", marks=pytest.mark.slow)])
def test_crash_traceback_is_in_the_log_of_its_job(command, base, tmp_path, error):
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        """from come.merge.selection.base import SELECTION, SpanScore


@SELECTION.register
class Broken(SpanScore):
    \"\"\"Raises an unexpected error.\"\"\"

    name = "broken"
    paper = ""
    source = "a test"

    def __init__(self, tokens="last"):
        pass

    def score(self, stream, first, last):
        raise ERROR("nobody expected this")
""".replace("ERROR", error)
    )
    grid = ["merge.selection=broken,sbi", f"plugins=[{plugin}]", "merge.target_layers=5"]
    words = ("merge=come", *grid, "eval=none", "-m")
    code, output, errors = communicate(command(*words, model=base))
    assert code == 1
    assert "nobody expected this" in errors
    assert "Not finished: selection=broken." in output
    (done,) = (tmp_path / "runs").glob("*/result.json")
    logs = [p.read_text() for p in (tmp_path / "runs").glob("*/run.log")]
    broken = [text for text in logs if "Traceback" in text]
    assert len(broken) == 1
    assert "nobody expected this" in broken[0]
    assert "broken" not in (done.parent / "run.log").read_text()


@pytest.mark.slow
def test_invalid_job_in_another_process_gives_one_line(command, tmp_path):
    pytest.importorskip("submitit")
    grid = ["merge.m=1,3", "merge.target_layers=20", "eval=none", "hydra/launcher=submitit_local"]
    code, _, errors = communicate(command(*grid, "-m"))
    assert code == 1
    assert errors.count("error: job 0: merge.m=1: must be a whole number of at least 2") == 1
    assert "Traceback" not in errors
    assert len(results(tmp_path / "runs")) == 1
    assert not (tmp_path / "runs" / "invalid").exists()


@pytest.mark.slow
def test_concurrent_runs_of_one_job_compute_it_once(command, tmp_path):
    job = [
        "merge.target_layers=14",
        "calibration.num_samples=32",
        f"hydra.run.dir={tmp_path / 'j'}",
    ]
    both = [command(*job, "eval=none") for _ in range(2)]
    outputs = [communicate(process) for process in both]
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert sum("is already finished" in output for _, output, _ in outputs) == 1
    assert sum("going on at" in output for _, output, _ in outputs) == 0


def test_evaluation_without_a_merge(command, base, tmp_path, text_file):
    further = f"+eval.perplexity.extra_texts={{other:{{path:{text_file},max_tokens:256}}}}"
    folder = tmp_path / "out"
    words = ("merge=none", further, f"hydra.run.dir={folder}")
    code, _, errors = communicate(command(*words, model=base))
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    (depth,) = result["depths"]
    assert (depth["stage"], depth["sparsity"], depth["folder"]) == ("dense", 0, "")
    metrics = depth["metrics"]
    assert metrics["perplexity"]["relative"] is metrics["perplexity/other"]["relative"] is None
    assert metrics["perplexity/other"]["data"].startswith("256 tokens in 4 windows of text_file")
    assert metrics["perplexity/other"]["value"] != metrics["perplexity"]["value"]
    assert [name for name in metrics if metrics[name]["headline"]] == [
        "perplexity", "speed/prompt", "speed/generation",
    ]  # fmt: skip
    assert metrics["speed/peak_memory"]["value"] > 0
    layers, heads, width = 6, 2, 8  # keys and values of 16 tokens, float32
    assert metrics["speed/kv_cache"]["value"] == 2 * layers * heads * width * 16 * 4
    assert not list(folder.glob("model*"))
    assert "other" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_grid_tables_in_markdown_latex_and_csv(command, tmp_path, text_file):
    grid = ["merge=come,shortgpt", "merge.save_at=[22,21]", "eval=[perplexity,continuations]"]
    further = f"+eval.perplexity.extra_texts={{other:{{path:{text_file},max_tokens:256}}}}"
    code, _, errors = communicate(command(*grid, further, "-m"))
    assert code == 0, errors
    folder = tmp_path / "runs" / "grid-sweep"
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0] == "|  | text | 22 layers | 21 layers |"
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| come", "-"],
        ["| come", "other"],
        ["| shortgpt", "-"],
        ["| shortgpt", "other"],
    ]
    assert "\\toprule" in (folder / "table.tex").read_text()
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12  # two jobs, two depths: two texts and the continuations
    for row in rows:
        (job,) = [
            r
            for p in (tmp_path / "runs").glob("*/result.json")
            if (r := json.loads(p.read_text()))["method"] == row["line"]
        ]
        (depth,) = [d for d in job["depths"][1:] if d["layers"] == int(row["layers"])]
        found = depth["metrics"][row["metric"]]
        assert float(row["value"]) == found["value"]
        assert float(row["low"] or "nan") == pytest.approx(
            (found["relative"] or {}).get("low", math.nan), nan_ok=True
        )


@pytest.mark.slow
def test_trackio_stores_a_run_locally(command, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setitem(os.environ, "TRACKIO_DIR", str(tmp_path / "trackio"))
    code, _, errors = communicate(
        command("merge.target_layers=22", "tracking=trackio", "eval=none")
    )
    assert code == 0, errors
    assert list((tmp_path / "trackio").glob("come*.db"))


def test_dashboard_is_printed_without_network():
    pytest.importorskip("wandb_workspaces")
    words = [
        sys.executable,
        str(ROOT / "experiments" / "dashboard.py"),
        "come",
        "--group",
        "beyond",
    ]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    workspace, report = printed.split("}\n{")
    assert '"name": "beyond"' in workspace
    for part in (workspace, report):
        assert '"eval/perplexity_dense_ratio_value"' in part
        assert '"figures/puzzle"' in part


def test_grid_rows_have_no_samples(tmp_path):
    task = Metric(0.5, samples=[1.0, 0.0], details={"metric": "acc", "texts": {"a": "b"}})
    depth = {"layers": 3, "parameters": 9, "metrics": {"zero_shot/a": task.record()}}
    cost = {"seconds": 1.0, "layer_passes": 2.0, "peak_bytes": 3}
    found = {"job": "x", "method": "come", "depths": [depth], "compression": cost}
    depth["metrics"]["agreement"] = Metric(0.9).record()
    (tmp_path / "result.json").write_text(json.dumps(found | {"merge_history": []}))
    listed = {"overrides": ["merge.m=2"], "folder": str(tmp_path)}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(listed) + "\n")
    ((row,), missing) = read_grid(tmp_path)
    assert not missing
    assert row["overrides"] == {"merge.m": "2"}
    (found,) = row["depths"]
    assert found["metrics"]["zero_shot/a"] == Metric(0.5, details={"metric": "acc"}).record() | {
        "samples": []
    }
    write_grid(tmp_path / "out", [row])
    assert (tmp_path / "out" / "table.md").read_text().count("Values are followed") == 1


def test_former_keys_have_their_current_names(tmp_path):
    """Also where the same jobs ran again with the current key."""
    metric = Metric(2.0, data="text", comparison="ratio", relative=Relative(1.5, 1.4, 1.6))
    dense = {"layers": 3, "parameters": 9, "metrics": {"perplexity": Metric(1.0).record()}}
    depth = {"layers": 2, "parameters": 6, "stage": "merged"}
    depth["metrics"] = {"perplexity": metric.record()}
    rows = [
        {"method": "come", "depths": [dense, depth], "overrides": {key: value}}
        for key in ("merge.p", "merge.retention.p")
        for value in ("1", "2")
    ]
    former = tmp_path / "former.jsonl"
    former.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    write_grid(tmp_path / "new", rows[2:], x="merge.retention.p")
    write_grid(tmp_path / "former", read_grid(tmp_path, [former])[0], x="merge.p")
    table = (tmp_path / "former" / "table.md").read_text()
    assert table == (tmp_path / "new" / "table.md").read_text()
    assert table.splitlines()[0] == "|  | merge.retention.p | 2 layers |"
    assert (tmp_path / "former" / "results.jsonl").read_text() == former.read_text()
    listed = {"overrides": ["merge.retention.p=1"], "folder": str(tmp_path / "unfinished")}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(listed) + "\n")
    found, missing = read_grid(tmp_path, [former])
    assert [row["overrides"] for row in found] == [{"merge.p": "2"}]
    assert missing == [{"merge.retention.p": "1"}]


def test_picture_of_the_readme_is_made_from_committed_results(tmp_path, monkeypatch):
    frontier = load_script("beyond/frontier")
    monkeypatch.setattr(sys, "argv", ["frontier.py", "--out", str(tmp_path)])
    frontier.main()
    beyond = ROOT / "experiments" / "beyond"
    assert (tmp_path / "frontier.md").read_text() == (beyond / "frontier.md").read_text()
    assert (tmp_path / "frontier.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "folder", ["beyond", "beyond/tokens_32768", "beyond/group_sizes", "compare", "main_table"]
)
def test_tables_are_made_from_committed_results(tmp_path, folder):
    committed = ROOT / "experiments" / folder
    write_grid(tmp_path, read_grid(committed, [committed / "results.jsonl"])[0])
    for path in committed.glob("table.*"):
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_significance_stars():
    """A task group gets its star from its own interval, like the average."""
    uncertain, significant = Relative(-0.1, -0.2, 0.01), Relative(-0.1, -0.15, -0.05)
    metrics = {
        "zero_shot": Metric(0.5, comparison="difference", relative=significant),
        "zero_shot/mmlu": Metric(0.4, comparison="difference", relative=uncertain),
        "zero_shot/piqa": Metric(0.6, comparison="difference", relative=significant),
    }
    depth = {"layers": 3, "parameters": 10, "stage": "merged"}
    depth["metrics"] = {name: metric.record() for name, metric in metrics.items()}
    row = {"overrides": {}, "depths": [depth | {"metrics": {}}, depth]}
    table = metric_table(model_records(row, [], PARAMETERS), "zero_shot", PARAMETERS)
    assert table.head == ["", "layers", "zero-shot", "mmlu", "piqa"]
    assert table.rows == [["all", "3", "0.500 (-0.100*)", "0.400 (-0.100)", "0.600 (-0.100*)"]]


def test_interval_of_an_average_weights_tasks_equally():
    generator = np.random.default_rng(3)
    large, small = generator.integers(0, 2, 900), generator.integers(0, 2, 60)
    first, second = ((task.astype(float).tolist(), [0.0] * len(task)) for task in (large, small))
    low, high = mean_difference([[first], [second]])
    variance = (large.var() / 900 + small.var() / 60) / 4
    middle = (large.mean() + small.mean()) / 2
    assert (low + high) / 2 == pytest.approx(middle, abs=0.004)
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.05)
    low, high = mean_difference([[first, second]])  # one group
    pooled = np.concatenate([large, small])
    assert (low + high) / 2 == pytest.approx(pooled.mean(), abs=0.004)
    assert (high - low) / 2 == pytest.approx(1.96 * (pooled.var() / 960) ** 0.5, rel=0.05)


@pytest.mark.parametrize("value", [2.7243386555860054, 1.41642814635814])
def test_grid_figure_with_identical_seeds(value, tmp_path):
    """Rounding puts the mean of three equal values below or above them."""
    assert sum([value] * 3) / 3 != value
    found = {"perplexity": Metric(value, relative=Metric(value))}
    dense = {"perplexity": Metric(1.0, data="text")}
    models = [ModelRecord("a", "3", 3, 10, f"seed={i}", found, dense) for i in range(3)]
    other = {"perplexity": Metric(2.0, relative=Metric(2.0))}
    models += [ModelRecord("a", "4", 3, 10, f"seed={i}", found, dense) for i in range(2)]
    models += [ModelRecord("a", "5", 3, 10, "seed=0", other, dense)]
    models += [ModelRecord("a", "5", 3, 10, "seed=1", found, dense)]
    draw_grid(models, tmp_path / "figure.png", "merge.m", "")
    assert (tmp_path / "figure.png").stat().st_size > 1000
