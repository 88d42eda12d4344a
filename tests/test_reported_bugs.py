"""Inputs from public bug reports of similar tools: each works, or gives a one-line error."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from come.data.sampling import self_generated_windows, unused_ids
from come.data.sources.hub import Hub
from come.data.sources.text_file import TextFile
from come.data.windows import calibration_windows, corpus_text, evaluation_windows
from come.job.folder import check_finite, write_result
from come.job.identity import job_hash
from come.models.checkpoint import check_checkpoint
from come.models.loading import inspect_model, load_model, load_tokenizer, load_weights
from tests.bases import TEMPLATE, add_token_without_embedding, change_weights, edit_json, save_base
from tests.conftest import VOCAB
from tests.jobs import QUICK, job_settings, local_task, prepare_job, run_job
from tests.test_zero_shot import TASK

pytestmark = pytest.mark.usefixtures("private_caches")


# Silently wrong results


def test_changed_tokenizer_invalidates_cached_results(base, tmp_path, monkeypatch):
    overrides = ["merge=none", "merge.target_layers=null", *local_task(tmp_path / "tasks")]
    first = run_job(base, tmp_path / "a", *overrides)
    before = job_hash(job_settings(base, *overrides))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    bos = {"id": "<s>", "type_id": 0}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert job_hash(job_settings(base, *overrides)) != before
    with pytest.raises(ValueError, match="holds the result of another job"):
        run_job(base, tmp_path / "a", *overrides)
    second = run_job(base, tmp_path / "b", *overrides)
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "fresh"))
    fresh = run_job(base, tmp_path / "c", *overrides)
    tasks = [r["depths"][0]["metrics"] for r in (first, second, fresh)]
    assert tasks[1] == tasks[2] != tasks[0]


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
        "tokenizer.model",
    ],
)
def test_job_hash_covers_every_file_of_the_checkpoint(base, name):
    before = job_hash(job_settings(base))
    (base / name).parent.mkdir(exist_ok=True)
    with open(base / name, "a") as file:
        file.write("\n")
    assert job_hash(job_settings(base)) != before


def test_stale_shard_index_next_to_a_single_weights_file(base, tmp_path):
    sharded = save_base(tmp_path / "sharded", "llama_gqa", shard="20KB")
    shutil.copy(sharded / "model.safetensors.index.json", base)
    before = job_hash(job_settings(base))
    check_checkpoint(base)
    assert load_weights(base).config.num_hidden_layers == 6
    change_weights(base, lambda t: t["lm_head.weight"].mul_(2))
    assert job_hash(job_settings(base)) != before  # the loaded file is the one that is hashed


def test_config_without_dtype_keeps_the_dtype_of_the_weights(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    assert inspect_model(base).dtype == torch.bfloat16
    run_job(base, tmp_path / "out", *QUICK)
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "bfloat16"


CHAT = [{"role": "user", "content": "How many layers?"}, {"role": "assistant", "content": "Six."}]
SHARED = [{"from": "human", "value": "How many layers?"}, {"from": "gpt", "value": "Six."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "How many"}, {"text": " layers?"}]}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (CHAT, "<user>How many layers?\n<assistant>Six.\n"),
        (SHARED, "<human>How many layers?\n<gpt>Six.\n"),
        (PARTS, "<user>How many layers?\n"),
        (["one", "two"], "one\ntwo"),
        ("plain", "plain"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_chat_and_list_fields_become_text(base, tmp_path, value, text, kind):
    from pyarrow import Table, parquet

    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows.jsonl")
    if kind == "parquet":
        parquet.write_table(Table.from_pylist([{"messages": value}]), path)
    else:
        path.write_text(json.dumps({"messages": value}) + "\n")
    source = TextFile(str(path), "messages")
    if kind == "hub":
        source = Hub(dataset="json", data_files=str(path), field="messages")
    tokenizer = load_tokenizer(base)
    if "<" in text:
        with pytest.raises(ValueError, match="tokenizer has no chat template"):
            corpus_text(source, tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert corpus_text(source, tokenizer=tokenizer).strip() == text.strip()


def test_byte_fields_must_be_utf8(tmp_path):
    from pyarrow import Table, parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"text": "naïve".encode()}]), path)
    assert corpus_text(TextFile(str(path))) == "naïve"
    parquet.write_table(Table.from_pylist([{"text": b"\xff\xfe"}]), path)
    with pytest.raises(ValueError, match="field 'text' holds bytes that are no UTF-8 text"):
        corpus_text(TextFile(str(path)))


@pytest.mark.parametrize("value", [7, {"a": 1}, [1, 2], [{"a": "b"}], True])
def test_non_text_fields_are_rejected(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(ValueError, match=r"jsonl, line 1: field 'text' holds .*calibration.field"):
        corpus_text(TextFile(str(path)))


def test_non_finite_weights_are_rejected(base, tmp_path):
    change_weights(base, lambda t: t["model.layers.3.mlp.up_proj.weight"][0].fill_(math.nan))
    for number, merge in enumerate(("merge=none", "merge=come")):
        targets = ["merge.target_layers=null"] if merge == "merge=none" else []
        with pytest.raises(ValueError, match=r"layers.3.mlp.up_proj.weight are not finite in"):
            run_job(base, tmp_path / str(number), merge, *targets)
        assert not (tmp_path / str(number) / "result.json").exists()


def test_logits_that_overflow_half_precision(tmp_path):
    """The weights are finite, but the output of the head is not."""
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"].mul_(30000))
    none = ("merge=none", "merge.target_layers=null")
    with pytest.raises(ValueError, match=r"perplexity: a loss of windows .* not finite.*bfloat16"):
        run_job(base, tmp_path / "a", *none)
    with pytest.raises(ValueError, match=r"a log-likelihood of local_qa is not a number.*bfloat16"):
        run_job(base, tmp_path / "b", *none, *local_task(tmp_path / "tasks"))
    with pytest.raises(ValueError, match=r"predictions are not finite in torch.float16"):
        run_job(base, tmp_path / "c", "merge.plan=null")
    for name in "abc":
        assert not (tmp_path / name / "result.json").exists()


def test_non_finite_numbers_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"result.json: depths\[1\].speed is nan"):
        write_result(tmp_path, {"depths": [{"speed": 1.0}, {"speed": math.nan}]})
    assert not list(tmp_path.glob("result.json"))
    check_finite({"a": [1.0, {"b": None}], "c": "inf"}, "result.json")


def test_separate_head_with_a_tied_config(tmp_path):
    """transformers 5 does not tie such a model, 4 does; the saved model is the measured one."""
    base = save_base(tmp_path / "base", "llama_tied")
    tied = inspect_model(base).parameters
    change_weights(base, lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 32)}))
    assert inspect_model(base).parameters == tied + VOCAB * 32
    model, _ = load_model(base)
    assert sum(p.numel() for p in model.parameters()) == tied + VOCAB * 32
    model.tie_weights()  # as the harness does
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    result = run_job(base, tmp_path / "out", *QUICK)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert result["depths"][0]["parameters"] == tied + VOCAB * 32
    assert result["depths"][1]["parameters"] == sum(p.numel() for p in found.parameters())
    assert not found.config.tie_word_embeddings
    assert torch.equal(found.lm_head.weight, torch.ones(VOCAB, 32))


# Tracebacks, most of them after the merge


@pytest.mark.slow
def test_task_metric_without_per_document_values(base, tmp_path):
    mcc = "metric_list:\n  - metric: mcc\n"
    task = TASK[: TASK.index("metric_list")] + mcc
    overrides = local_task(tmp_path / "tasks", task)
    result = run_job(base, tmp_path / "out", *overrides)
    for depth in result["depths"]:
        found = depth["metrics"]["zero_shot/local_qa"]
        assert found["details"]["metric"] == "mcc"
        assert found["data"] == "20 documents"
        assert -1 <= found["value"] <= 1
        assert found["details"]["stderr"] > 0
        assert not found["samples"]
    dense, merged = (d["metrics"]["zero_shot/local_qa"] for d in result["depths"])
    relative = {"value": merged["value"] - dense["value"], "low": None, "high": None, "p": None}
    assert merged["relative"] == relative
    assert result["depths"][1]["metrics"]["zero_shot"]["relative"]["low"] is None
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| {relative['value']:+.3f} |" in report


@pytest.mark.parametrize("section", ["calibration", "eval", "distill"])
def test_token_ids_without_embedding_in_texts(base, tmp_path, text_file, section):
    token, index = add_token_without_embedding(base)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text().replace("layers", f"layers {token}"))
    group = "eval.perplexity" if section == "eval" else section
    overrides = [f"{group}.path={text}"] + ["distill=come_sp"] * (section == "distill")
    with pytest.raises(ValueError, match=rf"text .* '{token}' with id {index}.* {index} rows"):
        prepare_job(base, tmp_path / "out", *overrides)
    prepare_job(base, tmp_path / "out", f"calibration.path={text_file}")


def test_token_ids_without_embedding_in_tasks(base, tmp_path):
    _, index = add_token_without_embedding(base, "What")
    message = rf"a prompt of local_qa has the token 'What' with id {index}"
    with pytest.raises(ValueError, match=message):
        prepare_job(base, tmp_path / "out", *local_task(tmp_path / "tasks"))


def test_sampling_from_a_model_that_overflows(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"].mul_(30000))
    with pytest.raises(ValueError, match=r"not finite in torch.float16, so no text can be sampled"):
        run_job(base, tmp_path / "out", "calibration=self_generated")


@pytest.mark.parametrize(
    "ids", [{"bos_token_id": 151643}, {"eos_token_id": [2, 151645]}, {"pad_token_id": -1}]
)
def test_special_token_ids_beyond_the_embedding(base, tmp_path, ids, caplog):
    edit_json(base / "config.json", **ids)
    run_job(base, tmp_path / "out", "calibration=self_generated", *QUICK)
    assert ("sampled without a begin token" in caplog.text) == ("bos_token_id" in ids)
    model, _ = load_model(base)
    windows = self_generated_windows(model, num_samples=8, seq_len=12, progress=False).windows
    assert (windows[:, 0] == 1).all() == ("bos_token_id" not in ids)


def test_zero_shot_without_begin_and_end_tokens(base, tmp_path):
    edit_json(base / "tokenizer_config.json", "bos_token", "eos_token")
    overrides = local_task(tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"needs a begin or end token .* has neither; name one as"):
        prepare_job(base, tmp_path / "out", *overrides)
    prepare_job(base, tmp_path / "out")  # perplexity needs none


def test_evaluation_does_not_modify_the_tokenizer(base, tmp_path):
    edit_json(
        base / "tokenizer_config.json", "pad_token", tokenizer_class="PreTrainedTokenizerFast"
    )
    overrides = [*local_task(tmp_path / "tasks"), "merge.save_at=[5]"]
    run_job(base, tmp_path / "out", *overrides)
    assert (tmp_path / "out/model/tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("eval.continuations.tokens=64 after", ["eval.continuations.tokens=64"]),
        ("eval.speed.prompt_tokens=64", ["eval.speed.prompt_tokens=64"]),
        (r"eval.speed.new_tokens \+ 16=56", ["eval.speed.new_tokens=40"]),
        ("calibration.seq_len=49", ["calibration.seq_len=49"]),
        ("distill.seq_len=49", ["distill=come_sp", "distill.seq_len=49"]),
    ],
)
def test_lengths_are_checked_against_max_positions(tmp_path, key, overrides):
    base = save_base(tmp_path / "base", "opt", max_position_embeddings=48)
    with pytest.raises(ValueError, match=f"{key}.*the model reads at most 48 tokens"):
        prepare_job(base, tmp_path / "out", *overrides)


# Unclear behaviour


def test_single_line_text_is_split_between_calibration_and_evaluation(base, tmp_path):
    text = tmp_path / "line.txt"
    text.write_text(" ".join(f"Layer {i} speaks of {i * i} groups." for i in range(3000)))
    job = prepare_job(
        base, tmp_path / "out", f"calibration.path={text}", f"eval.perplexity.path={text}"
    )
    tokenizer = load_tokenizer(base)
    seen = tokenizer.decode(job.calibration.windows.flatten())
    unseen = tokenizer.decode(job.evaluations["perplexity"][1][""].windows.flatten())
    numbers = [
        {int(w) for w in part.split() if w.isdigit() and len(w) == 4} for part in (seen, unseen)
    ]
    assert max(numbers[0] & set(range(3000))) < 0.62 * 3000
    assert min(numbers[1] & set(range(1000, 3000))) > 0.78 * 3000


def test_text_file_joins_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Count.", "input": "1 2", "output": "3"},
        {"instruction": "Say no.", "input": "", "output": "no"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(TextFile(str(path), "instruction+input+output").documents())
    assert found == ["Count.\n1 2\n3", "Say no.\nno"]
    with pytest.raises(ValueError, match="no field 'outputs' in a row; there are instruction"):
        list(TextFile(str(path), "instruction+outputs").documents())


def test_only_a_pool_of_a_long_line_is_tokenized(base, tmp_path, monkeypatch):
    """The same number of tokens is read from a corpus of one line and of many lines."""
    monkeypatch.setattr("come.data.windows._POOL_CHARS", 100_000)
    tokenizer, words = load_tokenizer(base), [f"layer {i} of {i % 97}" for i in range(10_000)]
    found = []
    for sign in (" ", "\n"):
        path = tmp_path / f"text{len(found)}.txt"
        path.write_text(sign.join(words))
        found.append(calibration_windows(tokenizer, TextFile(str(path)), num_samples=4, seq_len=32))
    assert found[0].corpus_tokens == pytest.approx(found[1].corpus_tokens, rel=0.1)
    assert len(" ".join(words)) > 1.5 * 100_000
    held_out = evaluation_windows(tokenizer, TextFile(str(path)), seq_len=32, max_tokens=640)
    assert held_out.tokens == 640


def test_adapter_checkpoints_are_rejected(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\).*merge_and_un"):
        check_checkpoint(base)


def test_error_includes_the_message_of_an_invalid_config(base):
    edit_json(base / "config.json", layer_types=["full_attention"] * 4)
    with pytest.raises(ValueError, match=r"bad configuration: .*layer_types.*6|6.*layer_types"):
        inspect_model(base)


def test_padded_vocabulary_rows_are_never_sampled(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa", vocab_size=2 * VOCAB)
    model, tokenizer = load_model(base)
    unused = unused_ids(model, tokenizer)
    assert unused == list(range(len(tokenizer), 2 * VOCAB))
    sizes = {"num_samples": 64, "seq_len": 12, "progress": False}
    assert (self_generated_windows(model, **sizes).windows >= len(tokenizer)).any()
    clean = self_generated_windows(model, **sizes, banned=unused).windows
    assert (clean < len(tokenizer)).all()
    overrides = ("calibration=self_generated", "calibration.num_samples=64", *QUICK)
    run_job(base, tmp_path / "out", *overrides)
    (path,) = (tmp_path / "cache" / "generated").glob("*.safetensors")
    assert (load_file(path)["windows"] < len(tokenizer)).all()


# Works and must keep working


def test_generation_config_is_copied_unchanged(base, tmp_path):
    edit_json(base / "generation_config.json", temperature=0.6, top_p=0.9)
    written = (base / "generation_config.json").read_bytes()
    run_job(base, tmp_path / "out", *QUICK)
    assert (tmp_path / "out/model/generation_config.json").read_bytes() == written


def test_inv_freq_and_redundant_head_in_the_checkpoint(tmp_path):
    base = save_base(tmp_path / "base", "llama_tied")

    def change(tensors):
        for i in range(6):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    parameters = inspect_model(base).parameters
    change_weights(base, change)
    assert inspect_model(base).parameters == parameters
    run_job(base, tmp_path / "out", *QUICK)
    written = load_file(tmp_path / "out/model/model.safetensors")
    assert "lm_head.weight" not in written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").config.tie_word_embeddings


def test_lengths_may_equal_max_positions(tmp_path):
    base = save_base(tmp_path / "base", "opt", max_position_embeddings=48)
    words = ("calibration.seq_len=48", "distill=come_sp", "distill.seq_len=48", "eval=speed")
    sizes = ("eval.speed.prompt_tokens=48", "eval.speed.new_tokens=32")
    prepare_job(base, tmp_path / "out", *words, *sizes)
