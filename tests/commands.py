"""Helpers for running run.py, reading its output, and loading scripts of experiments/."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
_SMALL = [
    "calibration=pydocs",
    "calibration.num_samples=8",
    "calibration.seq_len=32",
    "eval.perplexity.seq_len=64",
    "eval.perplexity.max_tokens=512",
    "eval.speed.prompt_tokens=16",
    "eval.speed.new_tokens=4",
    "eval.speed.repeats=1",
    "eval.continuations.tokens=4",
]


def small_job_overrides(*overrides):
    """Overrides for a small job, limited to the evaluations that `overrides` choose."""
    chosen = ["perplexity", "speed", "continuations"]
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "experiment" and value != "smoke":
            chosen = ["perplexity"]
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "eval":
            chosen = value.strip("[]").split(",")
    return drop_unused_eval_settings(_SMALL, chosen)


def without_repeated(words, overrides):
    """Drops the words whose key is in `overrides`, because a command may give a key only once."""
    given = {override.partition("=")[0] for override in overrides}
    given |= {"merge"} if "from_run" in given else set()
    return [word for word in words if word.partition("=")[0] not in given]


def drop_unused_eval_settings(words, chosen):
    """Drops the overrides of evaluations that are not chosen."""
    return [word for word in words if not word.startswith("eval.") or word.split(".")[1] in chosen]


def communicate(process):
    """Waits for the process; returns its exit code, stdout and stderr."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_checkpoint(a, b):
    """Whether two model folders have identical weights."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def load_script(name):
    """Imports experiments/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
