"""Wrong settings and files: each must end with exit code 1, one clear line, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from forked import start
from jobs import Workspace, scenarios
from record import Record

SETTINGS = (
    "merge.target_layers=0", "merge.target_layers=-1", "merge.target_layers=99",
    "merge.target_layers=two", "merge.target_layers=3.5", "merge.target_layers=[1]",
    "merge.sparsity=2", "merge.sparsity=-0.1", "merge.sparsity=nan", "merge.sparsity=much",
    "merge.m=1", "merge.m=99", "merge.m=x", "merge.refit=nothing", "merge.sensitivity=wandda",
    "merge.retention=bi_powers", "merge.operator=", "merge.selection=best", "merge.schedule=fast",
    "merge.norms=max", "merge.save_at=[99]", "merge.save_at=3", "merge.groups=[[0,9]]",
    "merge.groups=[[1,3]]", "merge.groups=yes", "merge.shard_size=big", "merge.shard_size=0",
    "merge.nosuch=1", "nosuch=1", "merge=nosuch", "calibration=nosuch", "distill=nosuch",
    "eval=nosuch", "tracking=nosuch", "model.dtype=float8", "model.device=tpu",
    "model.weights=tape", "calibration.store=tape", "calibration.seq_len=0",
    "calibration.seq_len=100000", "calibration.num_samples=0", "calibration.num_samples=-3",
    "calibration.batch_size=0", "calibration.batch_size=many", "calibration.memory=lots",
    "calibration.memory=1KB", "calibration.seed=x", "calibration.mix={a:1}",
    "eval.perplexity.seq_len=1", "eval.perplexity.seq_len=0", "eval.perplexity.max_tokens=-1",
    "eval.perplexity.nosuch=2", "plugins=[nosuch.py]", "plugins=nosuch", "from_run=nosuch",
    "merge.plan=nosuch.json", "model.path=nosuch/x/y", "calibration.path=nosuch.txt",
    "eval.perplexity.path=nosuch.txt", "merge.width=0", "merge.width=2", "merge.m=2,3",
    "merge.target_layers", "=3", "merge.target_layers==3", "'", "merge.refit={a",
    "model.path=/dev/null", "calibration.path=/", "merge.m=${merge.m}", "merge.m=${nosuch}",
    "hydra/launcher=nosuch", "experiment=nosuch",
)  # fmt: skip


def _write(name: str, text: str | bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        key = "merge.plan" if name.endswith("plan.json") else "calibration.path"
        return [f"{key}={path}", *(["merge=from_plan"] if key == "merge.plan" else [])]

    return make


def _model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        change(folder / "model")
        return [f"model.path={folder / 'model'}"]

    return make


def _config(**values: object) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        own = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**own, **values}))

    return change


FILES: dict[str, Callable[[Path], list[str]]] = {
    "empty text": _write("a.txt", ""),
    "short text": _write("a.txt", "few words"),
    "binary text": _write("a.txt", bytes(range(256)) * 20),
    "broken jsonl": _write("a.jsonl", '{"text": "a"}\n{"text": '),
    "jsonl without text": _write("a.jsonl", '{"other": "a"}\n' * 50),
    "broken parquet": _write("a.parquet", b"PAR1" + bytes(100)),
    "empty plan": _write("plan.json", ""),
    "plan of no format": _write("plan.json", "{}"),
    "plan of another format": _write("plan.json", '{"format": 99}'),
    "plan that is a list": _write("plan.json", "[1]"),
    "deep plan": _write("plan.json", "[" * 100_000),
    "no configuration": _model(lambda m: (m / "config.json").unlink()),
    "broken configuration": _model(lambda m: (m / "config.json").write_text("{")),
    "configuration is a list": _model(lambda m: (m / "config.json").write_text("[]")),
    "unknown type": _model(_config(model_type="nosuch")),
    "type is a number": _model(_config(model_type=3)),
    "no layers": _model(_config(num_hidden_layers=0)),
    "a billion layers": _model(_config(num_hidden_layers=10**9)),
    "another width": _model(_config(hidden_size=64)),
    "width is text": _model(_config(hidden_size="wide")),
    "heads do not divide": _model(_config(num_attention_heads=5)),
    "quantised": _model(_config(quantization_config={"quant_method": "awq"})),
    "no weights": _model(lambda m: (m / "model.safetensors").unlink()),
    "empty weights": _model(lambda m: (m / "model.safetensors").write_bytes(b"")),
    "short weights": _model(lambda m: (m / "model.safetensors").write_bytes(bytes(40))),
    "header beyond the file": _model(
        lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 8 + bytes(40))
    ),
    "weights are a pickle": _model(
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin")
    ),
    "no tokenizer": _model(lambda m: [p.unlink() for p in m.glob("tokenizer*")]),
    "broken tokenizer": _model(lambda m: (m / "tokenizer.json").write_text("{}")),
    "an adapter": _model(lambda m: (m / "adapter_config.json").write_text("{}")),
    "weights elsewhere": _model(_config(transformers_weights="../outside.safetensors")),
}


def inputs(work: Workspace, record: Record, *, count: int = 1000, only: str = "") -> None:
    """The part of the campaign: all of them, or the first `count`."""
    base = list(scenarios(work)["memory"].words)
    cases: dict[str, Callable[[Path], list[str]]] = {
        **{word: (lambda folder, word=word: [word]) for word in SETTINGS},
        **FILES,
    }
    for name, make in list(cases.items())[:count]:
        if only not in ("", name) or not record.wants(f"input-{name}"):
            continue
        folder = work.folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(work.base, folder / "model")
        own = make(folder)
        keys = {word.partition("=")[0] for word in own}
        if "merge" in keys or keys & {"from_run", "merge.plan"}:
            keys |= {"merge.target_layers", "merge", "calibration", "calibration.path",
                     "calibration.num_samples", "calibration.seq_len"}  # fmt: skip
        if "eval" in keys:
            keys |= {word.partition("=")[0] for word in base if word.startswith("eval.")}
        if keys & {"merge.sparsity", "merge.groups"}:
            keys.add("merge.target_layers")
        words = [word for word in base if word.partition("=")[0] not in keys]
        run = start([*words, *own, f"hydra.run.dir={folder / 'run'}"], folder).wait()
        found: dict[str, str] = {}
        if run.traceback:
            found["traceback"] = run.err[-800:]
        elif run.hung:
            found["hang"] = name
        elif run.code == 0 or len(run.errors) != 1 or len(run.errors[0]) > 1200:
            found["unclear"] = f"exit {run.code}: {run.err[-400:]}"
        written = [p.name for p in (folder / "run").rglob("*") if p.is_file()]
        if set(written) - {"run.log", ".lock"}:
            found["leftover"] = ", ".join(written)
        record.add(f"input-{name}", found, kind="setting" if name in SETTINGS else "file",
                   said=run.errors[:1])  # fmt: skip
