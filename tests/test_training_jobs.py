"""Jobs that train the merged layers: their numbers, precision, texts, and earlier merges."""

import importlib
import json
import time

import pytest
import torch
from transformers import PreTrainedModel

from come.distill.objectives.come_sp import MatchedStates
from come.files import read_again
from come.job.job import Job
from come.merge.plan import Plan
from come.records import CompressionResult
from tests.bases import save_base
from tests.commands import same_checkpoint
from tests.jobs import QUICK, prepare_job, run_job
from tests.test_stages import STAGE, Interrupt
from tests.test_wiring_parts import HEAL

pytestmark = pytest.mark.usefixtures("private_caches")


def test_run_from_a_trained_model(base, tmp_path):
    """Its weights are measured, not those that its plan gives."""
    out, again = tmp_path / "out", tmp_path / "again"
    first = run_job(base, out, *HEAL, "distill.validate_every=1", *QUICK)
    second = run_job(base, again, f"from_run={out}", "merge.target_layers=null", *QUICK)
    assert first["distillation"]["best_step"] > 0
    assert same_checkpoint(again / "model", out / "model")
    assert not same_checkpoint(again / "model", out / "model-merged")
    assert second["calibration"] == first["calibration"]


@pytest.mark.parametrize("method", ["come_sp", "come_mp"])
def test_numbers_of_a_training(method, base, tmp_path):
    began = time.perf_counter()
    words = ("distill.validation_samples=3", "distill.validate_every=2", *QUICK)
    result = run_job(base, tmp_path / "out", *HEAL, f"distill={method}", *words)
    found, (dense, merged, _) = result["distillation"], result["depths"]
    assert (found["steps"], found["tokens"], found["validation_tokens"]) == (4, 256, 48)
    assert [tokens for tokens, _ in found["curve"]] == [64, 128, 192, 256]
    assert [row["tokens"] for row in found["validation"]] == [0, 128, 256]
    best = min(found["validation"], key=lambda row: row["loss"])
    assert found["best_step"] * 64 == best["tokens"]
    assert 0 < found["seconds"] < time.perf_counter() - began
    assert found["tokens_per_second"] == pytest.approx(256 / found["seconds"])
    both = dense["parameters"] + merged["parameters"]
    size = both if method == "come_sp" else found["trained_parameters"]
    assert found["weight_bytes"] == 4 * size
    assert not (tmp_path / "out" / "distill").exists()
    summary = Plan.load(tmp_path / "out" / "plan.json").provenance["distillation"]
    assert (summary["steps"], summary["tokens"]) == (4, 256)


def test_distillation_of_an_earlier_merge(base, tmp_path):
    for name, more in ("layer", ()), ("ffn", ("merge.sublayers=[ffn]",)):
        run_job(base, tmp_path / name, "eval=none", *more)

    def words(name):
        return (*HEAL, f"from_run={tmp_path / name}", "merge.target_layers=null", "eval=none")

    result = run_job(base, tmp_path / "out", *words("layer"))
    assert [depth["stage"] for depth in result["depths"]] == ["dense", "merged", "distilled"]
    assert result["compression"] == {
        "seconds": 0, "peak_bytes": 0, "boundary_bytes": 0, "layer_passes": 0, "resumed_at": 1,
        "weight_bytes": 4 * result["depths"][0]["parameters"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="merges the ffn blocks"):
        prepare_job(base, tmp_path / "no", *words("ffn"))


def test_training_is_in_single_precision(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa", dtype=torch.bfloat16)
    found = run_job(base, tmp_path / "out", *HEAL, *QUICK, drawn=True)["distillation"]
    assert found["gradient_bytes"] == 4 * found["trained_parameters"]
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000


def test_training_text_is_sampled_for_every_step(base, tmp_path):
    sampled = ("calibration=self_generated", "calibration.path=null")
    words = (*HEAL, *sampled, "distill.validation_samples=4", *QUICK)
    found = run_job(base, tmp_path / "out", *words)["distillation"]
    assert found["distinct_tokens"] == 256


def test_seed_draws_the_training_windows(base, tmp_path):
    one, two = (
        prepare_job(base, tmp_path / "out", *HEAL, f"distill.seed={seed}").training.windows
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)


def test_interrupted_distillation_reuses_only_its_own_merge(base, tmp_path):
    stage, whole = importlib.import_module("come.job.stages.distill"), STAGE.compress

    def stop(*args, **kwargs):
        raise Interrupt

    def counted(calls):
        return lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs)

    for again, merges in ((), 0), (("calibration.seed=1",), 1):
        calls, folder = [], tmp_path / str(merges)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "train", stop)
            with pytest.raises(Interrupt):
                run_job(base, folder, *HEAL, *QUICK)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(STAGE, "compress", counted(calls))
            result = run_job(base, folder, *HEAL, *QUICK, *again)
        assert len(calls) == merges
        assert result["compression"]["seconds"] > 0


def test_damaged_cost_of_the_merge_does_not_stop_a_resumed_distillation(base, tmp_path):
    stage = importlib.import_module("come.job.stages.distill")

    def stop(*args, **kwargs):
        raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train", stop)
        with pytest.raises(Interrupt):
            run_job(base, tmp_path, *HEAL, *QUICK)
    assert json.loads((tmp_path / STAGE.COST).read_text())["seconds"] > 0
    (tmp_path / STAGE.COST).write_text("{")
    result = run_job(base, tmp_path, *HEAL, *QUICK)
    assert result["compression"]["seconds"] == 0
    assert result["distillation"]["steps"] > 0


def test_cost_of_the_merge_is_read_field_by_field(tmp_path):
    path, cost = tmp_path / STAGE.COST, dict.fromkeys(CompressionResult.__annotations__, 3)
    path.write_text(json.dumps(cost))
    assert read_again(path, STAGE._read_cost) == cost
    for changed in ({"a": 1}, cost | {"seconds": "soon"}, cost | {"weight_bytes": [1]}):
        path.write_text(json.dumps(changed))
        assert read_again(path, STAGE._read_cost) is None


@pytest.mark.parametrize("teacher", ["stored", "live"])
def test_student_leaves_the_device_to_a_teacher_whose_states_are_stored(base, tmp_path, teacher):
    seen = []

    def noted(patch, owner, name):
        whole = getattr(owner, name)

        def call(*args, **kwargs):
            seen.append(name)
            return whole(*args, **kwargs)

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch:
        noted(patch, Job, "load")
        noted(patch, PreTrainedModel, "cpu")
        for name in ("release_teacher", "to"):
            noted(patch, MatchedStates, name)
        run_job(base, tmp_path, *HEAL, f"distill.teacher={teacher}", "eval=none")
    if teacher == "stored":
        assert seen[:5] == ["load", "cpu", "load", "release_teacher", "to"]
    else:
        assert seen[:2] == ["load", "load"]
        assert not {"cpu", "release_teacher"} & set(seen)


def test_texts_of_an_earlier_run_stay_apart(base, tmp_path):
    """Those of its calibration and training, also where only its model folder is evaluated."""
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    for path, word in ((text, "one"), (other, "two")):
        path.write_text("".join(f"Line {i} of {word} text.\n" for i in range(400)))
    own = ("eval=perplexity", "eval.perplexity.seq_len=16")
    merged, trained = tmp_path / "merged", tmp_path / "trained"
    run_job(base, merged, f"calibration.path={text}", *own, f"eval.perplexity.path={text}")
    start = ("merge.target_layers=null", f"from_run={merged}")
    run_job(base, trained, *HEAL, f"distill.path={other}", *start, "eval=none")
    again = ("merge.target_layers=null", f"from_run={trained}")
    run_job(base, tmp_path / "twice", *HEAL, "distill.source=pydocs", *again, "eval=none")

    def windows(folder, path, *more):
        begin = ("merge.target_layers=null", f"from_run={folder}")
        words = (*own, f"eval.perplexity.path={path}", *more)
        return prepare_job(base, tmp_path / "again", *begin, *words).evaluations["perplexity"][1][
            ""
        ]

    last_fifth = windows(merged, text, "eval.perplexity.text_range=[0.8,1]")
    for folder in (merged, trained):
        assert torch.equal(windows(folder, text).windows, last_fifth.windows)
    assert windows(merged, other).corpus_tokens > 4 * last_fifth.corpus_tokens
    with pytest.raises(ValueError, match="eval.perplexity.text_range=.*draws from the first 60%"):
        windows(merged, text, "eval.perplexity.text_range=[0.5,1]")
    for folder in (trained, tmp_path / "twice"):
        with pytest.raises(ValueError, match="eval.perplexity: the model was calibrated"):
            windows(folder, other)
    words = ("merge=none", *own, f"eval.perplexity.path={other}")
    with pytest.raises(ValueError, match="so no part of it is unseen. Take another text, or"):
        prepare_job(trained / "model", tmp_path / "folder", *words)
