"""Merges shared by two processes: windows and trials are split, and the plan is that of one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from come.merge.input_map import InputMap
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.reconstruction import ReconstructionTargets
from come.models.adapter import ModelAdapter
from come.models.loading import load_weights
from come.models.sublayers import states_after
from come.stream.processes import SINGLE, Processes
from come.stream.stream import LayerStream
from tests.commands import ROOT, communicate, small_job_overrides, without_repeated
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.forkserver import FORKSERVER
from tests.jobs import job_settings
from tests.methods import come_plus, paper, recipe

CASES = {
    "come_plus": ("llama_gqa", come_plus, {}),
    "biases": ("opt", come_plus, {}),
    "auto": ("llama_gqa", lambda: come_plus(refit="ridge", refit__lambda="auto", m=2), {}),
    "downstream": ("qwen3_gqa", lambda: come_plus(downstream=0.1, m=2), {}),
    "adam": ("llama_gqa", lambda: come_plus(refit={"name": "adam", "steps": 5}, m=2), {}),
    "replaceme": ("llama_gqa", lambda: recipe("replaceme"), {}),
    "paper": ("llama_bias", paper, {}),
    "losses": ("llama_gqa", lambda: paper(selection="skip_loss"), {}),
    "locality": ("llama_gqa", lambda: recipe("lorp"), {}),
    "pairs": ("llama_gqa", lambda: recipe("pairwise"), {}),
    "flap": ("opt", lambda: recipe("flap", width_multiple=8), {"target": LAYERS}),
    "sublayers": ("llama_gqa", lambda: recipe("subfit"), {}),
    "gradients": ("llama_gqa", lambda: recipe("taylor"), {}),
    "attention": ("llama_gqa", lambda: paper(operator="drop", sublayers=["attention"]), {}),
    "ffn": ("llama_gqa", lambda: paper(operator="drop", sublayers=["ffn"]), {}),
    "one batch": ("llama_gqa", lambda: come_plus(m=2), {"batch_size": 16}),
    "one batch of attention": (
        "llama_gqa",
        lambda: paper(operator="drop", sublayers=["attention"]),
        {"batch_size": 16},
    ),
    "fit in trials": ("llama_gqa", lambda: come_plus(selection="refit_error", m=2), {}),
    "dual form": ("llama_bias", come_plus, {"windows": (2, 8), "batch_size": 1, "atol": 1e-3}),
    "stops": ("llama_gqa", lambda: come_plus(downstream=0.1, m=2), {"stops": (LAYERS - 1,)}),
    "disk": ("llama_gqa", lambda: come_plus(m=2), {"checkpoint": "pico"}),
}


def merged(case, processes, folder):
    """The plan of a case, and the layer passes of this process."""
    family, method, options = CASES[case]
    size = options.get("windows", (9, SEQ))
    windows = torch.randint(3, VOCAB, size, generator=torch.Generator().manual_seed(7))
    model = pico(family)
    if checkpoint := options.get("checkpoint"):
        model = load_weights(folder.parent / checkpoint, dtype="float32", weights="disk")
    passes = 0.0
    exit_ = LayerStream.__exit__

    def leave(stream, *error):
        nonlocal passes
        passes = stream.layer_passes
        exit_(stream, *error)

    LayerStream.__exit__ = leave
    try:
        plan = compress(
            model, windows, method(), target_layers=options.get("target", LAYERS - 2),
            progress=False, batch_size=options.get("batch_size", 2), folder=folder,
            processes=processes, stops=options.get("stops", ()),
        )  # fmt: skip
    finally:
        LayerStream.__exit__ = exit_
    return plan, passes


def error_of_a_step(processes, folder):
    """The error over all windows of a layer with a changed up projection."""
    adapter = ModelAdapter(pico("llama_gqa"))
    windows = torch.randint(3, VOCAB, (9, SEQ), generator=torch.Generator().manual_seed(7))
    with LayerStream(
        adapter, windows, batch_size=2, folder=folder, progress=False, processes=processes
    ) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        stream.snapshot_dense()
        targets = ReconstructionTargets(stream, 2, 3, original=3)
        layer, layout = adapter.copy_layer(2, adapter.layer_state(2)), targets.layout
        attention, ffn = layout.sublayer("attention"), layout.sublayer("ffn")
        up = next(gate for gate in ffn.gates if gate.name == "mlp.up_proj")
        with stream.scratch_boundary("refit") as post_attention:
            for batch in targets:
                keywords = stream.keywords(len(batch.states), 2)
                states = states_after(layer, layout, attention, batch.states, keywords)
                post_attention[batch.rows] = states
            problem = InputMap(targets, layer, ffn, (post_attention, post_attention), up)
            return problem.error(torch.full_like(problem.weight, 0.01))


def run_cases(rank, folder):
    """The work of each of two processes: all cases in sequence."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    processes, passes = Processes.launched(), {}
    for case in CASES:
        plan, passes[case] = merged(case, processes, folder / case)
        (folder / f"{case}-{rank}").mkdir()
        plan.save(folder / f"{case}-{rank}" / "plan.json")
        processes.barrier()
        left = [path.name for path in (folder / case).rglob("*") if path.is_file()]
        assert not left, left
    found = {
        "passes": passes,
        "shards": [list(processes.shard(range(size))) for size in (0, 1, 5)],
        "mapped": processes.map([1, 2, 3], lambda own: [10.0 * rank + i for i in own]),
        "error": error_of_a_step(processes, folder / "error"),
        "broadcast": processes.broadcast(rank),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Runs all cases in two processes; returns the folder with their plans."""
    folder = tmp_path_factory.mktemp("two_processes")
    pico("llama_gqa").save_pretrained(folder / "pico")
    started = [FORKSERVER.Process(target=run_cases, args=(rank, folder)) for rank in (0, 1)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(300)
    finally:
        for process in started:
            process.kill()
    assert [process.exitcode for process in started] == [0, 0]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_plan_of_one(case, two_processes):
    single, passes = merged(case, SINGLE, two_processes / "single")
    plans = [Plan.load(two_processes / f"{case}-{rank}" / "plan.json") for rank in (0, 1)]
    assert plans[0].hash == plans[1].hash
    atol = CASES[case][2].get("atol", 1e-4)  # a fit on few tokens is less stable
    drops = [plan.dropped and plan.dropped.decisions for plan in (single, plans[0])]
    assert drops[0] == drops[1]
    assert single.steps or drops[0]
    for one, two in zip(single.steps, plans[0].steps, strict=True):
        assert (one.first, one.last, one.kept) == (two.first, two.last, two.kept)
        assert two.bi == pytest.approx(one.bi, rel=1e-5, abs=1e-7)
        assert two.score == pytest.approx(one.score, rel=1e-4, abs=1e-6)
        assert one.solved.tensors.keys() == two.solved.tensors.keys()
        for name, tensor in one.solved.tensors.items():
            torch.testing.assert_close(two.solved.tensors[name], tensor, rtol=1e-3, atol=atol)
    assert single.downstream.tensors.keys() == plans[0].downstream.tensors.keys()
    for name, tensor in single.downstream.tensors.items():
        torch.testing.assert_close(plans[0].downstream.tensors[name], tensor, rtol=1e-3, atol=1e-4)
    shared = [
        json.loads((two_processes / f"{rank}.json").read_text())["passes"][case] for rank in (0, 1)
    ]
    assert plans[0].provenance["layer_passes"] == pytest.approx(sum(shared), abs=1.1)
    if case in ("come_plus", "biases", "paper"):  # only the validation windows are computed twice
        assert sum(shared) < 1.25 * passes
        assert max(shared) < 0.75 * passes


def test_shard_map_and_broadcast(two_processes):
    found = [json.loads((two_processes / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [f["shards"] for f in found] == [[[], [], [0, 1]], [[], [0], [2, 3, 4]]]
    assert [f["mapped"] for f in found] == [[1.0, 12.0, 3.0]] * 2
    assert [f["broadcast"] for f in found] == [0, 0]
    error = error_of_a_step(SINGLE, None)
    assert [f["error"] for f in found] == [pytest.approx(error, rel=1e-5)] * 2


def test_single_process():
    tensor = torch.ones(2)
    SINGLE.all_reduce(tensor)
    assert tensor.tolist() == [1, 1]
    assert SINGLE.shard([1, 2]) == [1, 2]
    assert SINGLE.map([], lambda own: [1 / 0]) == []
    assert (SINGLE.reduced(2), SINGLE.broadcast("a"), SINGLE.is_main) == (2, "a", True)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["merge=none"], {}, "neither merges nor trains"),
        ([], {"LOCAL_WORLD_SIZE": "1"}, "needs all on one machine"),
        (["distill=come_mp"], {}, "is for one"),
        (["calibration.store=memory"], {}, "share the hidden states in files; leave it out"),
        (["distill=come_sp", "distill.batch_size=3", "distill.micro_batch=1"], {}, "multiple of"),
    ],
)
def test_jobs_that_need_one_process(words, environment, message, pico_folder, monkeypatch):
    from come.job.processes import processes

    class TwoProcesses:
        num_processes = 2

    monkeypatch.setattr("come.job.processes.make_accelerator", lambda *args: TwoProcesses)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes(job_settings(pico_folder, *words))


def test_device_index_is_rejected_with_several_processes(pico_folder, monkeypatch):
    from come.job.processes import processes

    class TwoProcesses:
        num_processes = 2

    monkeypatch.setattr("come.job.processes.make_accelerator", lambda *args: TwoProcesses)
    monkeypatch.setattr("come.job.processes.choose_device", lambda name: torch.device("cpu"))
    settings = job_settings(pico_folder)
    settings = replace(settings, model=replace(settings.model, device="cuda:1"))
    with pytest.raises(ValueError, match="choose with CUDA_VISIBLE_DEVICES"):
        processes(settings)


def test_job_hash_covers_the_number_of_processes(pico_folder, monkeypatch):
    from come.job.identity import job_hash

    settings = job_settings(pico_folder)
    one = job_hash(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert job_hash(settings) != one


@pytest.mark.slow
def test_killed_distributed_run_resumes(command, pico_folder, tmp_path):
    single, double = tmp_path / "single", tmp_path / "double"
    settings = ["merge=come_plus", "merge.target_layers=20", "eval=perplexity"]
    code, _, errors = communicate(command(*settings, f"hydra.run.dir={single}"))
    assert code == 0, errors
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    small = without_repeated(small_job_overrides(*settings), settings)
    words = [f"model.path={pico_folder}", "model=local", *small, *settings]

    def start():
        return subprocess.Popen(
            [*launch, str(ROOT / "run.py"), *words, f"hydra.run.dir={double}"],
            cwd=tmp_path,
            env=os.environ | {"COME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    process, deadline = start(), time.monotonic() + 180
    while not (double / "plan.partial.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.send_signal(signal.SIGKILL)
    process.wait()
    assert not (double / "result.json").exists()
    code, output, errors = communicate(start())
    assert code == 0, errors
    assert "resuming at" in output
    results = [json.loads((folder / "result.json").read_text()) for folder in (single, double)]
    assert results[0]["merge_history"] == results[1]["merge_history"]
    values = [result["depths"][-1]["metrics"]["perplexity"]["value"] for result in results]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert sorted(path.name for path in double.iterdir()) == sorted(
        p.name for p in single.iterdir()
    )
