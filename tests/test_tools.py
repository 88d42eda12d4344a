"""experiments/tools: the protocol, the verdicts and the driver, with fake tools."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT

HERE = ROOT / "experiments" / "tools"
PROBE = {
    "folder": "model", "prompts": ["a", "b"], "prompt_ids": [[1], [2]], "texts": ["t"],
    "windows": [[0, 1, 2]], "new_tokens": 2, "tokens": [[5, 6], [7, 8]],
    "continuations": ["five six", "seven eight"], "perplexity": 10.0, "hash": "h",
}  # fmt: skip
RIGHT = 'tokens=[[5, 6], [7, 8]], perplexity=10.0'  # fmt: skip
SCRIPT = """
import sys
sys.path.insert(0, {readers!r})
from protocol import Request
request = Request.read()
with open({count!r}, "a") as file:
    file.write("run ")
{body}
"""


@pytest.fixture
def tools(monkeypatch):
    """The modules of experiments/tools, which are imported by their plain names."""
    names = ("catalogue", "environments", "models", "protocol")
    monkeypatch.syspath_prepend(str(HERE / "readers"))
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("tools_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = path
    module.__dict__.update({name: importlib.import_module(name) for name in names})
    yield module
    for name in (*names, "page", "server", "table", "readers", "readers.protocol"):
        sys.modules.pop(name, None)


@pytest.fixture
def driver(tools, tmp_path, monkeypatch):
    """Runs a fake tool whose script ends with `body`; returns its rows."""
    count = tmp_path / "count"
    (tmp_path / "readers").mkdir()
    (tmp_path / "readers" / "protocol.py").write_text("")
    monkeypatch.setattr(tools, "HERE", tmp_path)

    def run(body, *, again=False, tool=None):
        path = tmp_path / "readers" / "fake.py"
        text = SCRIPT.format(readers=str(HERE / "readers"), count=str(count), body=body)
        path.write_text(text)
        tool = tool or tools.catalogue.Tool("fake", "fake", "torch")
        return tools._rows(tool, "llama3", PROBE, tmp_path / "work", again)

    run.runs = lambda: len(count.read_text().split()) if count.is_file() else 0
    return run


def test_every_command_of_the_page_is_run_in_one_way(tools):
    page = importlib.import_module("page")
    found = list(page.commands(page.PAGE.read_text()))
    used = [page.how(command) for command in found]  # exactly one each, or a ValueError
    assert set(used) == set(page.COMMANDS.values())
    with pytest.raises(ValueError, match="not enough values"):
        page.how("pip install come")


def answer(**given):
    empty = dict.fromkeys(("tokens", "continuations", "perplexity", "prompt_ids", "expected"))
    return {**empty, "form": "float32", "note": "", "version": "1.2", **given}


@pytest.mark.parametrize(("given", "same", "verdict"), [
    ({"tokens": [[5, 6], [7, 8]], "perplexity": 10.005}, 4, "equal"),
    ({"tokens": [[5, 6], [7, 9]], "perplexity": 10.0}, 3, "1 of 4 greedy tokens differ"),
    ({"tokens": [[4, 6], [7, 8]], "perplexity": 10.0}, 2, "2 of 4 greedy tokens differ"),
    ({"tokens": [[5, 6], [7, 8]], "perplexity": 10.02}, 4, "perplexity 1.0020 x"),
    ({"tokens": [[5, 6], [7, 8]], "perplexity": math.nan}, 4, "perplexity nan x"),
    ({"tokens": [[5, 6], [7, 9]], "perplexity": 10.1, "form": "8 bits"}, 3, "rounding"),
    ({"tokens": [[5, 6], [7, 9]], "perplexity": 10.5, "form": "8 bits"}, 3, "perplexity 1.0500 x"),
    ({"tokens": [[4, 6], [6, 8]], "perplexity": 10.1, "form": "8 bits"}, 0,
     "no greedy token is equal"),
    ({"tokens": [[5, 6], [7, 8]], "prompt_ids": [[1], [3]]}, 4, "other token ids of the prompts"),
    ({"tokens": [[5, 6], [7, 8]], "prompt_ids": [[1], [2]]}, 4, "equal"),
    ({"continuations": [" five six", "seven eight"]}, 2, "equal"),
    ({"continuations": ["five", "seven eight"]}, 1, "1 of 2 greedy tokens differ"),
    ({"tokens": [[1, 1], [1, 1]], "perplexity": 3.0,
      "expected": {"tokens": [[1, 1], [1, 1]], "perplexity": 3.0}}, 4, "equal"),
])  # fmt: skip
def test_verdicts(tools, given, same, verdict):
    row = tools.judge(answer(**given), PROBE)
    assert (row["same"], row["verdict"]) == (same, verdict)


def test_table(tools):
    rows = [
        {"tool": "A", "model": "smollm2", **tools.judge(answer(tokens=PROBE["tokens"]), PROBE)},
        {"tool": "A", "model": "llama3", "reason": "no | wheel"},
        {"tool": "A", "model": "llama3",
         **tools.judge(answer(perplexity=10.0, note="saved", form="4 bits"), PROBE)},
    ]  # fmt: skip
    shown = tools.table(rows, ["A", "B"], ["smollm2", "llama3"]).splitlines()
    assert shown == [
        "| tool | weights | SmolLM2, 27 layers | llama3 rope |",
        "|---|---|---|---|",
        "| A 1.2 | float32 | equal (4/4) |  |",
        "| A |  |  | no / wheel |",
        "| A 1.2 | 4 bits, saved |  | equal (1.0000 x) |",
    ]


def test_versions_in_the_table(tools):
    row = {"model": "llama3", **tools.judge(answer(tokens=PROBE["tokens"]), PROBE)}
    rows = [{"tool": "a 1.2", **row}, {"tool": "b serve", **row, "version": "1.2.3"}]
    shown = tools.table(rows, ["a 1.2", "b serve"], ["llama3"])
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == [
        "| a 1.2",
        "| b serve 1.2.3",
    ]


def test_reasons_below_the_table(tools):
    wrong = tools.judge(answer(perplexity=11.0), PROBE)
    rows = [
        {"tool": "a", "model": "llama3", **wrong},
        {"tool": "b", "model": "llama3", "reason": "no wheel"},
        {"tool": "c", "model": "llama3", **tools.judge(answer(perplexity=10.0), PROBE)},
    ]
    reasons = {(tool, "llama3"): f"of {tool}" for tool in "abc"}
    shown = tools.table(rows, ["a", "b", "c"], ["llama3"], reasons).splitlines()
    assert shown[-3:] == ["", "- a, llama3 rope: of a.", "- b, llama3 rope: of b."]


def test_perplexity_and_greedy_tokens(tools):
    torch.manual_seed(0)
    scores = torch.randn(7, 7, dtype=torch.float64) * 30

    def logits(ids):
        return scores[ids]

    windows = [[0, 1, 2, 3], [4, 5]]
    losses = [
        torch.nn.functional.cross_entropy(scores[ids[:-1]], torch.tensor(ids[1:]), reduction="sum")
        for ids in windows
    ]
    found = tools.protocol.perplexity(windows, logits)
    assert found == pytest.approx(float((sum(losses) / 4).exp()), rel=1e-9)
    (tokens,) = tools.protocol.greedy([[0, 1]], 3, logits)
    best = scores.argmax(dim=1).tolist()
    assert tokens == [best[1], best[best[1]], best[best[best[1]]]]


def test_done_is_not_done_again(tools, driver):
    (row,) = driver(f"request.report('float32', {RIGHT}, note=request.work[-7:])")
    assert (row["verdict"], row["tool"], row["model"], row["note"]) == (
        "equal", "fake", "llama3", "scratch"
    )  # fmt: skip
    body = f"request.report('float32', {RIGHT}, note='new')"
    assert [row["note"] for row in driver(body)] == ["new"]  # another script
    assert driver(body, again=True)[0]["note"] == "new"
    assert driver.runs() == 2


def test_failure_is_a_row_with_the_reason(driver):
    body = f"request.report('float32', {RIGHT})\nraise RuntimeError('/a/b-1/c.so: no such kernel')"
    first, second = driver(body)
    assert first["verdict"] == "equal"
    assert second["reason"] == "RuntimeError: c.so: no such kernel"
    assert driver(body)[1] == second
    assert driver.runs() == 1
    driver(body, again=True)
    assert driver.runs() == 2
    assert [row["reason"] for row in driver("")] == ["reported nothing"]


def test_what_cannot_be_installed_is_a_row(tools, driver, monkeypatch):
    def fail(words, variables):
        raise tools.environments.CannotInstallError("no matching distribution")

    monkeypatch.setattr(tools.environments, "_run", fail)
    tool = tools.catalogue.Tool("fake", "fake", "torch", ("nothing==1",))
    (row,) = driver("", tool=tool)
    assert row["reason"] == "not installed: no matching distribution"
    assert driver.runs() == 0


def test_environments(tools, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tools.environments, "_run", lambda words, variables: calls.append(words))
    make, tool = tools.environments.environment, tools.catalogue.Tool("a", "a", "a")
    assert make(tool, tmp_path / "a").python == Path(sys.executable)
    side = replace(tool, install=("x==1",), side_folder=True)
    for _ in range(2):  # made once
        assert make(side, tmp_path / "b").variables == {"PYTHONPATH": str(tmp_path / "b")}
    (words,) = calls
    assert words[1:] == ["-m", "pip", "install", "--quiet", "--no-deps", "--target",
                         str(tmp_path / "b"), "x==1"]  # fmt: skip
    make(replace(side, install=("x==2",)), tmp_path / "b")
    assert calls[1][-1] == "x==2"
    own = replace(tool, install=("y==1",))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "c" / "lib" / version / "site-packages").mkdir(parents=True)
    assert make(own, tmp_path / "c").python == tmp_path / "c" / "bin" / "python"
    assert calls[2][1:3] == ["-m", "venv"]
    assert calls[3][-1] == "y==1"
    assert (tmp_path / "c" / "fixed.txt").read_text() == f"torch=={torch.__version__[:6]}\n"
    (link,) = (tmp_path / "c").rglob("project.pth")
    assert (Path(link.read_text().strip()) / "torch").is_dir()


def test_failed_command_of_pip(tools):
    words = [sys.executable, "-c", "import sys; sys.exit('note\\nERROR: no wheel\\nhint')"]
    with pytest.raises(tools.environments.CannotInstallError, match=r"^ERROR: no wheel$"):
        tools.environments._run(words, {})


def test_rows_of_other_tools_stay(tools, tmp_path):
    first, second = (replace(tools.TOOLS[0], name=name) for name in "ab")
    row = {"version": "", **tools.judge(answer(tokens=PROBE["tokens"]), PROBE)}
    for tool, model in ((second, "llama3"), (first, "smollm2"), (first, "llama3")):
        new = [{"tool": tool.name, "model": model, **row}]
        shown = tools.write(tmp_path, new, [first, second])
    tools.write(tmp_path, [{"tool": "a", "model": "llama3", "reason": "x"}], [first, second])
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [(r["tool"], r["model"], "reason" in r) for r in found] == [
        ("a", "smollm2", False), ("a", "llama3", True), ("b", "llama3", False)
    ]  # fmt: skip
    assert shown.count("equal (4/4)") == 3


def test_committed_table_is_that_of_the_results(tools):
    rows = [json.loads(line) for line in (HERE / "results.jsonl").open()]
    names = [tool.name for tool in tools.TOOLS]
    assert {row["tool"] for row in rows} <= set(names)
    shown = tools.table(rows, names, tools.MODELS, tools.REASONS)
    assert (HERE / "table.md").read_text() == shown


def test_scripts_of_the_catalogue_exist(tools):
    for tool in tools.TOOLS:
        assert (HERE / "readers" / f"{tool.script}.py").is_file()
        assert all("==" in name or name in ("onnxruntime", "onnx_ir") for name in tool.install)


@pytest.mark.slow
def test_two_versions_of_transformers(tools, tmp_path, monkeypatch):
    """A small model with llama3 rope: equal in both; not equal without the scaling."""
    from tests.test_readers import TRANSFORMERS4

    assert TRANSFORMERS4.is_dir(), "make test-slow installs tests/transformers4.txt"
    probe = tools.make("llama3", tmp_path / "llama3")
    four = tools.environments.Environment(Path(sys.executable), {"PYTHONPATH": str(TRANSFORMERS4)})
    five = tools.environments.Environment(Path(sys.executable), {})
    tool = tools.TOOLS[0]
    for made, version in ((five, "5."), (four, "4.57")):
        (row,) = tools.run_tool(tool, "llama3", probe, made, tmp_path / version)
        assert row["version"].startswith(version)
        assert (row["verdict"], row["same"]) == ("equal", 72)
    path = Path(probe["folder"]) / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    path.write_text(json.dumps(config | {"rope_scaling": None, "rope_parameters": rope}))
    (row,) = tools.run_tool(tool, "llama3", probe, five, tmp_path / "wrong")
    assert "greedy tokens differ" in row["verdict"]
