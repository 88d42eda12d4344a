"""Inputs that failed somebody, from public reports: each gives the right value, or one line."""

import json
import math
import os
import shlex
import shutil

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from come.config import _line
from come.evaluation.continuations import continuations
from come.evaluation.perplexity import perplexity
from come.evaluation.zero_shot import tasks_identity
from come.job import check_finite, job_hash, write_result
from come.models.checkpoint import check_checkpoint
from come.models.loading import inspect_model, load_model, load_tokenizer, load_weights
from come.text.generated import self_generated_windows, unused_ids
from come.text.hub import Hub
from come.text.text_file import TextFile
from come.text.windows import calibration_windows, corpus_text, evaluation_windows
from tests.bases import TEMPLATE, byte_level, edit, saved
from tests.commands import finish
from tests.conftest import VOCAB
from tests.jobs import before_loading, job_settings, start
from tests.test_zero_shot import TASK

ONLY_TASKS = (
    "eval.perplexity=false",
    "eval.speed=false",
    "eval.continuation_tokens=0",
    "eval.task_batch=4",
)
QUICK = ("eval.speed=false", "eval.continuation_tokens=0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base", "llama_gqa")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def questions(folder, task=TASK):
    """A local task whose questions have a begin token's worth of difference in their answers."""
    folder.mkdir()
    rows = [
        {"question": f"What is {i}?", "choices": [f"{i}", f"a {i * 7}", "b"], "answer": i % 3}
        for i in range(20)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "asked.yaml").write_text(task.format(name="asked", data=folder / "data.jsonl"))
    return [f"eval.include_path={folder}", "eval.tasks=[asked]", *ONLY_TASKS]


# Wrong, and silent


def test_a_changed_tokenizer_is_measured_anew(base, tmp_path, monkeypatch):
    asked = ["merge=none", "merge.target_layers=null", *questions(tmp_path / "tasks")]
    first = start(base, tmp_path / "a", *asked)
    before = job_hash(job_settings(base, *asked))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert job_hash(job_settings(base, *asked)) != before
    with pytest.raises(ValueError, match="holds the result of another job"):
        start(base, tmp_path / "a", *asked)
    second = start(base, tmp_path / "b", *asked)
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "fresh"))
    fresh = start(base, tmp_path / "c", *asked)
    tasks = [r["depths"][0]["zero_shot"]["tasks"]["asked"] for r in (first, second, fresh)]
    assert tasks[1]["metrics"] == tasks[2]["metrics"]
    assert tasks[0]["metrics"] != tasks[1]["metrics"]


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
def test_every_file_that_is_read_counts(base, name):
    before = job_hash(job_settings(base))
    (base / name).parent.mkdir(exist_ok=True)
    with open(base / name, "a") as file:
        file.write("\n")
    assert job_hash(job_settings(base)) != before


def test_an_index_of_shards_that_are_gone_beside_a_whole_file(base, tmp_path):
    sharded = saved(tmp_path / "sharded", "llama_gqa", shard="20KB")
    shutil.copy(sharded / "model.safetensors.index.json", base)
    before = job_hash(job_settings(base))
    check_checkpoint(base)
    assert load_weights(base).config.num_hidden_layers == 6
    change_weights(base, lambda t: t["lm_head.weight"].mul_(2))
    assert job_hash(job_settings(base)) != before  # what is loaded is what is hashed


def test_weights_without_a_dtype_in_the_configuration_keep_theirs(tmp_path):
    base = saved(tmp_path / "base", "llama_gqa", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    assert inspect_model(base).dtype == torch.bfloat16
    start(base, tmp_path / "out", *QUICK)
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
def test_text_is_never_the_repr_of_something_else(base, tmp_path, value, text, kind):
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


def test_bytes_are_decoded_or_refused(tmp_path):
    from pyarrow import Table, parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(Table.from_pylist([{"text": "naïve".encode()}]), path)
    assert corpus_text(TextFile(str(path))) == "naïve"
    parquet.write_table(Table.from_pylist([{"text": b"\xff\xfe"}]), path)
    with pytest.raises(ValueError, match="field 'text' holds bytes that are no UTF-8 text"):
        corpus_text(TextFile(str(path)))


@pytest.mark.parametrize("value", [7, {"a": 1}, [1, 2], [{"a": "b"}], True])
def test_what_is_no_text_is_refused(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl: field 'text' holds .*calibration.field"):
        corpus_text(TextFile(str(path)))


def test_weights_that_are_not_finite(base, tmp_path):
    change_weights(base, lambda t: t["model.layers.3.mlp.up_proj.weight"][0].fill_(math.nan))
    for number, merge in enumerate(("merge=none", "merge=come")):
        targets = ["merge.target_layers=null"] if merge == "merge=none" else []
        with pytest.raises(ValueError, match=r"layers.3.mlp.up_proj.weight are not finite in"):
            start(base, tmp_path / str(number), merge, *targets)
        assert not (tmp_path / str(number) / "result.json").exists()


def test_predictions_that_overflow_half_precision(tmp_path):
    """The weights are finite, and the head's products are not."""
    base = saved(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"].mul_(30000))
    none = ("merge=none", "merge.target_layers=null")
    with pytest.raises(ValueError, match=r"perplexity: a loss of windows .* not finite.*bfloat16"):
        start(base, tmp_path / "a", *none)
    with pytest.raises(ValueError, match=r"a log-likelihood of asked is not a number.*bfloat16"):
        start(base, tmp_path / "b", *none, *questions(tmp_path / "tasks"))
    with pytest.raises(ValueError, match=r"predictions are not finite in torch.float16"):
        start(base, tmp_path / "c", "merge.plan=null")
    for name in "abc":
        assert not (tmp_path / name / "result.json").exists()


def test_a_number_that_is_not_finite_is_never_a_result(tmp_path):
    with pytest.raises(ValueError, match=r"result.json: depths\[1\].speed is nan"):
        write_result(tmp_path, {"depths": [{"speed": 1.0}, {"speed": math.nan}]})
    assert not list(tmp_path.glob("result.json"))
    check_finite({"a": [1.0, {"b": None}], "c": "inf"}, "result.json")


def test_a_head_of_its_own_in_a_tied_configuration(tmp_path):
    """transformers 5 does not tie then, 4 does: what was measured is what is written."""
    base = saved(tmp_path / "base", "llama_tied")
    tied = inspect_model(base).parameters
    change_weights(base, lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 32)}))
    assert inspect_model(base).parameters == tied + VOCAB * 32
    model, _ = load_model(base)
    assert sum(p.numel() for p in model.parameters()) == tied + VOCAB * 32
    model.tie_weights()  # as the harness does
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    result = start(base, tmp_path / "out", *QUICK)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert result["depths"][0]["parameters"] == tied + VOCAB * 32
    assert result["depths"][1]["parameters"] == sum(p.numel() for p in found.parameters())
    assert not found.config.tie_word_embeddings
    assert torch.equal(found.lm_head.weight, torch.ones(VOCAB, 32))


# Tracebacks, most of them after the whole merge


def test_a_metric_that_is_no_number_for_each_document(base, tmp_path):
    mcc = "metric_list:\n  - metric: mcc\n"
    task = TASK[: TASK.index("metric_list")] + mcc
    asked = questions(tmp_path / "tasks", task)
    result = start(base, tmp_path / "out", *asked)
    for depth in result["depths"]:
        found = depth["zero_shot"]["tasks"]["asked"]
        assert found["metric"] == "mcc"
        assert found["documents"] == 20
        assert -1 <= found["value"] <= 1
        assert found["stderr"] > 0
        assert found["scores"] is found["mcnemar_p"] is found["difference_low"] is None
        assert depth["zero_shot"]["average_difference"]["low"] is None
    dense, merged = (d["zero_shot"]["tasks"]["asked"] for d in result["depths"])
    assert merged["difference"] == merged["value"] - dense["value"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{merged['difference']:+.3f} |  |" in report


def lone_token(base, token="<new>"):
    """Adds a token to the tokenizer, and not to the model."""
    tokenizer = load_tokenizer(base)
    saved(base, "llama_gqa", vocab_size=len(tokenizer))
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(base)
    return token, len(tokenizer) - 1


@pytest.mark.parametrize("place", ["calibration", "eval", "distill"])
def test_token_ids_beyond_the_embedding(base, tmp_path, text_file, place):
    token, index = lone_token(base)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text().replace("layers", f"layers {token}"))
    asked = [f"{place}.path={text}"] + ["distill=come_sp"] * (place == "distill")
    with pytest.raises(ValueError, match=rf"text .* '{token}' with id {index}.* {index} rows"):
        before_loading(base, tmp_path / "out", *asked)
    before_loading(base, tmp_path / "out", f"calibration.path={text_file}")


def test_token_ids_beyond_the_embedding_in_tasks(base, tmp_path):
    _, index = lone_token(base, "What")
    with pytest.raises(
        ValueError, match=rf"a prompt of asked has the token 'What' with id {index}"
    ):
        before_loading(base, tmp_path / "out", *questions(tmp_path / "tasks"))


def test_sampled_text_of_a_model_that_overflows(tmp_path):
    base = saved(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"].mul_(30000))
    with pytest.raises(ValueError, match=r"not finite in torch.float16, so no text can be sampled"):
        start(base, tmp_path / "out", "calibration=self_generated")


@pytest.mark.parametrize(
    "ids", [{"bos_token_id": 151643}, {"eos_token_id": [2, 151645]}, {"pad_token_id": -1}]
)
def test_special_ids_beyond_the_embedding(base, tmp_path, ids, caplog):
    edit(base / "config.json", **ids)
    start(base, tmp_path / "out", "calibration=self_generated", *QUICK)
    assert ("sampled without a begin token" in caplog.text) == ("bos_token_id" in ids)
    model, _ = load_model(base)
    windows = self_generated_windows(model, num_samples=8, seq_len=12, progress=False).windows
    assert (windows[:, 0] == 1).all() == ("bos_token_id" not in ids)


def test_zero_shot_without_begin_and_end_tokens(base, tmp_path):
    edit(base / "tokenizer_config.json", "bos_token", "eos_token")
    asked = questions(tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"needs a begin or end token .* has neither; name one as"):
        before_loading(base, tmp_path / "out", *asked)
    before_loading(base, tmp_path / "out")  # perplexity needs none


def test_the_harness_leaves_the_tokenizer_as_it_is(base, tmp_path):
    edit(base / "tokenizer_config.json", "pad_token", tokenizer_class="PreTrainedTokenizerFast")
    asked = [*questions(tmp_path / "tasks"), "merge.save_at=[5]"]
    start(base, tmp_path / "out", *asked)
    assert (tmp_path / "out/model/tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("eval.continuation_tokens=64 after", ["eval.continuation_tokens=64"]),
        ("eval.prompt_tokens=64", ["eval.prompt_tokens=64"]),
        (r"eval.new_tokens \+ 16=56", ["eval.new_tokens=40"]),
        ("calibration.seq_len=49", ["calibration.seq_len=49"]),
        ("distill.seq_len=49", ["distill=come_sp", "distill.seq_len=49"]),
    ],
)
def test_every_length_is_held_against_the_model(tmp_path, key, asked):
    base = saved(tmp_path / "base", "opt", max_position_embeddings=48)
    with pytest.raises(ValueError, match=f"{key}.*the model reads at most 48 tokens"):
        before_loading(base, tmp_path / "out", *asked)


# Unclear


def test_one_text_on_one_line_for_calibration_and_evaluation(base, tmp_path):
    text = tmp_path / "line.txt"
    text.write_text(" ".join(f"Layer {i} speaks of {i * i} groups." for i in range(3000)))
    job = before_loading(base, tmp_path / "out", f"calibration.path={text}", f"eval.path={text}")
    tokenizer = load_tokenizer(base)
    seen = tokenizer.decode(job.calibration.windows.flatten())
    unseen = tokenizer.decode(job.held_out[""].windows.flatten())
    numbers = [
        {int(w) for w in part.split() if w.isdigit() and len(w) == 4} for part in (seen, unseen)
    ]
    assert max(numbers[0] & set(range(3000))) < 0.62 * 3000
    assert min(numbers[1] & set(range(1000, 3000))) > 0.78 * 3000


def test_fields_are_joined_in_files_too(tmp_path):
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


def test_a_long_line_costs_no_more_than_lines(base, tmp_path):
    """Of a large corpus only a pool is tokenised, wherever its lines end."""
    tokenizer, words = load_tokenizer(base), [f"layer {i} of {i % 97}" for i in range(200_000)]
    found = []
    for sign in (" ", "\n"):
        path = tmp_path / f"text{len(found)}.txt"
        path.write_text(sign.join(words))
        found.append(calibration_windows(tokenizer, TextFile(str(path)), num_samples=4, seq_len=32))
    assert found[0].corpus_tokens == pytest.approx(found[1].corpus_tokens, rel=0.1)
    assert len(" ".join(words)) > 1.5 * 2_000_000
    held_out = evaluation_windows(tokenizer, TextFile(str(path)), seq_len=32, max_tokens=640)
    assert held_out.tokens == 640


@pytest.mark.parametrize(
    "value",
    [
        "/x/model (copy)",
        "/x/a=b",
        "/x/a#b",
        "/x/modèl",
        "/x/it's (a)",
        '/x/a"(b',
        "/x/{a}",
        "/x/[a]b",
        "/x/${a}(b)",
        "/x/模型",
    ],
)
def test_a_path_with_signs_is_told_how_to_be_quoted(value):
    parser = OverridesParser.create()
    with pytest.raises(OverrideParseException) as caught:
        parser.parse_overrides([f"model.path={value}"])
    line = _line(caught.value)
    assert "\n" not in line
    (word,) = shlex.split(line.rpartition("for Hydra: ")[2])
    read = parser.parse_override(word)
    assert read.key_or_group == "model.path"
    assert read.value().replace("\\${", "${") == value


def test_a_folder_with_signs_can_be_used(tmp_path):
    base = saved(tmp_path / "model (copy), é=1", "llama_gqa")
    assert before_loading(base, tmp_path / "out").checkpoint == base


def test_messages_of_hydra_come_whole(command):
    for override, parts in (
        ("merge.m=two", ["merge.m", "'two'", "Integer"]),
        ("merge=kome", ["merge/kome", "come_plus", "shortgpt"]),
        ("merge.m=2,3", ["merge.m=2,3", "--multirun"]),
    ):
        code, _, errors = finish(command(override))
        assert code == 1
        assert len(errors.strip().splitlines()) == 1
        assert all(part in errors for part in parts), errors


def test_an_adapter_in_the_folder_is_named(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\).*merge_and_un"):
        check_checkpoint(base)


def test_the_whole_message_of_a_bad_configuration(base):
    edit(base / "config.json", layer_types=["full_attention"] * 4)
    with pytest.raises(ValueError, match=r"bad configuration: .*layer_types.*6|6.*layer_types"):
        inspect_model(base)


def test_rows_of_a_padded_vocabulary_are_never_sampled(tmp_path):
    base = saved(tmp_path / "base", "llama_gqa", vocab_size=2 * VOCAB)
    model, tokenizer = load_model(base)
    unused = unused_ids(model, tokenizer)
    assert unused == list(range(len(tokenizer), 2 * VOCAB))
    sizes = {"num_samples": 64, "seq_len": 12, "progress": False}
    assert (self_generated_windows(model, **sizes).windows >= len(tokenizer)).any()
    clean = self_generated_windows(model, **sizes, banned=unused).windows
    assert (clean < len(tokenizer)).all()
    asked = ("calibration=self_generated", "calibration.num_samples=64", *QUICK)
    start(base, tmp_path / "out", *asked)
    (path,) = (tmp_path / "cache" / "generated").glob("*.safetensors")
    assert (load_file(path)["windows"] < len(tokenizer)).all()


# Works, and has to stay so


def test_temperature_without_sampling_stays(base, tmp_path):
    edit(base / "generation_config.json", temperature=0.6, top_p=0.9)
    written = (base / "generation_config.json").read_bytes()
    start(base, tmp_path / "out", *QUICK)
    assert (tmp_path / "out/model/generation_config.json").read_bytes() == written


def test_frequencies_and_a_redundant_head_in_the_file(tmp_path):
    base = saved(tmp_path / "base", "llama_tied")

    def change(tensors):
        for i in range(6):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    parameters = inspect_model(base).parameters
    change_weights(base, change)
    assert inspect_model(base).parameters == parameters
    start(base, tmp_path / "out", *QUICK)
    written = load_file(tmp_path / "out/model/model.safetensors")
    assert "lm_head.weight" not in written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").config.tie_word_embeddings


def test_a_folder_without_weights_beside_the_tokenizer(tmp_path):
    byte_level(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        check_checkpoint(tmp_path)


# More of the kinds, found by looking for them


def test_a_trial_that_overflows_is_not_the_best_one(tmp_path):
    """Logits that overflow on the calibration text alone: no trial has a divergence."""
    base = saved(tmp_path / "base", "llama_gqa", dtype=torch.float16)
    change_weights(base, lambda t: t["lm_head.weight"][40:60].mul_(60000))
    trials = ("merge.selection=trial_kl", "eval.perplexity=false", *QUICK)
    with pytest.raises(ValueError, match="gives no number for layers"):
        start(base, tmp_path / "out", "merge=come", *trials)


def test_layers_that_add_nothing_can_be_solved_for(tmp_path):
    base = saved(tmp_path / "base", "llama_gqa")

    def silence(tensors):
        for i in (4, 5):
            tensors[f"model.layers.{i}.self_attn.v_proj.weight"].zero_()
            tensors[f"model.layers.{i}.self_attn.o_proj.weight"].zero_()

    change_weights(base, silence)
    result = start(base, tmp_path / "out", "merge=come_plus", *QUICK)
    assert result["depths"][1]["layers"] == 5


@pytest.mark.parametrize(
    "setting",
    [
        "merge.finish_lambda=.inf",
        "calibration.temperature=.inf",
        "distill.learning_rate=.nan",
        "+merge.options.threshold=.inf",
    ],
)
def test_settings_are_finite_numbers(base, setting):
    key = setting.lstrip("+").partition("=")[0]
    with pytest.raises(ValueError, match=f"{key}=(inf|nan): must be a finite number"):
        job_settings(base, setting.replace("=.", "="))


def test_a_trained_model_in_half_precision_is_what_is_saved(tmp_path):
    """Its rotary table stays in float32, as every reader makes it."""
    base = saved(tmp_path / "base", "llama_gqa", dtype=torch.bfloat16)
    heal = ("distill=come_sp", "distill.tokens=256", "distill.seq_len=16", "distill.batch_size=4")
    result = start(base, tmp_path / "out", *heal, "distill.validation_samples=4", *QUICK)
    model = load_weights(tmp_path / "out" / "model")
    job = before_loading(base, tmp_path / "again")
    again = perplexity(model, job.held_out[""].windows, batch_tokens=2048, progress=False)
    assert result["depths"][-1]["perplexity"]["nll"] == list(again.nll)


def test_the_part_of_a_text_that_is_held_out_counts(base, text_file, tmp_path):
    """With a plan, calibration text only decides which part of the same text is held out."""
    start(base, tmp_path / "out", *QUICK)
    plan = ["merge=from_plan", f"merge.plan={tmp_path / 'out' / 'plan.json'}"]
    asked = [*plan, "merge.target_layers=null", f"eval.path={text_file}"]
    apart = job_hash(job_settings(base, *asked))
    assert job_hash(job_settings(base, *asked, f"calibration.path={text_file}")) != apart


def test_identities_of_texts_are_their_content(tmp_path):
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
    assert one.content == other.content  # one corpus, so that its parts are kept apart
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
        "include: common",
        "include: common.yaml",
        "process_docs: !function helper.process",
    ],
)
def test_data_that_a_task_names_count(tmp_path, form):
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


GENERATES = """task: asked
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


def test_tasks_that_generate_are_held_against_the_model(base, tmp_path):
    for number, (tokens, change, message) in enumerate(
        (
            (512, {}, "asked generates 512 tokens, and the model reads at most 512"),
            (4, {"without": "eos_token"}, "asked generates up to an end token, and the tokenizer"),
            (4, {"more": "unsafe_code: true\n"}, "asked runs code that the model writes"),
        )
    ):
        task = GENERATES.format(data="{data}", tokens=tokens).replace("{{", "{{{{")
        task = task.replace("}}", "}}}}") + change.get("more", "")
        asked = questions(tmp_path / f"tasks{number}", task)
        if "without" in change:
            written = (base / "tokenizer_config.json").read_text()
            edit(base / "tokenizer_config.json", change["without"])
        with pytest.raises(ValueError, match=message):
            before_loading(base, tmp_path / "out", *asked)
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
def test_a_base_with_any_card(base, tmp_path, card):
    (base / "README.md").write_text(card)
    start(base, tmp_path / "out", "eval.perplexity=false", *QUICK)
    found = (tmp_path / "out" / "model" / "README.md").read_text()
    assert ("language: 'no'" in found) == ("language: no" in card)
    assert ("base model (mit, apache-2.0)" in found) == ("apache" in card)


def test_names_with_dollar_signs_are_drawn(tmp_path):
    base = saved(tmp_path / "a$x_{$ b", "llama_gqa")
    start(base, tmp_path / "out", "eval.speed=false", "eval.continuation_tokens=0")
    assert (tmp_path / "out" / "perplexity.png").is_file()


def test_the_prompts_of_the_report_are_held_against_the_embedding(base, tmp_path):
    lone_token(base, "capital")
    with pytest.raises(ValueError, match=r"a prompt has the token 'capital'"):
        before_loading(base, tmp_path / "out")


def test_continuations_are_greedy_whatever_the_generation_configuration(base):
    model, tokenizer = load_model(base)
    plain = continuations(model, tokenizer, new_tokens=12)
    model.generation_config.num_beams = 3
    model.generation_config.repetition_penalty = 5.0
    assert continuations(model, tokenizer, new_tokens=12) == plain


def test_weights_that_the_configuration_names(base, tmp_path):
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    edit(base / "config.json", transformers_weights="other.safetensors")
    before = job_hash(job_settings(base))
    tensors = load_file(base / "other.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, base / "other.safetensors", metadata={"format": "pt"})
    assert job_hash(job_settings(base)) != before
    (base / "model.safetensors").unlink()
    start(base, tmp_path / "out", *QUICK)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").lm_head.weight,
        tensors["lm_head.weight"],
    )


def test_weights_changed_behind_an_old_time(base):
    before, path = job_hash(job_settings(base)), base / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert job_hash(job_settings(base)) != before


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_configuration_that_is_cut(base, text):
    (base / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (cannot be read|holds no configuration)"):
        inspect_model(base)


def test_a_short_training_text_is_named(base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match=r"training text too short: .* distill.seq_len=256"):
        before_loading(base, tmp_path / "out", "distill=come_sp", f"distill.path={short}")


def test_rows_with_both_names_of_a_message(tmp_path):
    path = tmp_path / "rows.jsonl"
    mixed = {"role": None, "content": None, "from": "human", "value": "hello"}
    path.write_text(json.dumps({"text": [mixed]}) + "\n")
    (document,) = TextFile(str(path)).documents()
    assert document == [{"role": "human", "content": "hello"}]


def test_methods_that_need_windows_say_so_at_once(base, tmp_path):
    with pytest.raises(ValueError, match=r"num_samples=4: .* needs at least 5 windows"):
        before_loading(base, tmp_path / "out", "merge=mka", "calibration.num_samples=4")


def test_plans_that_fit_no_model_are_refused_at_once(base, tmp_path):
    start(base, tmp_path / "out", *QUICK)
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_text())
    asked = ("merge=from_plan", "merge.target_layers=null", f"merge.plan={path}")
    for change, message in (
        (lambda p: p.update(operator="glue"), "'glue': unknown merge operator"),
        (lambda p: p["steps"][0].update(last=9), "merges layers 4 to 9 in step 1, where the model"),
    ):
        changed = json.loads(json.dumps(plan))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            before_loading(base, tmp_path / "again", *asked)


def test_a_neighbour_with_old_in_its_name_stays(base, tmp_path):
    (tmp_path / "out" / "model.old").mkdir(parents=True)
    (tmp_path / "out" / "model.old" / "thesis.txt").write_text("years of work")
    for _ in range(2):
        start(base, tmp_path / "out", *QUICK)
        (tmp_path / "out" / "result.json").unlink()
    assert (tmp_path / "out" / "model.old" / "thesis.txt").read_text() == "years of work"


def test_no_index_of_weights_that_were_not_kept(base, tmp_path, monkeypatch):
    monkeypatch.setattr("come.merging.saving.MAX_SHARD_SIZE", "20KB")
    start(base, tmp_path / "out", "merge.keep=false", *QUICK)
    assert not list((tmp_path / "out" / "model").glob("model*"))
