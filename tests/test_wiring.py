"""Every setting changes the outputs of a job that it should, and no others."""

import hashlib
import importlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file

from come.distill.objectives.base import DISTILL
from come.evaluate.base import EVALUATIONS
from come.evaluate.speed import ModelSpeed, Timing
from come.job.identity import job_hash
from come.merge.method import PARTS
from come.schema import Settings
from tests.bases import save_base
from tests.commands import drop_unused_eval_settings
from tests.evaluation_rows import COME, EVALUATION_CHANGES, EVALUATION_ELSEWHERE, NLL, ZERO_SHOT
from tests.jobs import job_settings
from tests.test_zero_shot import PACKAGES, TASK

RUN = importlib.import_module("come.job.run")

# Outputs of a job that change together.
MERGED = {"plan", "weights", "merged nll"}
PLANNED, RESIZED = {*MERGED, "history"}, {*MERGED, "history", "layers"}
TRAINED, CURVE = {"trained", "trained nll"}, {"trained", "trained nll", "curve", "validation"}

# Jobs in which a setting has an effect, as overrides.
COME_PLUS = ("merge=come_plus", "merge.m=2")
FOUR = (*COME, "merge.target_layers=4")
FRONT = (*FOUR, "merge.selection=magnitude")  # merges the first layers
PREFIX = (*COME, "calibration.prefix_tokens=4")
TWO_GROUPS = (*COME, "merge.target_layers=null", "merge.groups=[[0,1],[2,3]]")
SAMPLED = (*COME, "calibration=self_generated", "calibration.path=null")
TRIALS = ("merge=come", "merge.selection=trial_kl", "merge.refit=ridge", "merge.retention=uniform")
HEAL = (
    "merge=come", "distill=come_sp", "distill.tokens=256", "distill.seq_len=16",
    "distill.batch_size=4", "distill.micro_batch=2", "distill.validation_samples=4",
    "distill.validate_every=2", "distill.checkpoint_every=2",
)  # fmt: skip
HEAL_SAMPLED = (*HEAL, "distill.source=self_generated")
# (job, changed setting, outputs that change)
CHANGES = [
    (COME, "model.dtype=bfloat16", {*MERGED, *NLL, "dtype"}),
    (COME, "model.begin_token=true", {*PLANNED, *NLL}),
    (COME, "model.name=other", {"label"}),
    (COME, "model.base_model=me/mine", set()),
    (COME, "tracking.project=other", set()),
    (COME, "calibration.num_samples=7", MERGED),
    (COME, "calibration.seq_len=17", MERGED),
    (COME, "calibration.seed=1", PLANNED),
    (COME, "calibration.path={other}", MERGED),
    (PREFIX, "calibration.num_continuations=2", MERGED),
    ((*PREFIX, "calibration.num_continuations=2"), "calibration.prefix_tokens=8", MERGED),
    (COME, "calibration.mix={text_file:0.5,mmlu:0.5}", MERGED),
    (COME, "calibration.store=disk", set()),
    (COME, "calibration.memory=900GB", set()),
    (COME, "model.weights=disk", set()),
    (COME, "merge.shard_size=1MB", set()),
    (SAMPLED, "calibration.seed=1", MERGED),
    (SAMPLED, "calibration.num_samples=7", MERGED),
    (SAMPLED, "calibration.temperature=0.5", MERGED),
    (SAMPLED, "calibration.top_p=0.5", MERGED),
    (SAMPLED, "calibration.keep_likeliest=0.5", MERGED),
    (COME, "merge.operator=average", MERGED),
    (COME, "merge.sensitivity=magnitude", MERGED),
    (FRONT, "merge.selection=reverse", MERGED),
    (COME, "merge.retention=uniform", MERGED),
    (COME, "merge.schedule=one_shot", set()),  # the order of a single merge does not matter
    (FRONT, "merge.schedule=one_shot", MERGED),
    (FOUR, "merge.m=3", PLANNED),
    (COME, "merge.retention.p=50", MERGED),
    (COME, "merge.tokens=all", MERGED),
    (COME, "merge.norms=fold", MERGED),
    (COME, "merge.kinds=last", {"plan"}),
    ((*COME, "merge.target_layers=3"), "merge.protect_first=1 merge.target_layers=4", RESIZED),
    (COME, "merge.protect_last=3", PLANNED),
    (COME, "merge.sublayers=[ffn]", {*MERGED, "history"}),
    (FOUR, "merge.allow_remerge=true", PLANNED),
    ((*COME, "merge.target_layers=null"), "merge.groups=[[0,1]]", PLANNED),
    (COME, "merge.width=0.6 merge.width_multiple=8", MERGED),
    ((*COME, "merge.width=0.6", "merge.width_multiple=8"), "merge.width_multiple=5", MERGED),
    (COME, "merge.width_attention=0.5", MERGED),
    ((*COME, "merge.target_layers=null"), "merge.budget.parameters=0.7", RESIZED),
    ((*COME, "merge.sensitivity=random"), "merge.sensitivity.seed=1", MERGED),
    (COME, "merge.target_layers=4", RESIZED),
    ((*COME, "merge.target_layers=null"), "merge.sparsity=0.35", RESIZED),
    (FOUR, "merge.save_at=[5]", {"layers", "depths", "also", "continuations"}),
    (COME, "merge.save_weights=false", {"files", "weights"}),
    (COME, "merge.refit=ridge", MERGED),
    ((*COME, "merge.refit=ridge"), "merge.refit.lambda=1", MERGED),
    ((*COME, "merge.refit=ridge"), "merge.refit.sublayers=[ffn]", MERGED),
    ((*COME, "merge.refit=ridge"), "merge.refit.weights=equal", MERGED),
    ((*COME, "merge.refit=ridge", "merge.norms=fold"), "merge.refit.align=0.5", MERGED),
    ((*TWO_GROUPS, "merge.refit=ridge"), "merge.refit.target=current", MERGED),
    ((*TWO_GROUPS, "merge.refit=ridge"), "merge.refit.downstream=0.5", MERGED),
    (COME_PLUS, "merge.refit=ridge", MERGED),
    (COME_PLUS, "merge.refit.align=1", MERGED),
    (COME_PLUS, "merge.retention=uniform", MERGED),
    ((*FRONT, "merge.selection=random"), "merge.selection.seed=1", PLANNED),
    ((*COME, "merge.retention=posterior"), "merge.retention.granularity=3", MERGED),
    (COME_PLUS, "merge.retention.rate=1", MERGED),
    (COME_PLUS, "merge.retention.tokens=32", MERGED),
    (COME_PLUS, "merge.refit.input_lambda=20", MERGED),
    (COME_PLUS, "merge.refit.steps=1", MERGED),
    ((*COME, "merge.refit=adam", "merge.refit.steps=2"), "merge.refit.steps=3", MERGED),
    ((*COME, "merge.refit=adam", "merge.refit.steps=2"), "merge.refit.learning_rate=0.01", MERGED),
    (TRIALS, "merge.selection.shortlist=1", {"candidates"}),
    (TRIALS, "merge.selection.trial_windows=1", {"candidates"}),
    (TRIALS, "merge.selection.validation_windows=1", {"candidates"}),
    (TRIALS, "merge.selection.repeat_weight=0.5", {"candidates"}),
    (HEAL, "distill=logits", CURVE),
    (HEAL, "distill=lora", CURVE),
    (HEAL, "distill.path={other}", CURVE),
    (HEAL, "distill.tokens=320", CURVE),
    (HEAL, "distill.epochs=2", CURVE),
    (HEAL, "distill.seq_len=32", CURVE),
    (HEAL, "distill.batch_size=8", CURVE),
    (HEAL, "distill.validation_samples=6", CURVE),
    (HEAL, "distill.loss=cosine", CURVE),
    (HEAL, "distill.loss=kl", CURVE),
    ((*HEAL, "distill.loss=kl"), "distill.temperature=2", CURVE),
    ((*HEAL, "distill.loss=mix", "+distill.loss_weights={mse:1,kl:1}"),
     "distill.loss_weights.kl=0.1", CURVE),
    (HEAL, "distill.logit_weight=1", CURVE),
    (HEAL, "distill.teacher=stored", set()),
    (HEAL_SAMPLED, "distill.stream=true", CURVE),
    (HEAL_SAMPLED, "distill.shifted=0", CURVE),
    ((*HEAL_SAMPLED, "distill.stream=true"), "distill.block_windows=4", CURVE),
    ((*HEAL_SAMPLED, "distill.stream=true"), "distill.on_policy=0.5", CURVE),
    (HEAL, "distill.prefix_tokens=8", CURVE),
    (HEAL, "distill.layers=neighbours", CURVE),
    ((*HEAL, "distill.layers=neighbours"), "distill.layer_decay=0.5", CURVE),
    (HEAL, "distill.optimizer=sgd", CURVE),
    (HEAL, "distill.train=norms_outputs", CURVE),
    (HEAL, "distill.train=norms", CURVE),
    (HEAL, "distill.train=outputs", CURVE),
    (HEAL, "distill.train=lora", CURVE),
    ((*HEAL, "distill.train=lora"), "distill.lora_rank=1", CURVE),
    (HEAL, "distill.learning_rate=1e-4", CURVE),
    (HEAL, "distill.warmup=0.5", CURVE),
    (HEAL, "distill.weight_decay=10", CURVE),
    (HEAL, "distill.clip=0.001", CURVE),
    (HEAL, "distill.precision=bfloat16", CURVE),
    (HEAL, "distill.seed=1", CURVE),
    (HEAL, "distill.validate_every=1", {"validation"}),
    (HEAL, "distill.gradient_checkpointing=true", set()),
    (HEAL, "distill.checkpoint_every=1", set()),
    ((*HEAL, "distill=come_mp"), "distill.workers=1", set()),
    ((*HEAL, "distill=come_mp", "distill.loss=kl"), "distill.temperature=2", CURVE),
    ((*HEAL, "distill.learning_rate=3"), "distill.patience=1", {"curve", "validation"}),
    *EVALUATION_CHANGES,
]  # fmt: skip
# Settings that change neither a number nor the job hash.
NOT_HASHED = {
    "model.name", "model.base_model", "tracking.project", "calibration.store", "model.weights",
    "calibration.memory", "merge.shard_size", "distill.gradient_checkpointing",
    "distill.checkpoint_every", "distill.workers",
}  # fmt: skip
# Settings with other tests, or that need the hub, a GPU or an account.
TESTED_ELSEWHERE = {
    "model.path", "model.revision", "model.device", "model.trust_remote_code",
    "calibration.source", "calibration.dataset", "calibration.subset", "calibration.split",
    "calibration.revision", "calibration.field", "calibration.data_files",
    "calibration.batch_size", "calibration.chat",
    "distill.micro_batch",
    "distill.source", "distill.dataset", "distill.subset", "distill.split", "distill.revision",
    "distill.field", "distill.data_files", "distill.method",
    *EVALUATION_ELSEWHERE, "merge.name", "merge.plan", "merge.enabled", "merge.changes",
    "tracking.backend", "tracking.mode", "tracking.group",
    "export.format", "export.types", "export.converter", "hub.push", "hub.private",
}  # fmt: skip
SCHEDULES_ELSEWHERE = {  # in tests/test_repairs.py, tests/test_sets.py and tests/test_subfit.py
    f"merge.schedule.{key}"
    for key in (
        "threshold",
        "interval",
        "relax",
        "trial_windows",
        "clusters",
        "rounds",
        "cost",
        "candidate_sets",
    )
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a base model, texts and tasks."""
    root = tmp_path_factory.mktemp("wiring")
    save_base(root / "base", "llama_gqa")
    for number, name in enumerate(("text", "other", "third", "held_out")):
        lines = [
            f"Line {i} of {name} speaks of {i * (i + number)} layers in {i % 7} groups, "
            f"{'merged' if i % (number + 2) else 'kept'} in depth order."
            for i in range(300)
        ]
        (root / f"{name}.txt").write_text("\n".join(lines))
    for tasks, shift in (("tasks", 0), ("tasks2", 1)):
        (root / tasks).mkdir()
        for name in "ab":
            data = root / tasks / f"{name}.jsonl"
            rows = [
                {
                    "question": f"What is {i + ord(name) + shift} of the layers?",
                    "choices": [f"the {i}", f"a group of {i * 7}", "depth order"],
                    "answer": (i * i + shift) % 3,
                }
                for i in range(12)
            ]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (root / tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return root


@pytest.fixture(scope="module")
def baselines():
    return {}


def digest(folder):
    """Hash of all weights in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found.update(name.encode() + tensor.float().numpy().tobytes())
    return found.hexdigest()


def fake_speed(models, **options):
    """Returns fixed speeds and records the arguments."""
    timing = Timing(10, (1.0, 2.0))
    fake_speed.options = options
    return {label: ModelSpeed(timing, timing, 1, 1) for label in models}


def losses(depth):
    return depth["metrics"].get("perplexity", {}).get("samples")


def chosen_metrics(depth, prefix):
    return {name: found for name, found in depth["metrics"].items() if name.startswith(prefix)}


def observe(inputs, folder, overrides):
    """Runs a job; returns its outputs by name, and its hash."""
    words = [
        word.replace("{tasks}", str(inputs / "tasks"))
        .replace("{tasks2}", str(inputs / "tasks2"))
        .replace("{other}", str(inputs / "other.txt"))
        .replace("{third}", str(inputs / "third.txt"))
        for override in overrides
        for word in override.split(" ")
    ]
    *_, chosen = ["eval=perplexity", *(word for word in words if word.startswith("eval="))]
    defaults = [
        f"calibration.path={inputs / 'text.txt'}", "calibration.num_samples=6",
        "calibration.seq_len=16", f"eval.perplexity.path={inputs / 'held_out.txt'}",
        "eval.perplexity.seq_len=32", "eval.perplexity.max_tokens=128",
    ]  # fmt: skip
    settings = job_settings(
        inputs / "base",
        chosen,
        *drop_unused_eval_settings(defaults, chosen.removeprefix("eval=").strip("[]").split(",")),
        *(word for word in words if not word.startswith("eval=")),
    )
    fake_speed.options = None
    result = RUN.run(settings, folder)
    first, *others = result["depths"]
    (*_, merged) = (depth for depth in others if depth["stage"] == "merged")
    last = others[-1]
    plan = json.loads((folder / "plan.json").read_text())
    training = result["distillation"]
    found = {
        "plan": result["plan"],
        "history": result["merge_history"],
        "candidates": [[c["score"] for c in step["candidates"]] for step in plan["steps"]],
        "layers": [d["layers"] for d in result["depths"]],
        "depths": len(result["depths"]),
        "label": result["model"],
        "files": sorted(p.name for p in (folder / merged["folder"]).glob("*.safetensors")),
        "weights": digest(folder / merged["folder"]),
        "dense nll": losses(first),
        "merged nll": losses(merged),
        "eval text": first["metrics"].get("perplexity", {}).get("data", "").partition(" of ")[2],
        "also": [chosen_metrics(d, "perplexity/") for d in result["depths"]],
        "continuations": [chosen_metrics(d, "continuations") for d in result["depths"]],
        "dense agreement": chosen_metrics(first, "agreement"),
        "merged agreement": chosen_metrics(merged, "agreement"),
        "dense answers": chosen_metrics(first, "generation"),
        "merged answers": chosen_metrics(merged, "generation"),
        "speed": fake_speed.options is not None,
        "dense tasks": chosen_metrics(first, "zero_shot"),
        "merged tasks": chosen_metrics(merged, "zero_shot"),
        "dtype": json.loads((folder / merged["folder"] / "config.json").read_text())["dtype"],
        **(fake_speed.options or {}),
    }
    if training:
        found |= {
            "trained": digest(folder / "model"),
            "trained nll": losses(last),
            "curve": training["curve"],
            "validation": training["validation"],
        }
    return found, job_hash(settings)


@pytest.mark.parametrize(
    ("job", "change", "changed"),
    [
        pytest.param(*row, id=f"{row[0][0]}-{row[1].split('{')[0]}-{i}")
        for i, row in enumerate(CHANGES)
    ],
)
def test_setting_changes_only_its_outputs(
    job, change, changed, inputs, baselines, tmp_path, monkeypatch
):
    monkeypatch.setenv("COME_CACHE", str(inputs / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(inputs / "datasets"))
    monkeypatch.setattr("come.report.write.write_report", lambda *args: {})
    monkeypatch.setattr("come.evaluate.speed.compare_speed", fake_speed)
    monkeypatch.setattr(PACKAGES, str)
    if job not in baselines:
        baselines[job] = observe(inputs, tmp_path / "before", job)
    before, before_hash = baselines[job]
    after, after_hash = observe(inputs, tmp_path / "after", (*job, change))
    differs = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    shown = f"{change} changes {', '.join(sorted(differs)) or 'nothing'}"
    assert differs - {"candidates"} == changed - {"candidates"}, shown
    assert "candidates" in differs or "candidates" not in changed
    key = change.lstrip("+").partition("=")[0]
    assert (after_hash != before_hash) == (key not in NOT_HASHED)


def test_every_setting_is_covered():
    """A new setting needs a row above or an entry in TESTED_ELSEWHERE."""
    changed = {row[1].lstrip("+").partition("=")[0] for row in CHANGES}
    changed |= {word.partition("=")[0] for row in CHANGES for word in row[1].split(" ")}
    every = set()
    for group in fields(Settings):
        kind = Settings.__dataclass_fields__[group.name].default_factory
        if hasattr(kind, "__dataclass_fields__"):
            every |= {f"{group.name}.{f.name}" for f in fields(kind)}
    parts = {
        f"merge.{part}.{key}"
        for part, registry in PARTS.items()
        for name in registry.names()
        for key in registry.get(name).settings()
    }
    every |= {
        f"eval.{name}.{key}"
        for name in EVALUATIONS.names()
        for key in EVALUATIONS.get(name).settings()
    }
    assert parts - changed == SCHEDULES_ELSEWHERE
    tops = {".".join(key.split(".")[: 3 if key.startswith("eval") else 2]) for key in changed}
    assert not every - tops - TESTED_ELSEWHERE
    assert not TESTED_ELSEWHERE - every
    assert {"come_sp", "come_mp", "logits", "lora", "none"} == set(DISTILL.names())
    assert Path(RUN.__file__).name == "run.py"


def test_batch_sizes_reach_their_functions(inputs, tmp_path, monkeypatch):
    """Batch sizes hardly change the numbers, so the calls are recorded."""
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(inputs / "datasets"))
    monkeypatch.setattr("come.report.write.write_report", lambda *args: {})
    calls = {}

    def recorded(module, name):
        whole = importlib.import_module(module)
        function = getattr(whole, name)

        def call(*args, **kwargs):
            calls.setdefault(name, []).append((args, kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(whole, name, call)

    recorded("come.job.stages.merge", "compress")
    recorded("come.evaluate.perplexity", "perplexity")
    recorded("come.evaluate.zero_shot", "load_tasks")
    recorded("come.job.stages.distill", "train")
    sizes = (
        "calibration.batch_size=3", "eval.perplexity.batch_tokens=96",
        "eval.zero_shot.batch_size=5", "distill.micro_batch=3", "calibration.store=disk",
    )  # fmt: skip
    observe(inputs, folder := tmp_path / "out", (*HEAL, *ZERO_SHOT[1:], *sizes))
    ((_, merging),) = calls["compress"]
    assert [merging[key] for key in ("batch_size", "store", "folder")] == [3, "disk", folder]
    tokens = [options["batch_tokens"] for _, options in calls["perplexity"]]
    assert tokens == [96, 96, 96]  # dense, merged, trained
    assert calls["load_tasks"][0][1]["batch_size"] == 5
    (((*_, config), training),) = calls["train"]
    found = (config.micro_batch, config.batch_size, config.steps, training["folder"])
    assert found == (3, 4, 4, folder / "distill")
