"""Scripts of experiments/ about size: exponents, estimates of large models, a job from disk."""

import json
import subprocess
import sys

import pytest

from tests.commands import ROOT, load_script


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return load_script("scaling")


def test_exponent_of_a_power_law(scaling):
    assert scaling.exponent([8, 16, 32], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert scaling.exponent([1, 10, 100], [5.0, 500.0, 50000.0]) == pytest.approx(2.0)


def test_every_point_is_measured_once(scaling, monkeypatch, capsys):
    measured_sizes = []

    def fake_measure(shape, layers, tokens):
        measured_sizes.append((layers, tokens))
        return scaling.Measurement(layers, tokens, layers * tokens / 100, 2.0, tokens**2)

    monkeypatch.setattr(scaling, "measure", fake_measure)
    words = "scaling --shape pico --layers 8 4 6 --tokens 256 512 1024".split()
    monkeypatch.setattr("sys.argv", words)
    scaling.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:4] for line in printed[2:] if line.startswith("|")]
    assert [tuple(float(cell) for cell in row) for row in rows] == [
        (4, 512, 20.5), (6, 512, 30.7), (8, 512, 41.0),
        (6, 256, 15.4), (6, 512, 30.7), (6, 1024, 61.4),
    ]  # fmt: skip
    assert sorted(measured_sizes) == [(4, 512), (6, 256), (6, 512), (6, 1024), (8, 512)]
    assert [line for line in printed if not line.startswith("|")] == [
        "exponent over layers (pico): time 1.00, memory 0.00",
        "exponent over tokens (pico): time 1.00, memory 2.00",
    ]


@pytest.mark.slow
def test_measure_one_size(scaling):
    measured = scaling.measure("pico", 4, 256)
    assert measured[:2] == (4, 256)
    assert measured.seconds > measured.forward_seconds > 0
    assert measured.peak_bytes > 0


def test_estimate_for_llama_70b_fits_on_one_gpu(scaling):
    cost = scaling.arithmetic("llama70b", removed=10, tokens=8192)
    assert cost.weight_bytes + cost.step_bytes < 24e9
    assert cost.boundary_bytes + cost.validation_bytes < 64e9
    cost = scaling.arithmetic("mistral7b", removed=4, tokens=8192)
    assert cost.weight_bytes == 2 * (2 * 32000 * 4096 + 4096)
    assert cost.layer_bytes == 2 * 2 * 218112000


def test_table_of_estimates(scaling):
    """Operations are those of passes and of linear algebra; files replace the hidden states."""
    row = scaling._estimates()[-1].split("|")
    cost = scaling.arithmetic("llama70b", removed=10, tokens=32768)
    operations = cost.work.forward + cost.work.single + cost.work.double
    assert row[8].strip() == f"{operations:.1e}" == "2.2e+16"
    assert row[6].strip() == "2,718 MB"
    assert row[9].strip() == "19 min 30 s"


@pytest.mark.slow
def test_complete_job_from_disk(tmp_path):
    """Random weights are merged layer by layer, and transformers loads the result."""
    words = ["--shape", "pico", "--target", "4", "--tokens", "512", "--folder", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "whole_model.py"), *words, "merge.m=3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["layers_in_transformers"] == 4
    assert found["shards"] == 1
    plan = json.loads((tmp_path / "pico-6-4" / "plan.json").read_text())
    assert [[step["first"], step["last"]] for step in plan["steps"]] == [[0, 2]]
