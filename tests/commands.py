"""How tests start run.py, read what it leaves, and load the scripts of experiments."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SMALL = [
    "calibration=pydocs",
    "calibration.num_samples=8",
    "calibration.seq_len=32",
    "eval.seq_len=64",
    "eval.max_tokens=512",
    "eval.prompt_tokens=16",
    "eval.new_tokens=4",
    "eval.repeats=1",
    "eval.continuation_tokens=4",
]


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def script(name):
    """The module of experiments/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
