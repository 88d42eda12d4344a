"""Speed of prompt processing and generation, measured alternately for several models."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from come.data.windows import check_length
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, Subject
from come.evaluate.continuations import generate_greedily
from come.memory import PeakMemory
from come.models.caches import cache_of, numbers_of
from come.progress import ProgressBar
from come.setting import setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPT = 16  # tokens of the prompts that are continued
_WARM_UP = 4  # tokens generated before the first timing


@dataclass(frozen=True)
class Timing:
    """Repeated timings of the same work.

    Attributes:
        tokens: number of tokens processed or generated per repetition.
        seconds: duration of every repetition, in order.
    """

    tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the median repetition."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens per second of the slowest and the fastest repetition."""
        return self.tokens / max(self.seconds), self.tokens / min(self.seconds)


@dataclass(frozen=True)
class ModelSpeed:
    """Speed and memory of one model.

    Attributes:
        prompt: timing of prompt processing.
        generation: timing of greedy generation.
        peak_bytes: bytes of the model's weights, plus the peak of other tensors during the work.
        cache_bytes: bytes of the KV cache of the prompt.
    """

    prompt: Timing
    generation: Timing
    peak_bytes: int
    cache_bytes: int


@EVALUATIONS.register
@dataclass
class Speed(Evaluation):
    """Tokens per second of prompt processing and generation, and memory, against dense."""

    name = "speed"
    together = True

    prompt_tokens: int = setting(512, "length of the timed prompt", least=1)
    new_tokens: int = setting(32, "tokens generated in the timing", least=1)
    batch_size: int = setting(1, "prompts of a batch in the timing of generation", least=1)
    repeats: int = setting(3, "counted repetitions of each timing", least=1)

    def prepare(self, subject: Subject) -> None:
        """Checks that the prompt and the generated tokens fit the maximum sequence length."""
        check_length("eval.speed.prompt_tokens", self.prompt_tokens, subject.longest)
        generated = _PROMPT + self.new_tokens
        check_length(f"eval.speed.new_tokens + {_PROMPT}", generated, subject.longest)

    def measure_together(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        data: None,
    ) -> dict[str, Metrics]:
        """Tokens per second of both kinds of work, and bytes of the model and of its KV cache."""
        found = compare_speed(
            models,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            batch=self.batch_size,
            repeats=self.repeats,
        )
        return {label: _metrics(speed) for label, speed in found.items()}

    @classmethod
    def compare(cls, own: Metrics, dense: Metrics, removed: float = 0.0) -> Metrics:
        """Adds ratios, and "realised" to the details of timings.

        "realised" is the share of the time saved divided by the share of the layers' parameters
        removed: 1 if time falls in proportion to depth.
        """
        found = super().compare(own, dense, removed)
        for name in ("speed/prompt", "speed/generation"):
            relative = found[name].relative
            if removed and relative is not None:
                realised = (1 - 1 / relative.value) / removed
                details = {**found[name].details, "realised": realised}
                saved = f"{realised:.0%} of the ideal" if realised > 0 else "no"
                description = f"{found[name].data}; {saved} saving"
                found[name] = replace(found[name], data=description, details=details)
        return found


def _metrics(speed: ModelSpeed) -> Metrics:
    found = {}
    for work, timing in (("prompt", speed.prompt), ("generation", speed.generation)):
        slowest, fastest = timing.spread
        found[f"speed/{work}"] = Metric(
            timing.tokens_per_second,
            unit="tokens/s",
            comparison="ratio",
            headline=True,
            data=f"median of {len(timing.seconds)}, {slowest:.1f} to {fastest:.1f}",
            details={"slowest": slowest, "fastest": fastest},
        )
    for name, size in (("peak_memory", speed.peak_bytes), ("kv_cache", speed.cache_bytes)):
        found[f"speed/{name}"] = Metric(float(size), unit="bytes", comparison="ratio")
    return found


@torch.inference_mode()
def compare_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    repeats: int = 3,
    progress: bool = True,
) -> dict[str, ModelSpeed]:
    """Times the models alternately, A B A B ..., after one warm-up of each.

    Because the models alternate, other load on the machine affects all of them, and ratios of
    medians are reliable even if absolute times drift. Memory is measured in the warm-up round, not
    in the timed repetitions.

    Args:
        models: models by label.
        prompt_tokens: length of the prompt (batch size 1).
        new_tokens: tokens generated greedily for each of `batch` prompts of 16 tokens.
        batch: batch size of the generation.
        repeats: number of timed repetitions.
        progress: whether to show a progress bar.
    """
    found: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "generation": []} for n in models}
    caches: dict[str, int] = {}
    peaks: dict[str, int] = {}
    turns = (repeats + 1) * len(models)
    with ProgressBar(total=turns, desc="speed", unit="turn", shown=progress) as bar:
        for label, model in models.items():
            caches[label] = _cache_bytes(model, prompt_tokens)
            _generate(model, batch, min(new_tokens, _WARM_UP))
            works: list[Callable[[], object]] = [partial(_prompt, model, prompt_tokens)]
            if batch * (_PROMPT + new_tokens) > prompt_tokens:  # otherwise it needs less
                works.append(partial(_generate, model, batch, new_tokens))
            peaks[label] = max(_peak_bytes(model, work) for work in works)
            bar.update()
        for _ in range(repeats):
            for label, model in models.items():
                prompt = seconds(model, partial(_prompt, model, prompt_tokens))
                generation = seconds(model, partial(_generate, model, batch, new_tokens))
                found[label]["prompt"].append(prompt)
                found[label]["generation"].append(generation)
                bar.update()
    return {
        label: ModelSpeed(
            Timing(prompt_tokens, tuple(times["prompt"])),
            Timing(new_tokens * batch, tuple(times["generation"])),
            peaks[label] + models[label].get_memory_footprint(),
            caches[label],
        )
        for label, times in found.items()
    }


def _prompt(model: PreTrainedModel, tokens: int) -> Any:
    return model(input_ids=_probe(model, 1, tokens), use_cache=True, logits_to_keep=1)


def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the KV cache after a prompt, or of the states of a recurrence."""
    cache = cache_of(_prompt(model, tokens))
    return sum(tensor.numel() * tensor.element_size() for tensor in numbers_of(cache))


def _peak_bytes(model: PreTrainedModel, work: Callable[[], object]) -> int:
    """Peak bytes of tensors above the level before `work`, independent of the models' order."""
    device = _device(model)
    if device.type == "cuda":
        with PeakMemory(device) as memory:
            work()
        return memory.peak
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _without_stderr(), watch as profiler:
        work()
    result = profiler.profiler
    assert result is not None
    level, peak = 0, 0
    for event in result.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards all output to stderr, because the profiler's C++ library writes log lines there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _generate(model: PreTrainedModel, batch: int, new_tokens: int) -> None:
    ids = _probe(model, batch, _PROMPT)
    generate_greedily(model, ids, new_tokens, least=new_tokens)


def _probe(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    limit = min(10_000, model.config.vocab_size)
    ids = torch.arange(batch * length, device=_device(model)) * 37 % limit
    return ids.view(batch, length)


def _device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device


def seconds(model: PreTrainedModel, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, and what it leaves to do on the model's device."""
    cuda = _device(model).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
