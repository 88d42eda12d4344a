"""Composition and validation of every config file, and job hashes."""

from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from come.cli import CONF
from come.job.folder import check_folder, finished_result, write_result
from come.job.identity import job_hash
from come.job.sampled_text import sampled, with_samples
from come.job.stages.prepare import _check_configuration, prepare
from come.merge.method import Method
from come.merge.operators.base import OPERATORS
from come.report.numbers import title
from come.schema.explicit import check_explicit, method_changes
from tests.jobs import job_settings, prepare_job, settings
from tests.methods import come_plus

GROUPS = {g.name: sorted(p.stem for p in g.glob("*.yaml")) for g in CONF.iterdir() if g.is_dir()}
MODELS = (
    "smollm2_135m llama2_7b llama2_13b llama3_8b vicuna7b mistral7b qwen2_5_7b qwen3_4b "
    "opt_6_7b local"
)
SOURCES = "pydocs wikitext2 c4 pg19 bookcorpus alpaca mmlu text_file self_generated"


def checked(*overrides):
    composed = settings(*overrides)
    composed.check()
    check_explicit(composed, overrides)


def test_documented_configs_exist():
    assert set(MODELS.split()) <= set(GROUPS["model"])
    assert set(SOURCES.split()) <= set(GROUPS["calibration"])
    assert {"come", "average", "from_plan"} <= set(GROUPS["merge"])


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in GROUPS.items() for n in names])
def test_every_yaml_composes(group, name, text_file):
    needs = {
        ("model", "local"): ["model.path=folder"],
        ("calibration", "text_file"): [f"calibration.path={text_file}"],
        ("merge", "from_plan"): ["merge.plan=plan.json"],
        ("experiment", "choices"): [f"calibration.path={text_file}"],
        ("experiment", "families"): [
            "model.path=folder",
            f"calibration.path={text_file}",
            f"eval.perplexity.path={text_file}",
        ],
        ("ablation", "continued"): ["calibration=pydocs"],
        ("eval", "generation"): ["eval.generation.include_path=folder"],
        ("export", "gguf"): [f"export.converter={text_file}"],
    }
    composed = settings(f"{group}={name}", *needs.get((group, name), []))
    composed.check()
    if group == "merge":
        assert composed.merge.name == name
        assert composed.merge.operator.name in OPERATORS.names()
    if group == "experiment" and name not in ("main", "smoke"):  # tables have one dtype everywhere
        model = {"families": "local", "gemma": "gemma3_270m"}.get(name, "smollm2_135m")
        assert (composed.model.name, composed.model.dtype) == (model, "float32")
    first = (CONF / group / f"{name}.yaml").read_text()
    assert f"python run.py {group}={name}" in first or "python run.py\n" in first


def test_default_is_come_plus_on_smollm2():
    default = settings()
    assert default.model.name == "smollm2_135m"
    assert (default.merge.name, default.merge.target_layers, default.merge.sparsity) == (
        "come_plus",
        None,
        None,
    )
    own = Method.record(default.merge)
    assert own == come_plus(repeat_weight=0.2).record()
    assert Method().record() == come_plus().record()


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [
        ([], 0.2),
        (["calibration=pydocs"], 0.0),
        (["calibration=pydocs", "calibration.num_continuations=4"], 0.2),
        (["merge.selection.repeat_weight=0.5"], 0.5),
    ],
)
def test_repeat_weight_defaults_to_model_generated_text(overrides, weight):
    assert settings(*overrides).merge.selection.repeat_weight == weight


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("merge.mm=2", "mm"),
        ("merge.m=two", "two"),
        ("merge=kome", "kome"),
        ("calibration.num_samples=[1]", "num_samples"),
    ],
)
def test_typos_fail_at_composition(override, message):
    with pytest.raises((HydraException, OmegaConfBaseException), match=message):
        settings(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge.sparsity=0"], "merge.sparsity=0.0: must be a number above 0"),
        (["merge.sparsity=1.2"], "merge.sparsity=1.2"),
        (["merge.sparsity=0.1", "merge.target_layers=27"], "both merge.target_layers=27 and"),
        (["merge.target_layers=0"], "merge.target_layers=0: must be a whole number"),
        (["merge=from_plan", "merge.plan=x", "merge.sparsity=0.1"], "no effect with merge.plan"),
        (
            ["calibration.num_samples=0"],
            "calibration.num_samples=0: must be",
        ),
        (["calibration.seq_len=1"], "calibration.seq_len=1: must be"),
        (
            ["calibration.top_p=0"],
            "top_p=0.0: must be a number above 0 and of at most 1",
        ),
        (
            ["calibration.num_continuations=3", "calibration.prefix_tokens=0"],
            "calibration.prefix_tokens=0: must be",
        ),
        (["calibration=self_generated", "calibration.num_continuations=1"], "continues real text"),
        (["calibration.temperature=0"], "calibration.temperature=0.0"),
        (["calibration.store=tape"], "calibration.store='tape': must be one of auto, memory, disk"),
        (["calibration.source=pydoc"], "did you mean 'pydocs'"),
        (["calibration=mmlu", "calibration.path=x.txt"], "is for calibration=text_file"),
        (["calibration=text_file", "calibration.path=/no/file.txt"], "does not exist"),
        (["eval.perplexity.path=/no/file.txt"], "does not exist"),
        (["eval.speed.repeats=0"], "eval.speed.repeats=0"),
        (["tracking.backend=mlflow"], "tracking.backend='mlflow': must be one of none, wandb"),
        (["tracking.mode=maybe"], "must be one of online, offline"),
        (["distill.method=sp"], "distill.method='sp': unknown distillation"),
        (["distill=come_sp", "distill.loss=mean"], "distill.loss='mean': allowed are kl, mse"),
        (["distill=come_sp", "distill.workers=2"], "distill.workers=2 is for distill=come_mp"),
        (["distill=lora", "merge.save_at=[22,21]"], "one depth is distilled at a time"),
        (["distill=lora", "distill.batch_size=0"], "distill.batch_size=0: must be"),
        (["distill=lora", "distill.path=/no/text.txt"], "/no/text.txt"),
        (
            ["distill=come_sp", "merge=come", "merge.sublayers=[ffn]"],
            "distillation trains whole layers",
        ),
        (
            ["from_run=x", "merge.target_layers=20"],
            "merge.target_layers has no effect with from_run",
        ),
        (["from_run=x", "merge=sleb"], "merge has no effect with from_run"),
        (["from_run=x", "merge.m=3"], "merge.m has no effect with from_run"),
        (["merge.sensitivity=wanda"], "adaptive, which does not use sensitivities"),
        (
            ["merge.sensitivity=come"],
            "sensitivity has no effect with merge.retention=ada",
        ),
        (["merge=shortgpt", "merge.retention.p=2"], "retention.p has no effect with .*=drop"),
        (["merge=uidl", "merge.m=2"], "merge.m has no effect with .*=block"),
        (["distill.tokens=5"], "distill.tokens has no effect with distill=none"),
        (
            ["+eval.perplexity.extra_texts={a:{source:no}}"],
            "eval.perplexity.extra_texts.a.source='no': unknown",
        ),
        (["tracking=trackio", "tracking.mode=online"], "tracking.mode=online is for tracking=wan"),
        (
            ["merge=shortgpt", "merge.sensitivity=taylor"],
            "taylor has no effect with merge.operator=drop",
        ),
        (["merge=none", "merge.m=3"], "merge.m has no effect with merge=none"),
        (["merge=none", "distill=come_sp"], "distill=come_sp trains merged layers"),
        (
            ["+eval.perplexity.extra_texts={a:{file:x}}"],
            "eval.perplexity.extra_texts.a.file: no such setting; a text has source, path",
        ),
        (["eval=zero_shot", "eval.zero_shot.tasks=[]"], "names no task"),
        (["eval=zero_shot", "eval.zero_shot.tasks=[a,a]"], "names a task twice"),
        (
            ["+eval.perplexity.extra_texts={a:{max_tokens:3}}"],
            "eval.perplexity.extra_texts.a.max_tokens=3: must be",
        ),
        (
            ["merge=from_plan", "merge.plan=x", "merge.refit=ridge"],
            "merge.refit has no effect with merge.plan",
        ),
        (["eval.perplexity.text_range=[0.8]"], r"eval.perplexity.text_range=\[0.8\]: two shares"),
        (
            ["eval.perplexity.text_range=[0.8,0.6]"],
            "two shares of the text, the first below the second",
        ),
        (
            ["+eval.perplexity.extra_texts={a:{text_range:[0.5,2]}}"],
            r"eval.perplexity.extra_texts.a.text_range=\[0.5, 2\]: two shares",
        ),
        (["model.device=tpux"], "model.device=tpux"),
        (["model.dtype=float8"], "model.dtype='float8'"),
        (["export.types=[f16]"], "export.types has no effect with export=none"),
        (["hub.private=false"], "hub.private has no effect with hub.push=null"),
        (["eval.perplexity.max_tokens=-5"], "eval.perplexity.max_tokens=-5"),
    ],
)
def test_invalid_settings_and_combinations(overrides, message):
    with pytest.raises(ValueError, match=message):
        checked(*overrides)


def test_job_hash_covers_what_determines_the_result(pico_folder, text_file, tmp_path, monkeypatch):
    local = ["model=local", f"model.path={pico_folder}", "merge=come"]
    base = job_hash(settings(*local))
    for same in (
        "calibration.store=disk",
        "tracking=wandb",
        "model.name=other",
        "model.base_model=me/mine",
        "hub.push=me/mine",
        "export.format=gguf",
    ):
        assert job_hash(settings(*local, same)) == base, same
    for other in (
        "merge.m=3",
        "merge.retention.p=2",
        "merge.norms=fold",
        "calibration.seed=1",
        "calibration.num_samples=8",
        "eval.perplexity.seq_len=64",
        "model.dtype=bfloat16",
        "merge.save_at=[20]",
        f"eval.perplexity.path={text_file}",
        "calibration=pydocs",
        "calibration.batch_size=2",
        "eval.perplexity.batch_tokens=512",
        "eval=zero_shot",
        "eval.speed.repeats=2",
        "distill=come_sp",
    ):
        assert job_hash(settings(*local, other)) != base, other
    for name, other in (
        ("come.job.identity.package_hash", lambda: "other code"),
        ("come.job.identity.version", lambda package: "other version"),
        ("come.job.identity.choose_device", lambda name: torch.device("cuda")),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(name, other)
            assert job_hash(settings(*local)) != base, name
    assert job_hash(settings(*local, "model.device=cpu")) == base
    copied = tmp_path / "elsewhere.txt"
    copied.write_text(text_file.read_text())
    paths = [
        job_hash(settings(*local, f"eval.perplexity.path={path}")) for path in (text_file, copied)
    ]
    assert paths[0] == paths[1]
    copied.write_text(text_file.read_text() + "x")
    assert job_hash(settings(*local, f"eval.perplexity.path={copied}")) != paths[0]


def test_job_hash_covers_the_training_text(pico_folder, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "x")
    jobs = [
        [],  # sampled, as calibration
        [f"distill.path={text_file}"],
        [f"distill.path={other}"],
        ["distill.learning_rate=2e-3"],
        ["calibration.top_p=0.5"],
        ["calibration=pydocs"],
    ]
    local = ["model=local", f"model.path={pico_folder}", "distill=come_sp"]
    hashes = [job_hash(settings(*local, *job)) for job in jobs]
    assert len(set(hashes)) == len(jobs)
    assert (
        job_hash(settings(*local, "distill.workers=1", "distill.checkpoint_every=3")) == hashes[0]
    )


def test_validation_windows_are_not_calibration_windows(pico_folder, tmp_path):
    local = ["model=local", f"model.path={pico_folder}", "distill=come_sp", "distill.tokens=8192"]
    words = ["merge.target_layers=22", "eval=none", "calibration=pydocs"]
    job = prepare(settings(*local, *words), tmp_path, "job")
    assert job.calibration is not None
    assert job.training is not None
    calibrated = job.calibration.windows.tolist()
    held_out = job.training.windows[: job.settings.distill.validation_samples].tolist()
    assert len(held_out) == 16
    assert not [row for row in held_out if row in calibrated]


def test_sampled_training_text_differs_from_calibration(pico_folder, tmp_path):
    words = ["distill.tokens=64", "distill.seq_len=16", "distill.batch_size=2", "eval=none"]
    sizes = ["calibration.num_samples=32", "calibration.seq_len=16", "merge.target_layers=22"]
    local = ["model=local", f"model.path={pico_folder}", "distill=come_sp"]
    job = prepare(settings(*local, *words, *sizes), tmp_path, "job")
    model = job.load()
    calibrated = with_samples(job, model).windows.tolist()
    trained = sampled(job, model, 16).windows.tolist()
    assert len(trained) == 16 + job.settings.distill.validation_samples
    assert not [row for row in trained if row in calibrated]


def test_finished_result_rejects_another_job(tmp_path):
    assert finished_result(tmp_path, "abc") is None
    result = {"job": "abc", "settings": {"merge": {"save_weights": False}}, "depths": [{}]}
    write_result(tmp_path, result)
    assert finished_result(tmp_path, "abc") == result
    with pytest.raises(ValueError, match=r"holds the result of another job \(abc, this is def\)"):
        finished_result(tmp_path, "def")


def test_context_of_a_model_is_checked_from_its_configuration(pico_folder):
    """Before transformers is imported."""
    short, long = (
        job_settings(pico_folder, "merge.target_layers=23", f"calibration.seq_len={length}")
        for length in (512, 513)
    )
    _check_configuration(short, pico_folder)
    with pytest.raises(ValueError, match="calibration.seq_len=513: the model reads at most 512"):
        _check_configuration(long, pico_folder)


def test_unwritable_or_full_output_folder(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*hydra.run.dir=FOLDER"):
        check_folder(blocked / "run", 1)
    with pytest.raises(ValueError, match=r"GB free, and the run writes about"):
        check_folder(tmp_path, 10**18)
    with pytest.raises(ValueError, match=r", or merge.schedule.candidate_sets=1, .* 0\.70 GB less"):
        check_folder(tmp_path, 10**18, trials=7 * 10**8)
    assert list(Path(tmp_path).iterdir()) == [blocked]


def test_trial_layers_count_as_disk(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Disk", (), {"free": 100})())
    for sets, more in ((4, True), (1, False)):
        words = ["merge.target_layers=4", f"merge.schedule.candidate_sets={sets}"]
        with pytest.raises(ValueError, match="GB free") as error:
            prepare_job(base, tmp_path / "out", "merge=come_plus", *words)
        assert ("GB less" in str(error.value)) is more


def test_trial_layers_of_an_earlier_session_count_as_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Disk", (), {"free": 100})())
    with pytest.raises(ValueError, match="GB free"):
        check_folder(tmp_path, 150)
    layers = tmp_path / "trial-layers-job-model"
    layers.mkdir()
    (layers / "2-3-2.safetensors").write_bytes(bytes(50))
    check_folder(tmp_path, 150)


def test_title_lists_changes_to_the_method():
    changes = method_changes(
        ["merge=come", "merge/refit=ridge", "merge.m=3", "merge.target_layers=20", "eval=none"]
    )
    assert changes == ["refit=ridge", "m=3"]
    result = {"model": "small", "method": "come", "changes": changes}
    assert title(result) == "small, come with refit=ridge, m=3"
    assert title(result | {"changes": []}) == "small, come"
