"""The real model through the command line: quality, exact checkpoints, memory.

Uses WikiText-2 validation if there is a copy next to the repository, and otherwise Python's
documentation with another bound.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from come.data.windows import CALIBRATION_PART, EVALUATION_PART, text_part

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]  # one shared fixture

ROOT = Path(__file__).parents[1]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2_valid.txt"
# upper bound of perplexity / dense perplexity for merge=come, 30 -> 27 layers
BOUND = {"wikitext": 1.60, "pydocs": 2.60}


def run(*overrides, model="smollm2_135m_float32"):
    threads = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), f"model={model}", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Overrides that choose the texts, and the perplexity bound for them."""
    if not WIKITEXT.is_file():
        return ["calibration=pydocs"], BOUND["pydocs"]
    folder = tmp_path_factory.mktemp("texts")
    text = WIKITEXT.read_text()
    for name, part in (("calibrate", CALIBRATION_PART), ("report", EVALUATION_PART)):
        (folder / f"{name}.txt").write_text(text_part(text, part))
    return [
        "calibration=text_file",
        f"calibration.path={folder}/calibrate.txt",
        f"eval.perplexity.path={folder}/report.txt",
    ], BOUND["wikitext"]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, texts):
    """A run from 30 to 27 layers that is killed after its first merge and resumed."""
    folder = tmp_path_factory.mktemp("run") / "job"
    overrides = [
        *texts[0],
        "merge=come",
        "merge.target_layers=27",
        "merge.save_at=[28]",
        "eval.perplexity.seq_len=256",
        "eval.perplexity.max_tokens=6144",
        "eval.speed.prompt_tokens=128",
        "eval.speed.new_tokens=8",
        "eval.speed.repeats=2",
        f"hydra.run.dir={folder}",
    ]
    process = run(*overrides)
    while not (folder / "plan.partial.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "model").exists()
    process = run(*overrides)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "after 1 merges" in output
    return folder, json.loads((folder / "result.json").read_text())


def ratio_of(result):
    return result["depths"][-1]["metrics"]["perplexity"]["relative"]["value"]


def test_perplexity(killed_run, texts):
    _, result = killed_run
    dense, *others = (d["metrics"]["perplexity"]["relative"] for d in result["depths"])
    shallow, deepest = others
    assert dense is None
    assert 1 < shallow["value"] < deepest["value"] <= texts[1]
    assert deepest["low"] < deepest["value"] < deepest["high"]


def test_default_method_beats_the_paper(killed_run, texts, tmp_path):
    _, paper = killed_run
    process = run(
        *texts[0],
        "calibration.num_samples=12",
        "merge.target_layers=27",
        "merge.save_weights=false",
        "eval.perplexity.seq_len=256",
        "eval.perplexity.max_tokens=6144",
        "eval=[perplexity,continuations]",
        f"hydra.run.dir={tmp_path / 'job'}",
        model="smollm2_135m",  # in bfloat16 where the processor computes in it
    )
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "job" / "result.json").read_text())
    assert result["method"] == "come_plus"
    ratio = ratio_of(result)
    assert 1 < ratio <= (1.25 if texts[1] == BOUND["wikitext"] else 1.6)
    assert ratio < ratio_of(paper)


def test_peak_memory(killed_run):
    _, result = killed_run
    compression = result["compression"]
    limit = 1.3 * compression["weight_bytes"] + compression["boundary_bytes"]
    assert compression["peak_bytes"] <= limit


def test_checkpoint_loads_without_this_package(killed_run, tmp_path):
    """Loaded in a new process that does not import this package."""
    folder, _ = killed_run
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=8, do_sample=False)
print(model.config.num_hidden_layers, tokenizer.decode(out[0]))
assert not [name for name in sys.modules if name == "come" or name.startswith("come.")]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("27 ")
    assert "The capital of France is" in done.stdout


def test_plan_rebuilds_the_weights_bit_for_bit(killed_run, tmp_path):
    folder, _ = killed_run
    process = run(
        "merge=from_plan",
        f"merge.plan={folder / 'plan.json'}",
        "eval=none",
        f"hydra.run.dir={tmp_path / 'again'}",
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    models = [
        AutoModelForCausalLM.from_pretrained(f / "model").state_dict()
        for f in (folder, tmp_path / "again")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_cached_generation_equals_uncached_generation(killed_run):
    folder, _ = killed_run
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("Water boils when", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids, use_cache=True, **options),
        model.generate(ids, use_cache=False, **options),
    )
