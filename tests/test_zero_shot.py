"""Zero-shot tasks from local files with lm-eval, and paired differences."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from come.evaluate.base import Relative, Subject
from come.evaluate.paired import paired_difference
from come.evaluate.tasks import TaskSet, check_tasks, load_tasks, tasks_identity
from come.evaluate.zero_shot import ZeroShot, zero_shot
from come.models.loading import load_model, load_tokenizer
from tests.commands import communicate
from tests.conftest import VOCAB, pico

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


PACKAGES = "torch.utils.collect_env.get_pretty_env_info"
"""Called by the harness after every evaluation; lists the installed packages in half a second."""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two local tasks of 24 questions each."""
    monkeypatch.setattr(PACKAGES, str)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(("layers", "models")):
        data = folder / f"{name}.jsonl"
        rows = [
            {
                "question": f"What is {i + number} of the {name}?",
                "choices": [f"the {i}", f"a group of {i * 7}", "depth order"],
                "answer": (i * i + number) % 3,
            }
            for i in range(24)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


def load(tasks, names=("layers", "models"), limit=None):
    return load_tasks(list(names), include_path=str(tasks), limit=limit, batch_size=4)


@pytest.mark.slow
def test_results_equal_those_of_the_lm_eval_command(tasks, pico_folder, tmp_path):
    """Exactly, for the same model folder and tasks."""
    model, tokenizer = load_model(pico_folder)
    found = zero_shot(model, tokenizer, load(tasks))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--batch_size", "4"]
    words += ["--model_args", f"pretrained={pico_folder},dtype=float32", "--device", "cpu"]
    words += ["--tasks", "layers,models", "--include_path", str(tasks), "--output_path", str(out)]
    subprocess.run(words, check=True, capture_output=True)
    (path,) = out.glob("**/results*.json")
    theirs = json.loads(path.read_text())["results"]
    for name in ("layers", "models"):
        for key, place in (
            ("acc", f"zero_shot/{name}"),
            ("acc_norm", f"zero_shot/{name}/acc_norm"),
        ):
            metric = found[place]
            assert metric.value == theirs[name][f"{key},none"], (name, key)
            assert metric.details["stderr"] == theirs[name][f"{key}_stderr,none"], (name, key)
            assert len(metric.samples) == 24
            assert sum(metric.samples) / 24 == pytest.approx(metric.value)
    assert found["zero_shot"].value == pytest.approx(
        (theirs["layers"]["acc,none"] + theirs["models"]["acc,none"]) / 2
    )


def test_limit_takes_the_first_documents(tasks, pico_folder):
    model, tokenizer = load_model(pico_folder)
    every = zero_shot(model, tokenizer, load(tasks, ["layers"]))
    some = zero_shot(model, tokenizer, load(tasks, ["layers"], limit=7))
    assert some["zero_shot/layers"].samples == every["zero_shot/layers"].samples[:7]


def test_group_counts_as_one_task(tasks, pico_folder):
    """Nested groups: each task runs once, and the average is over the requested names."""
    (tasks / "inner.yaml").write_text("group: inner\ntask:\n  - layers\n")
    (tasks / "outer.yaml").write_text("group: outer\ntask:\n  - inner\n")
    model, tokenizer = load_model(pico_folder)
    found = zero_shot(model, tokenizer, load(tasks, ["outer", "models"]))
    tasks = {name for name in found if not name.endswith("acc_norm")}
    assert tasks == {"zero_shot", "zero_shot/outer", "zero_shot/layers", "zero_shot/models"}
    assert [name for name, metric in found.items() if metric.headline] == ["zero_shot"]
    layers, models = found["zero_shot/layers"].value, found["zero_shot/models"].value
    assert found["zero_shot/outer"].value == layers
    assert found["zero_shot"].value == pytest.approx((layers + models) / 2)
    assert ZeroShot.compare(found, found)["zero_shot/outer"].relative == Relative(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("names", "missing_file", "message"),
    [
        (
            ["layers"],
            "layers.jsonl",
            "eval.zero_shot.tasks has 'layers': its documents cannot be read",
        ),
        pytest.param(
            ["arc_easy"],
            None,
            "eval.zero_shot.tasks has 'arc_easy': its documents cannot be read.*network",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tasks_without_data(names, missing_file, message, tasks):
    if missing_file:
        (tasks / missing_file).unlink()
    with pytest.raises(ValueError, match=message):
        load(tasks, names)
    with pytest.raises(ValueError, match="eval.zero_shot.include_path=/no/folder: no such folder"):
        load_tasks(["layers"], include_path="/no/folder", limit=None, batch_size=4)


def test_tasks_are_checked_when_prepared_and_when_measured(pico_folder, monkeypatch):
    tokenizer = load_tokenizer(pico_folder)
    tokenizer.bos_token = tokenizer.eos_token = None
    found = TaskSet(["layers"], None, 1, [], {}, {"layers": []}, None, "")
    monkeypatch.setattr("come.evaluate.zero_shot.load_tasks", lambda *given, **others: found)
    message = "the harness needs a begin or end token .* has neither"
    with pytest.raises(ValueError, match=message):
        ZeroShot(tasks=["layers"]).prepare(Subject(tokenizer, VOCAB, 512, [], None))
    with pytest.raises(ValueError, match=message):
        zero_shot(pico("llama_gqa"), tokenizer, found)


def test_prompts_are_checked_with_the_tokens_that_the_tokenizer_adds(tasks, pico_folder):
    tokenizer, found = load_tokenizer(pico_folder), load(tasks, ["layers"], 2)
    check_tasks(found, tokenizer, VOCAB, 512)
    tokenizer.add_tokens("<last>")
    added = tokenizer.convert_tokens_to_ids("<last>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <last>", special_tokens=[("<last>", added)]
    )
    with pytest.raises(
        ValueError, match=f"a prompt of layers has the token '<last>' with id {added}"
    ):
        check_tasks(found, tokenizer, added, 512)


def test_task_identity_depends_on_content(tasks):
    before = tasks_identity(["layers"], str(tasks), None)
    assert before != tasks_identity(["layers"], str(tasks), 5)
    (tasks / "layers.jsonl").write_text("{}")
    assert before != tasks_identity(["layers"], str(tasks), None)


def test_complete_run_with_tasks(tasks, command, base, tmp_path):
    folder = tmp_path / "out"
    words = [
        "eval=zero_shot",
        f"eval.zero_shot.include_path={tasks}",
        "eval.zero_shot.tasks=[layers,models]",
    ]
    words += ["merge.target_layers=5", f"hydra.run.dir={folder}"]
    code, output, errors = communicate(command(*words, model=base))
    assert code == 0, errors
    result = json.loads((folder / "result.json").read_text())
    dense, merged = (depth["metrics"] for depth in result["depths"])
    for name in ("layers", "models"):
        for key in (f"zero_shot/{name}", f"zero_shot/{name}/acc_norm"):
            metric, relative = merged[key], merged[key]["relative"]
            assert metric["data"] == "24 documents"
            assert len(metric["samples"]) == 24
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert relative["value"] == pytest.approx(metric["value"] - dense[key]["value"])
            assert relative["low"] <= relative["value"] <= relative["high"]
            assert 0 <= relative["p"] <= 1
        assert merged[f"zero_shot/{name}"]["details"]["metric"] == "acc"
    average = merged["zero_shot"]
    assert average["value"] == pytest.approx(
        (merged["zero_shot/layers"]["value"] + merged["zero_shot/models"]["value"]) / 2
    )
    assert average["relative"]["low"] <= average["relative"]["value"] <= average["relative"]["high"]
    assert f"{average['value']:.3f}" in output
    assert "| 5 | layers, acc |" in (folder / "report.md").read_text()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert any("eval/zero_shot/layers_dense_difference_value" in line for line in lines)


@pytest.mark.slow
def test_unknown_task_gives_one_line(command_line, tasks, tmp_path):
    words = [
        "eval=zero_shot",
        f"eval.zero_shot.include_path={tasks}",
        "eval.zero_shot.tasks=[modles]",
    ]
    code, printed = command_line(*words, f"hydra.run.dir={tmp_path / 'out'}")
    assert code == 1
    assert "error: eval.zero_shot.tasks has 'modles': no such task" in printed
    assert "did you mean models" in printed


def test_paired_difference():
    generator = np.random.default_rng(1)
    reference = (generator.random(400) < 0.6).astype(float)
    scores = np.where(generator.random(400) < 0.15, 1 - reference, reference)
    found = paired_difference(scores.tolist(), reference.tolist())
    gaps = scores - reference
    assert found.value == pytest.approx(gaps.mean())
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    assert found.low == pytest.approx(found.value - half, abs=0.005)
    assert found.high == pytest.approx(found.value + half, abs=0.005)
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
    assert found.p == pytest.approx(min(1.0, 2 * tail / 2 ** (better + worse)), rel=1e-6)


def test_paired_difference_of_equal_models():
    found = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_task_identity_covers_data_in_any_folder(tasks, tmp_path):
    def identity():
        return tasks_identity(["layers"], str(tasks), None)

    data, elsewhere = tasks / "layers.jsonl", tmp_path / "elsewhere.jsonl"
    data.rename(elsewhere)
    task = tasks / "layers.yaml"
    task.write_text(task.read_text().replace(str(data), str(elsewhere)))
    before = identity()
    moved = elsewhere.rename(tmp_path / "moved.jsonl")
    task.write_text(task.read_text().replace(str(elsewhere), str(moved)))
    assert identity() == before
    moved.write_text(moved.read_text().replace("depth order", "other order"))
    assert identity() != before


def test_group_is_the_mean_of_its_tasks(tasks, pico_folder):
    (tasks / "both.yaml").write_text("group: both\ntask:\n  - layers\n  - models\n")
    found = zero_shot(*load_model(pico_folder), load(tasks, ["both"]))
    mean = (found["zero_shot/layers"].value + found["zero_shot/models"].value) / 2
    assert found["zero_shot/both"].value == pytest.approx(mean)


def test_paired_difference_is_reproducible():
    scores, reference = np.random.default_rng(2).random((2, 50)).tolist()
    assert paired_difference(scores, reference) == paired_difference(scores, reference)
