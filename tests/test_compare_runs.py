"""Paired comparison of two runs (come.report.pair)."""

import json
import math
import subprocess
import sys
from statistics import fmean

import pytest

from come.evaluate.base import Metric
from come.report.pair import compare, main

DENSE = [3.0, 3.2, 2.9, 3.1]


def record(value, comparison, samples, **more):
    return Metric(value, comparison=comparison, samples=samples, **more).record()


def depth(layers, nll, right=None):
    metrics = {"perplexity": record(math.exp(sum(nll) / len(nll)), "ratio", nll)}
    for name, scores in (right or {}).items():
        metrics[f"zero_shot/{name}"] = record(fmean(scores), "difference", scores)
    if right:
        mean = fmean(metrics[f"zero_shot/{name}"]["value"] for name in right)
        groups = {"groups": {name: [name] for name in right}}
        metrics["zero_shot"] = record(mean, "difference", [], details=groups)
    return {"layers": layers, "metrics": metrics}


def result(*depths, dense=DENSE):
    return {"depths": [depth(30, dense), *depths]}


def test_perplexity_is_paired_by_window():
    first = result(depth(24, [3.2, 3.3, 3.1, 3.2]), depth(21, [4.0] * 4))
    second = result(depth(24, [3.1, 3.3, 3.0, 3.2]), depth(27, [3.0] * 4))
    ((layers, metric, first_value, second_value, relative, p),) = compare(first, second).rows
    assert (layers, metric, p) == ("24", "perplexity", "")
    assert (first_value, second_value) == (f"{math.exp(3.2):.2f}", f"{math.exp(3.15):.2f}")
    gaps = [0.1, 0.0, 0.1, 0.0]
    spread = math.sqrt(sum((g - 0.05) ** 2 for g in gaps) / 3 / 4)
    low, high = (math.exp(0.05 + sign * 3.182446 * spread) for sign in (-1, 1))
    assert relative == f"{math.exp(0.05):.3f} [{low:.3f}, {high:.3f}]"


def test_accuracy_is_paired_by_document():
    ours = {"a": [1.0] * 30 + [0.0] * 10, "b": [1.0, 0.0] * 20}
    theirs = {"a": [1.0] * 20 + [0.0] * 20, "b": [1.0, 0.0] * 20}
    first, second = result(depth(24, DENSE, ours)), result(depth(24, DENSE, theirs))
    _, a, b, mean = compare(first, second).rows
    assert a[:4] == ["24", "zero_shot/a", "0.750", "0.500"]
    assert a[4].startswith("+0.250 [+0.1")
    assert a[5] == f"{2 * 0.5**10:.3f}"  # ten documents that only one model answers correctly
    assert b[4:] == ["+0.000 [+0.000, +0.000]", "1.000"]
    assert mean[1:4] == ["zero_shot", "0.625", "0.500"]
    assert mean[4].startswith("+0.125 [+0.0")
    assert compare(second, first).rows[1][4].startswith("-0.250 [-0.")


def test_runs_with_different_evaluations_are_rejected():
    ours = result(depth(24, DENSE, {"a": [1.0, 0.0]}))
    with pytest.raises(ValueError, match="other windows.*eval.perplexity.path, text_range"):
        compare(ours, result(depth(24, DENSE), dense=[3.0, 3.2, 2.9, 3.3]))
    with pytest.raises(ValueError, match="other windows"):
        compare(ours, result(depth(24, DENSE), dense=DENSE[:3]))
    with pytest.raises(ValueError, match="zero_shot/a has 2 and 3 documents.*eval.zero_shot.limit"):
        compare(ours, result(depth(24, DENSE, {"a": [1.0, 0.0, 1.0]})))
    with pytest.raises(ValueError, match="24 and 27, 21 layers"):
        compare(ours, result(depth(27, DENSE), depth(21, DENSE)))


def test_speed_and_different_task_groups_are_left_out():
    first = result(depth(24, DENSE, {"a": [1.0, 0.0]}))
    second = result(depth(24, DENSE, {"a": [1.0, 0.0], "b": [1.0, 0.0]}))
    for found in (first, second):
        found["depths"][1]["metrics"]["speed/prompt"] = record(5.0, "ratio", [])
    assert [row[1] for row in compare(first, second).rows] == ["perplexity", "zero_shot/a"]


def test_command_line(tmp_path, monkeypatch, capsys):
    for name, gap in (("a", 0.1), ("b", 0.0)):
        (tmp_path / name).mkdir()
        found = result(depth(24, [value + gap for value in DENSE]))
        (tmp_path / name / "result.json").write_text(json.dumps(found))
    command = [sys.executable, "-m", "come.report.pair", str(tmp_path / "a")]
    done = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True)
    assert done.returncode == 0
    assert "| 24 | perplexity | 23.34 | 21.12 | 1.105 [1.105, 1.105] |  |" in done.stdout
    (tmp_path / "b" / "result.json").write_text('{"depths": [{"layers": 3}]}')
    for name, message in (
        ("b", "is of an earlier version; measure its models again with from_run="),
        ("c", "c is not there; a finished run writes it"),
    ):
        monkeypatch.setattr(sys, "argv", ["pair", str(tmp_path / "a"), str(tmp_path / name)])
        assert main() == 1
        failed = capsys.readouterr().err
        assert failed.startswith("error: ")
        assert message in failed
