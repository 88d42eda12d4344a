"""experiments/gpu_check.py on the CPU at a small size."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, load_script


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return load_script("gpu_check")


def run_script(monkeypatch, module, folder, *words):
    """Runs the script; returns its JSON and its table."""
    arguments = ["gpu_check", "--device", "cpu", "--shape", "pico", "--output", str(folder), *words]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    return json.loads((folder / "gpu_check.json").read_text()), (
        folder / "gpu_check.md"
    ).read_text()


def test_bench_at_a_small_size(gpu_check, monkeypatch, tmp_path):
    words = ["--part", "bench", "--sizes", "6:5:64,4:3:32", "--batch-size", "1"]
    found, table = run_script(monkeypatch, gpu_check, tmp_path, *words)
    assert [(e["layers"], e["target"], e["tokens"]) for e in found["bench"]] == [
        (6, 5, 64),
        (4, 3, 32),
    ]
    assert all(entry["seconds"] > entry["forward_seconds"] > 0 for entry in found["bench"])
    assert "| disk, cap 8 GB | 6 to 5 | 64 |" in table


def test_a_part_replaces_only_its_own_entry(gpu_check, monkeypatch, tmp_path):
    tests = iter([{"passed": 3, "seconds": 1.0}, {"failed": 1, "passed": 2, "seconds": 1.0}])
    monkeypatch.setitem(gpu_check.PARTS, "tests", lambda given: next(tests))
    monkeypatch.setitem(gpu_check.PARTS, "bench", lambda given: [])
    run_script(monkeypatch, gpu_check, tmp_path, "--part", "tests")
    run_script(monkeypatch, gpu_check, tmp_path, "--part", "bench")
    found, table = run_script(monkeypatch, gpu_check, tmp_path, "--part", "tests")
    assert found["bench"] == []
    assert "1 failed, 2 passed (1 s)" in table


def test_main_job_on_both_devices(gpu_check, monkeypatch, tmp_path):
    def job(given, device, *words):
        on_gpu = device != "cpu"
        return {
            "seconds": 2.0,
            "merge_seconds": 1.0,
            "peak_bytes": 3e6,
            "spans": [[1, 2, 3]] if on_gpu else [[1, 2]],
            "perplexity": {"value": 9.0 + on_gpu},
        }

    monkeypatch.setattr(gpu_check, "_job", job)
    found = {"device": "cuda", "torch": "2", "cpu": "x86_64"}
    found["main"] = gpu_check.run_main(argparse.Namespace(device="cuda"))
    assert not found["main"]["same_spans"]
    assert "| cuda | 2 | 1 | 3 | 10.000 | 1 to 3 |" in gpu_check.table(found)
    assert "| cpu | 2 | 1 | 3 | 9.000 | 1 to 2 |" in gpu_check.table(found)
    earlier = json.loads(json.dumps(found).replace("spans", "groups"))
    assert gpu_check.table(earlier) == gpu_check.table(found)


def test_merge_in_two_processes(gpu_check, monkeypatch, tmp_path):
    commands = []

    class Completed:
        returncode = 0

    def fake_run(command, **options):
        commands.append(command)
        (*_, where) = (word for word in command if word.startswith("hydra.run.dir="))
        folder = Path(where.partition("=")[2])
        folder.mkdir(parents=True)
        metric = {"value": 9.0, "low": 8.0, "high": 10.0, "relative": 1.1}
        result = {
            "compression": {"seconds": 6.0 / len(commands), "peak_bytes": 1},
            "merge_history": [[0], [1, 2]],
            "depths": [{"metrics": {"perplexity": metric}}],
            "distillation": None,
        }
        (folder / "result.json").write_text(json.dumps(result))
        return Completed()

    monkeypatch.setattr(gpu_check.subprocess, "run", fake_run)
    found, table = run_script(monkeypatch, gpu_check, tmp_path, "--part", "shared", "merge.m=2")
    one, two = commands
    assert not any("nproc" in word for word in one)
    assert "--nproc_per_node=2" in two
    for command in (one, two):
        assert {"merge.m=2", "eval=perplexity", "model.device=cpu"} <= set(command)
    assert found["shared"]["speedup"] == 2
    assert "x 2.00, the same spans, perplexity 9.000 (in one: 9.000)" in table
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = argparse.Namespace(device="cuda")
    assert gpu_check.run_shared(arguments) == {"skipped": "one GPU"}
    found = {"device": "x", "torch": "2", "cpu": "x", "shared": {"skipped": "one GPU"}}
    assert "not run (one GPU)" in gpu_check.table(found)
