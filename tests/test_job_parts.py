"""What a job passes to its parts: trackers, the merge, and what is shown and checked."""

import importlib
import threading
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from come.distill.accelerator import make_accelerator
from come.distill.hidden_states import states_by_layer
from come.evaluate.perplexity import HeldOutText
from come.job.folder import exclusive_lock
from come.job.processes import processes
from come.job.run import _trackers
from come.job.run import run as run_settings
from come.merge.method import check_groups, groups_target
from come.models.adapter import ModelAdapter
from tests.conftest import LAYERS, pico
from tests.jobs import QUICK, job_settings, prepare_job, run_job
from tests.test_estimate import SMALL

RUN = importlib.import_module("come.job.run")
MERGE = importlib.import_module("come.job.stages.merge")
DISTILL = ("distill=logits", "distill.tokens=256", "distill.seq_len=16", "distill.batch_size=2")

pytestmark = pytest.mark.usefixtures("private_caches")


class Tracker:
    """Fake tracker that records its arguments and all that it is sent."""

    def __init__(self, *folder, **settings):
        self.settings, self.logged = settings, []

    def log(self, values):
        self.logged.append(values)

    def finish(self, failed=False):
        pass


@pytest.mark.parametrize(("words", "kind", "more"), [
    ((), "compress", []), (DISTILL, "distill", ["logits"]),
    (("merge=none", "merge.target_layers=null"), "evaluate", None),
])  # fmt: skip
def test_run_in_wandb(words, kind, more, base, tmp_path, monkeypatch):
    monkeypatch.setattr("come.tracking.wandb.WandB", Tracker)
    job = prepare_job(
        base, tmp_path / "out", *words, "tracking=wandb", "tracking.project=p", *QUICK
    )
    _, tracker = _trackers(job)._trackers
    given = tracker.settings
    assert (given["run_id"], given["project"], given["mode"]) == (job.hash, "p", "offline")
    assert given["job_type"] == kind
    assert given["config"] == job.settings.record()
    if more is not None:
        assert given["group"] == "base-come"
        assert given["tags"] == ["base", "come", "5 layers", f"m={job.settings.merge.m}", *more]


def test_group_of_trackers(base, tmp_path, monkeypatch):
    monkeypatch.setattr("come.tracking.wandb.WandB", Tracker)
    monkeypatch.setattr("come.tracking.trackio.Trackio", Tracker)
    for backend in ("wandb", "trackio"):
        words = (f"tracking={backend}", "tracking.group=mine")
        job = prepare_job(base, tmp_path / backend, *words, *QUICK)
        assert _trackers(job)._trackers[1].settings["group"] == "mine"


def test_finished_job_is_shown_again(base, tmp_path, monkeypatch):
    result, shown = run_job(base, tmp_path / "out", *QUICK), []
    assert result["machine"].endswith("GB of memory, float32")
    monkeypatch.setattr(RUN, "show", lambda *given: shown.append(given))
    assert run_settings(job_settings(base, *QUICK), tmp_path / "out") == result
    assert shown == [(result, tmp_path / "out")]


def test_memory_is_checked_for_merges_only(base, tmp_path, monkeypatch):
    """A plan is applied, and a merged model measured, in any memory."""
    run_job(base, tmp_path / "out", *QUICK)
    monkeypatch.setattr(RUN, "memory_shortage", lambda *given: "too little")
    with pytest.raises(ValueError, match="too little"):
        run_job(base, tmp_path / "other", "merge.target_layers=4", *QUICK)
    plan = f"merge.plan={tmp_path / 'out' / 'plan.json'}"
    changed = ("merge=from_plan", plan, "merge.target_layers=null")
    assert run_job(base, tmp_path / "plan", *changed, *QUICK)["depths"][-1]["layers"] == 5


def test_what_the_merge_is_given(base, tmp_path, monkeypatch):
    given, compress = {}, MERGE.compress

    def watched(model, windows, settings, **others):
        given.update(others)
        return compress(model, windows, settings, **others)

    monkeypatch.setattr(MERGE, "compress", watched)
    run_job(base, tmp_path / "out", "calibration.batch_size=2", "calibration.store=disk", *QUICK)
    assert (given["batch_size"], given["store"], given["folder"]) == (2, "disk", tmp_path / "out")


def test_logged_step(base, tmp_path):
    run_job(base, tmp_path / "out", *QUICK)
    plan = MERGE.Plan.load(tmp_path / "out" / "plan.json")
    step = replace(plan.steps[0], shares=[0.75, 0.25], first=1, last=2, score=0.5)
    tracker = Tracker()
    MERGE._log_step(tracker, replace(plan, steps=[step]))
    found, *influences = tracker.logged
    assert found == {
        "merge/step": 1, "merge/layers": 5, "merge/first": 1, "merge/last": 2,
        "merge/score": 0.5, "merge/share_first": 0.75,
    }  # fmt: skip
    assert [i["layer/bi"] for i in influences] == step.bi
    assert [i["layer_idx"] for i in influences] == list(range(6))


def test_part_of_a_held_out_text(text_file):
    text = HeldOutText(path=str(text_file), text_range=[0.25, 0.75])
    assert text.held_out("eval.perplexity").part == (0.25, 0.75)
    assert HeldOutText(path=str(text_file)).held_out("eval.perplexity").part is None


def test_groups_start_at_the_first_layer():
    check_groups([[0, 1], [2, 3, 4]])
    with pytest.raises(ValueError, match=r"\[-1, 0\]: a group is adjacent layers"):
        check_groups([[-1, 0]])


def test_groups_end_in_the_model():
    assert groups_target([[0, 1], [3, 4, 5]], 6) == 3
    with pytest.raises(ValueError, match=r"has \[4, 5, 6\], and the model's layers are 0 to 5"):
        groups_target([[4, 5, 6]], 6)


def test_bytes_of_an_inverse():
    assert SMALL.inverse(16).bytes == 8 * 16 * 16
    assert SMALL.inverse(16, 4).bytes == 4 * 16 * 16


def test_hidden_states_from_a_later_layer(windows):
    model = ModelAdapter(pico("llama_gqa"))
    every = states_by_layer(model, windows, last=4, keep=range(5))
    later = states_by_layer(model, windows, last=4, keep=[4], first=3, states=every[2])
    assert torch.equal(later[4], every[4])
    assert torch.equal(later[2], every[2])


def test_mixed_precision_by_the_setting():
    assert make_accelerator("cpu", "bfloat16").mixed_precision == "bf16"
    assert make_accelerator("cpu", "float32").mixed_precision == "no"


def test_one_process_trains_layers(pico_folder):
    assert processes(job_settings(pico_folder, "distill=come_mp")).num_processes == 1


def test_job_says_that_it_waits_for_another_one_in_its_folder(tmp_path, caplog):
    entered = threading.Event()
    caplog.set_level("INFO", "come.job.folder")

    def other():
        with exclusive_lock(tmp_path):
            entered.set()

    waiting = threading.Thread(target=other, daemon=True)
    with exclusive_lock(tmp_path):
        waiting.start()
        end = time.monotonic() + 5
        while "another process runs this job" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
        assert str(tmp_path) in caplog.text
        assert not entered.is_set()
    assert entered.wait(5)


def test_worker_checks_memory_with_the_placement_of_the_main_process(base, tmp_path, monkeypatch):
    settings = job_settings(base, "merge.target_layers=5", *QUICK)
    model = replace(settings.model, weights="disk")
    calibration = replace(settings.calibration, batch_size=2)
    sent, given = iter([[True], [True, model, calibration]]), []

    def shortage(*arguments):
        given.append(arguments)
        return "too little"

    monkeypatch.setattr(RUN, "broadcast_object_list", lambda values: next(sent))
    monkeypatch.setattr(RUN, "memory_shortage", shortage)
    with pytest.raises(ValueError, match="too little"):
        RUN._run_worker(settings, tmp_path / "out", "sweep", Accelerator(cpu=True))
    ((placed, shape, target),) = given
    assert (placed.model, placed.calibration) == (model, calibration)
    assert (shape.num_layers, target) == (LAYERS, 5)
