"""End-to-end distillation of a pico model: complete, killed, and launched on two processes."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.commands import (
    ROOT,
    communicate,
    same_checkpoint,
    small_job_overrides,
    without_repeated,
)

TRAIN = [
    "distill.tokens=2560",
    "distill.seq_len=32",
    "distill.batch_size=4",
    "distill.micro_batch=2",
    "distill.validation_samples=4",
    "distill.validate_every=5",
    "distill.checkpoint_every=3",
    "merge.target_layers=21",
]


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_distilled_run_and_runs_from_its_models(command, tmp_path):
    folder, again = tmp_path / "out", tmp_path / "again"
    code, output, errors = communicate(
        command("distill=come_sp", *TRAIN, "tracking=wandb", f"hydra.run.dir={folder}")
    )
    assert code == 0, errors
    found = result(folder)
    assert [(d["layers"], d["stage"]) for d in found["depths"]] == [
        (24, "dense"),
        (21, "merged"),
        (21, "distilled"),
    ]
    training = found["distillation"]
    assert (training["method"], training["steps"], training["tokens"]) == ("come_sp", 20, 2560)
    assert len(training["curve"]) == 20
    assert training["validation"][-1]["loss"] < training["validation"][0]["loss"]
    assert training["optimizer_bytes"] == 8 * training["trained_parameters"]
    assert "21 distilled" in output
    assert not (folder / "distill").exists()
    card = " ".join((folder / "model" / "README.md").read_text().split())
    assert "Then trained: `come_sp`" in card
    assert "rebuilds the merged weights" in card
    assert "No training." in " ".join((folder / "model-merged" / "README.md").read_text().split())
    plan = json.loads((folder / "model" / "come" / "plan.json").read_text())
    assert plan["provenance"]["distillation"]["steps"] == 20
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert len(model.model.layers) == 21
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if '"distill/loss"' in line]
    assert len(losses) == 20

    # a second distillation of the same merged model, without a new merge
    code, output, errors = communicate(
        command(
            "distill=logits",
            *TRAIN[:-1],
            f"from_run={folder / 'model-merged'}",
            f"hydra.run.dir={again}",
        )
    )
    assert code == 0, errors
    assert "already merged, 21 layers" in output
    assert result(again)["merge_history"] == found["merge_history"]
    assert same_checkpoint(again / "model-merged", folder / "model-merged")
    assert not same_checkpoint(again / "model", folder / "model")
    assert result(again)["depths"][1]["metrics"] == found["depths"][1]["metrics"]

    # evaluation only
    code, _, errors = communicate(
        command(
            "eval.perplexity.max_tokens=256",
            f"from_run={folder}",
            f"hydra.run.dir={tmp_path / 'eval'}",
        )
    )
    assert code == 0, errors
    assert same_checkpoint(tmp_path / "eval" / "model", folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["come_sp", "come_mp"])
def test_killed_distillation_resumes(method, command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [f"distill={method}", *TRAIN, "eval=none"]
    code, _, errors = communicate(command(*settings, f"hydra.run.dir={whole}"))
    assert code == 0, errors
    process = command(*settings, f"hydra.run.dir={cut}")
    deadline = time.monotonic() + 120
    while not list(cut.glob("distill/**/state.json")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "result.json").exists()
    code, output, errors = communicate(command(*settings, f"hydra.run.dir={cut}"))
    assert code == 0, errors
    assert "already merged" in output
    assert result(cut)["distillation"]["curve"] == result(whole)["distillation"]["curve"]
    assert same_checkpoint(cut / "model", whole / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        ("come_sp", False),
        ("come_sp", True),
        ("lora", True),
        ("logits distill.teacher=stored", False),
        ("logits distill.teacher=stored", True),
    ],
)
def test_two_processes_train_like_one(method, sharded, command, pico_folder, tmp_path):
    single, double = tmp_path / "single", tmp_path / "double"
    own_words = ["merge=come", *f"distill={method}".split(), "distill.micro_batch=1", "eval=none"]
    settings = [*own_words, *without_repeated(TRAIN, own_words)]
    code, _, errors = communicate(command(*settings, f"hydra.run.dir={single}"))
    assert code == 0, errors
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--standalone"]
    small = without_repeated(small_job_overrides(*settings), settings)
    words = [f"model.path={pico_folder}", "model=local", *small, *settings]
    own = {"COME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    own |= {"ACCELERATE_USE_FSDP": str(sharded).lower()}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launch, str(ROOT / "run.py"), *words, f"hydra.run.dir={double}"],
            cwd=tmp_path,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start()
    if sharded:  # a killed training resumes from a complete checkpoint
        deadline = time.monotonic() + 120
        while not list(double.glob("distill/**/state.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        process.wait()
        process = start()
    code, output, errors = communicate(process)
    assert code == 0, errors
    assert ("already merged" in output) == sharded
    one, two = (
        [loss for _, loss in result(folder)["distillation"]["curve"]] for folder in (single, double)
    )
    assert [result(f)["distillation"]["processes"] for f in (single, double)] == [1, 2]
    assert two == pytest.approx(one, rel=1e-3)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    states = [load_file(folder / "model" / "model.safetensors") for folder in (single, double)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill=come_sp", "distill.validation_samples=100000"], "training text too short"),
        (["from_run=/no/run"], "from_run=/no/run: no merged model with its come/plan.json there"),
    ],
)
def test_invalid_settings_give_one_line(overrides, message, command_line, tmp_path):
    code, printed = command_line(*overrides, f"hydra.run.dir={tmp_path / 'out'}")
    assert code == 1
    assert message in printed
    assert len([line for line in printed.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "out" / "result.json").exists()
