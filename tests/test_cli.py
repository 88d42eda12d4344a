"""End-to-end runs of run.py on a pico model."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from come.merge.plan import Plan
from tests.commands import ROOT, communicate, same_checkpoint


def test_complete_run_and_rebuild_from_its_plan(command, base, tmp_path):
    folder = tmp_path / "out"
    words = ("merge.save_at=[5,3]", "tracking=wandb", f"hydra.run.dir={folder}")
    code, output, errors = communicate(command(*words, model=base))
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    assert [d["layers"] for d in result["depths"]] == [6, 5, 3]
    assert [d["folder"] for d in result["depths"]] == ["", "model-5", "model"]
    for depth in result["depths"]:
        assert len(depth["metrics"]["perplexity"]["samples"]) == 8
        assert str(depth["layers"]) in output
    assert str(folder) in output
    assert "tokens available" in output
    assert "cost: 256 calibration tokens" in output
    assert "time: about " in output
    for name in (
        "report.md",
        "resolved.yaml",
        "metrics.jsonl",
        "plan.json",
        "puzzle.png",
        "influence.png",
        "perplexity.png",
        "model/README.md",
        "model-5/README.md",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.glob("*partial*"))

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").bos_token == "<s>"
    assert len(model.model.layers) == 3
    assert not hasattr(model.config, "come")  # metadata of the merge is in come/plan.json
    assert Plan.load(folder / "model" / "come" / "plan.json").history == result["merge_history"]

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["merge/layers"] for r in records if "merge/step" in r] == [5, 4, 3]
    logged = read_wandb(folder, result["job"])
    assert logged["config"]["merge"]["save_at"] == [5, 3]
    assert [h["merge/layers"] for h in logged["history"] if "merge/step" in h] == [5, 4, 3]
    keys = {key for h in logged["history"] for key in h}
    for name in ("figures/puzzle", "tables/steps", "layer/bi", "eval/perplexity"):
        assert any(key.startswith(name) for key in keys), name
    assert list((folder / "wandb").glob("offline-run-*/files/media/images/figures/puzzle*.png"))
    assert logged["group"] == f"{result['model']}-come"
    assert set(logged["tags"]) >= {"come", "m=2"}

    # a finished job is not computed again
    before = (folder / "result.json").stat().st_mtime_ns
    code, output, _ = communicate(command(*words, model=base))
    assert code == 0
    assert "is already finished" in output
    assert (folder / "result.json").stat().st_mtime_ns == before

    # another job in the same folder is rejected
    code, _, errors = communicate(command("merge.m=3", "tracking=none", words[-1], model=base))
    assert code == 1
    assert "holds the result of another job" in errors

    # the plan rebuilds both depths bit for bit
    again = tmp_path / "again"
    code, _, errors = communicate(
        command(
            "merge=from_plan",
            f"merge.plan={folder / 'plan.json'}",
            "merge.save_at=[5]",
            "eval=none",
            f"hydra.run.dir={again}",
            model=base,
        )
    )
    assert code == 0, errors
    assert same_checkpoint(folder / "model", again / "model")
    assert same_checkpoint(folder / "model-5", again / "model-5")


def leveldb_log(data, block=32768, head=7):
    """Yields the records of a LevelDB log: blocks of chunks with checksum, length and type."""
    at, record = head, b""  # the file header is as long as a chunk's
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # a complete record, or its last chunk
            yield record
            record = b""


def read_wandb(folder, run_id):
    """Reads the config and history of an offline W&B run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    found = {"config": {}, "history": []}
    for data in leveldb_log(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["group"], found["tags"] = record.run.run_group, list(record.run.tags)
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            items = {}
            for item in record.history.item:
                items[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            found["history"].append(items)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_killed_run_resumes_to_the_same_model(weights, command, tmp_path):
    job = ["merge.target_layers=12", "calibration.num_samples=64", "eval=none"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, errors = communicate(command(*job, f"hydra.run.dir={whole}"))
    assert code == 0, errors

    job.append(f"model.weights={weights}")
    process = command(*job, f"hydra.run.dir={killed}")
    partial = killed / "plan.partial.json"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.exists()
    assert not (killed / "model").exists()
    assert not (killed / "result.json").exists()
    done = len(json.loads(partial.read_text())["steps"])
    assert 1 <= done < 12
    assert bool(list(killed.glob("weights-*"))) == (weights == "disk")

    code, output, errors = communicate(command(*job, f"hydra.run.dir={killed}"))
    assert code == 0, errors
    assert f"after {done} merges" in output
    assert same_checkpoint(whole / "model", killed / "model")
    assert not list(killed.glob("weights-*"))
    results = [json.loads((f / "result.json").read_text()) for f in (whole, killed)]
    assert results[0]["plan"] == results[1]["plan"]
    assert results[1]["compression"]["resumed_at"] == done


def test_custom_metric_from_a_plugin_file(command, base, tmp_path):
    code = """from come.merge.sensitivity.base import SENSITIVITY, SensitivityMetric

@SENSITIVITY.register
class Custom(SensitivityMetric):
    name, paper, source, moments = "custom", "", "test", ("square",)

    def score(self, inputs):
        return inputs.square_mean
"""
    plugin = tmp_path / "custom.py"
    plugin.write_text(code)
    job = (f"plugins=[{plugin}]", "merge.target_layers=5", "eval=none")
    sweep = command(*job, "merge.sensitivity=custom,come", "-m", model=base)
    code, _, errors = communicate(sweep)
    assert code == 0, errors
    results = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/result.json")]
    metrics = {r["settings"]["merge"]["sensitivity"]["name"] for r in results}
    assert metrics == {"come", "custom"}
    assert len({r["plan"] for r in results}) == 2
    plugin.write_text("import nonsense")
    code, _, errors = communicate(command(*job, model=base))
    assert code == 1
    assert "custom.py fails with ModuleNotFoundError: No module named 'nonsense'" in errors


@pytest.mark.slow
def test_block_method_plans_each_depth_separately(command, tmp_path):
    folder = tmp_path / "out"
    where = (f"hydra.run.dir={folder}", "eval=[perplexity,continuations]")
    code, _, errors = communicate(command("merge=uidl", "merge.save_at=[22,20]", *where))
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    assert [d["layers"] for d in result["depths"]] == [24, 22, 20]
    for depth, name in ((22, "model-22"), (20, "model")):
        plan = json.loads((folder / name / "come" / "plan.json").read_text())
        (step,) = plan["steps"]
        assert step["last"] - step["first"] == 24 - depth
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.num_hidden_layers == depth


@pytest.mark.slow
def test_dropped_sublayers_keep_their_layers_in_the_checkpoint(command, tmp_path):
    folder = tmp_path / "out"
    method = ("merge=shortgpt", "merge.sublayers=[attention]", "merge.save_at=[22,20]")
    where = (f"hydra.run.dir={folder}", "eval=[perplexity,continuations]")
    code, output, errors = communicate(command(*method, *where))
    assert code == 0, errors
    assert "dropped" in errors + output
    result = json.loads((folder / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert [d["layers"] for d in result["depths"]] == [24, 22, 20]
    attention = 32 * 32 * 2 + 32 * 16 * 2 + 32  # query and output, key and value, norm
    sizes = [d["parameters"] for d in result["depths"]]
    assert [sizes[0] - size for size in sizes] == [0, 2 * attention, 4 * attention]
    assert len(model.model.layers) == 24
    zeroed = [i for i, x in enumerate(model.model.layers) if not x.self_attn.o_proj.weight.any()]
    assert (
        sorted({*range(24)} - {*zeroed})
        == Plan.load(folder / "model" / "come" / "plan.json").places
    )
    assert "blocks that add nothing" in " ".join((folder / "model/README.md").read_text().split())


@pytest.mark.slow
def test_self_generated_calibration_needs_no_text(command, tmp_path):
    folder = tmp_path / "out"
    code, _, errors = communicate(
        command(
            "calibration=self_generated",
            "merge.target_layers=22",
            "eval=none",
            f"hydra.run.dir={folder}",
        )
    )
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    assert result["calibration"]["source"].startswith("self_generated")
    assert not result["depths"][1]["metrics"]


def test_base_model_is_never_overwritten(command_line, pico_folder, tmp_path):
    shutil.copytree(pico_folder, tmp_path / "run" / "model")
    for model, message in (
        (tmp_path / "run" / "model", "is where the result would be written"),
        (pico_folder, "was not made by come"),
    ):
        code, printed = command_line(f"hydra.run.dir={tmp_path / 'run'}", f"model.path={model}")
        assert code == 1
        assert message in printed
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.process
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge=kome"], "kome"),
        (["merge.mm=3"], "merge.mm"),
        (["merge.sensitivity=comme"], "did you mean 'come'"),
        (["merge.m=1"], "merge.m=1: must be a whole number of at least 2"),
        (["merge.m=25"], "merge.m=25: a span has at least 2 layers and at most the model's 24"),
        (["merge.sparsity=1.5"], "above 0 and below 1"),
        (["merge.sparsity=0.55"], "the largest that can is 0."),
        (
            ["eval.speed.prompt_tokens=4096"],
            "eval.speed.prompt_tokens=4096: the model reads at most 512",
        ),
        (["merge.target_layers=11"], "smallest depth that can is 12"),
        (["merge.sparsity=0.1", "merge.target_layers=20"], "leave one of them out"),
        (["model.path=/no/such/folder"], "no such folder"),
        (["calibration=text_file", "calibration.path=/no/text.txt"], "does not exist"),
        (["calibration=text_file"], "text_file needs a file: calibration.path=FILE"),
        (["calibration.num_samples=100000"], "calibration text too short"),
        (["hydra.run.dir=/dev/null/x"], "hydra.run.dir=FOLDER"),
        (["merge=from_plan", "merge.plan=/no/plan.json"], "cannot be read as a plan"),
        (["merge=from_plan"], "merge=from_plan needs the plan to apply: merge.plan=FILE"),
        (["model.path=null"], "model.path is not set"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_code_1(command_line, tmp_path, overrides, message):
    code, printed = command_line(*overrides)
    assert code == 1
    assert message in printed
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge=kome"], "kome"),
        (["merge.sparsity=0.55"], "the largest that can is 0."),
    ],
)
def test_invalid_input_in_a_separate_process(command, overrides, message):
    began = time.monotonic()
    code, output, errors = communicate(command(*overrides))
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors + output
    assert len([line for line in errors.splitlines() if line.strip()]) == 1, errors
    assert time.monotonic() - began < 60


@pytest.mark.process
def test_refusals_by_the_configuration_import_no_transformers(pico_folder, tmp_path):
    refused = ["merge.target_layers=40", "calibration.seq_len=4096"]
    code = """
import sys
from come.cli import main
*words, first, second = sys.argv
for last in (first, second):
    sys.argv = [*words, last]
    try:
        code = main()
    except SystemExit as exit_:
        code = exit_.code
    print(code, [m for m in ("transformers", "pandas") if m in sys.modules])
"""
    words = ["model=local", f"model.path={pico_folder}", "calibration=pydocs", *refused]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"COME_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1 []\n" * 2, done.stderr
    assert all(f"error: {override}" in done.stderr for override in refused)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_log_that_cannot_be_written_is_not_reported_line_by_line(command, base, tmp_path):
    words = ("hydra.job_logging.handlers.file.filename=/dev/full", f"hydra.run.dir={tmp_path}")
    code, _, errors = communicate(command(*words, "eval=none", model=base))
    assert "Logging error" not in errors
    assert "Traceback" not in errors
    assert (tmp_path / "result.json").is_file() == (code == 0)
