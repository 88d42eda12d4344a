"""Checks that need a GPU: `make gpu-check`, or a part of it with `make gpu-check PART=main`.

tests    the tests marked gpu
main     the main job on the GPU and on the CPU: the same spans, and perplexity
bench    the default method on random weights of Mistral-7B's layer shape
distill  training throughput, and the losses of the GPU and of the CPU
shared   the merge of the main job shared by two processes, if there are two GPUs

Every part replaces its entry in gpu_check.json and writes the table gpu_check.md again. Without a
CUDA device, `--device cpu --shape pico` runs the same code at a small size.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import (
    METHODS,
    SHAPES,
    measure,
    random_checkpoint,
    random_model,
    random_windows,
    with_retention_tokens,
)

from come.files import write_text
from come.models.loading import choose_device, load_weights

ROOT = Path(__file__).parents[1]
Results = dict[str, Any]


def run_tests(arguments: argparse.Namespace) -> Results:
    """Runs the tests marked gpu: how many passed, failed and were skipped."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    completed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", completed.stdout)
    }
    if completed.returncode:
        print(completed.stdout[-4000:], file=sys.stderr)
    return {**counts, "seconds": time.perf_counter() - began}


def run_main(arguments: argparse.Namespace) -> Results:
    """Runs the main job on each device: seconds, peak memory, merged spans and perplexity."""
    found = {device: _job(arguments, device) for device in dict.fromkeys([arguments.device, "cpu"])}
    spans = [result["spans"] for result in found.values()]
    return {"same_spans": all(own == spans[0] for own in spans), **found}


def run_distill(arguments: argparse.Namespace) -> Results:
    """Trains the merged layers on each device: tokens per second, and validation losses."""
    words = [
        "distill=come_sp", f"distill.tokens={arguments.distill_tokens}",
        "distill.precision=float32", "eval=none",
    ]  # fmt: skip
    return {
        device: _job(arguments, device, *words)["distillation"]
        for device in dict.fromkeys([arguments.device, "cpu"])
    }


def run_shared(arguments: argparse.Namespace) -> Results:
    """Merges in one process and in two, each with a GPU: spans, perplexity, and the speedup."""
    if arguments.device == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    one, two = (_job(arguments, arguments.device, "eval=perplexity", processes=n) for n in (1, 2))
    speedup = one["merge_seconds"] / two["merge_seconds"]
    return {"same_spans": one["spans"] == two["spans"], "speedup": speedup, "1": one, "2": two}


def _job(arguments: argparse.Namespace, device: str, *words: str, processes: int = 1) -> Results:
    """Runs run.py in one or several processes; returns the main values of result.json."""
    part = words[0].partition("=")[0] if words else "main"
    folder = arguments.output / "runs" / f"{part}-{device}-{processes}"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "run.py")]
    command += ["model.dtype=float32", *arguments.job, *words, f"model.device={device}"]
    began = time.perf_counter()
    subprocess.run([*command, f"hydra.run.dir={folder.resolve()}"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - began
    result = json.loads((folder / "result.json").read_text())
    found = {
        "seconds": seconds,
        "merge_seconds": result["compression"]["seconds"],
        "peak_bytes": result["compression"]["peak_bytes"],
        "spans": [span for span in result["merge_history"] if len(span) > 1],
    }
    perplexity = result["depths"][-1].get("metrics", {}).get("perplexity")
    if perplexity:
        found["perplexity"] = {k: perplexity[k] for k in ("value", "low", "high", "relative")}
    if training := result.get("distillation"):
        keys = ("steps", "tokens", "tokens_per_second", "seconds", "trained_parameters")
        found["distillation"] = {key: training[key] for key in keys}
        found["distillation"]["validation"] = [v["loss"] for v in training["validation"]]
    return found


def run_bench(arguments: argparse.Namespace) -> list[Results]:
    """Runs the default method on random weights, once for every size."""
    device, (method, _) = choose_device(arguments.device), METHODS["come_plus"]
    method = with_retention_tokens(method, arguments.retention_tokens)
    if device.type == "cuda" and arguments.memory_cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory_cap * 1e9 / total)
    found = []
    for size in arguments.sizes.split(","):
        layers, target, tokens = map(int, size.split(":"))
        if arguments.weights == "disk":
            folder = random_checkpoint(arguments.output, arguments.shape, layers, device)
            model = load_weights(folder, device=arguments.device, weights="disk")
        else:
            model = random_model(arguments.shape, device, layers)
        windows = random_windows(model.config.vocab_size, tokens, min(256, tokens))
        entry: Results = {
            "shape": arguments.shape, "layers": layers, "target": target, "tokens": tokens,
            "weights": arguments.weights, "memory_cap_gb": arguments.memory_cap,
            "retention_tokens": arguments.retention_tokens,
        }  # fmt: skip
        try:
            entry |= measure(model, windows, method, target=target, batch_size=arguments.batch_size)
        except torch.cuda.OutOfMemoryError as error:
            traceback.print_exc()
            entry["error"] = str(error).partition(". ")[0]
        found.append(entry)
        print(json.dumps(entry), flush=True)
        del model
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "tests": run_tests,
    "main": run_main,
    "bench": run_bench,
    "distill": run_distill,
    "shared": run_shared,
}


def table(found: Results) -> str:
    """The results as Markdown."""
    lines = [f"{found['device']}, torch {found['torch']}, {found['cpu']}.", ""]
    if tests := found.get("tests"):
        counts = ", ".join(f"{n} {word}" for word, n in tests.items() if word != "seconds")
        lines += [f"Tests marked gpu: {counts} ({tests['seconds']:.0f} s).", ""]
    if main := found.get("main"):
        lines += ["| main job | seconds | of it merging | peak MB | perplexity | spans |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
        for device, entry in main.items():
            if device in ("same_spans", "same_groups"):
                continue
            spans = ", ".join(f"{s[0]} to {s[-1]}" for s in _renamed(entry, "spans"))
            lines.append(
                f"| {device} | {entry['seconds']:.0f} | {entry['merge_seconds']:.0f} | "
                f"{entry['peak_bytes'] / 1e6:.0f} | {entry['perplexity']['value']:.3f} | {spans} |"
            )
        lines.append("")
    if bench := found.get("bench"):
        lines += [
            "| random weights in | layers | tokens | seconds | forward passes | layer passes | "
            "peak GB above the loaded weights | GB of main memory |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for entry in bench:
            cap = entry["memory_cap_gb"]
            where = entry["weights"] + (f", cap {cap:.0f} GB" if cap else "")
            start = f"| {where} | {entry['layers']} to {entry['target']} | "
            start += f"{entry['tokens']} | "
            if "error" in entry:
                lines.append(start + f"{entry['error']} | | | | |")
                continue
            lines.append(
                start + f"{entry['seconds']:.1f} | {entry['ratio']:.1f} | "
                f"{entry['layer_passes'] / entry['layers']:.1f} | "
                f"{entry['peak_bytes'] / 1e9:.1f} | {entry['resident_bytes'] / 1e9:.1f} |"
            )
        lines.append("")
    if distill := found.get("distill"):
        lines += ["| distillation (come_sp) | tokens per second | validation loss |"]
        lines += ["| --- | ---: | --- |"]
        for device, entry in distill.items():
            first, last = entry["validation"][0], entry["validation"][-1]
            lines.append(
                f"| {device} | {entry['tokens_per_second']:.0f} | {first:.4f} to {last:.4f} |"
            )
        lines.append("")
    if shared := found.get("shared"):
        if reason := shared.get("skipped"):
            return "\n".join([*lines, f"A merge in two processes: not run ({reason}).", ""])
        same = "the same" if _renamed(shared, "same_spans") else "other"
        values = [shared[count]["perplexity"]["value"] for count in "12"]
        lines.append(
            f"A merge in two processes: x {shared['speedup']:.2f}, {same} spans, perplexity "
            f"{values[1]:.3f} (in one: {values[0]:.3f})."
        )
        lines.append("")
    return "\n".join(lines)


def _renamed(entry: Results, key: str) -> Any:
    """The value of `key`; earlier versions wrote "groups" in place of "spans"."""
    return entry[key] if key in entry else entry[key.replace("spans", "groups")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "gpu")
    parser.add_argument("--shape", choices=SHAPES, default="mistral7b")
    parser.add_argument(
        "--sizes", default="8:6:4096,32:28:32768", help="layers:target:tokens, by commas"
    )
    parser.add_argument("--weights", default="disk", choices=("memory", "disk"))
    parser.add_argument("--memory-cap", type=float, default=8, help="GB of the device; 0 for all")
    parser.add_argument("--retention-tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--distill-tokens", type=int, default=65536)
    parser.add_argument("job", nargs="*", help="overrides of the main job and the distillation")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = arguments.output / "gpu_check.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("device") != name:
        found = {}
    found |= {"device": name, "torch": torch.__version__, "cpu": platform.machine()}
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        found[part] = PARTS[part](arguments)
        write_text(path, json.dumps(found, indent=1) + "\n")
        write_text(arguments.output / "gpu_check.md", table(found))
        print((arguments.output / "gpu_check.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
