"""Speed of prompt processing and generation, models alternating in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one piece of work.

    Attributes:
        tokens: tokens processed or generated in one repetition.
        seconds: of every repetition, in order.
    """

    tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the median seconds."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repetition, tokens/s."""
        return self.tokens / max(self.seconds), self.tokens / min(self.seconds)


@dataclass(frozen=True)
class Speed:
    """Prompt processing and generation of one model."""

    prompt: Timing
    generation: Timing


@torch.inference_mode()
def compare_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    repeats: int = 3,
    progress: bool = True,
) -> dict[str, Speed]:
    """Times the models in turn, A B A B ..., after one warm-up of each.

    Turns share whatever the machine does meanwhile, so ratios of medians hold where absolute
    times drift.

    Args:
        models: models by label.
        prompt_tokens: length of the prompt (batch 1).
        new_tokens: tokens generated greedily for each of `batch` prompts of 16 tokens.
        batch: prompts generated for side by side.
        repeats: counted repetitions of each.
        progress: whether to show a progress bar.
    """
    found: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "generation": []} for n in models}
    with tqdm(
        total=(repeats + 1) * len(models),
        desc="speed",
        unit="turn",
        leave=False,
        delay=2,
        disable=None if progress else True,
    ) as bar:
        for repeat in range(repeats + 1):
            for label, model in models.items():
                prompt = _seconds(model, partial(_prompt, model, prompt_tokens))
                generation = _seconds(model, partial(_generate, model, batch, new_tokens))
                if repeat:
                    found[label]["prompt"].append(prompt)
                    found[label]["generation"].append(generation)
                bar.update()
    return {
        label: Speed(
            Timing(prompt_tokens, tuple(times["prompt"])),
            Timing(new_tokens * batch, tuple(times["generation"])),
        )
        for label, times in found.items()
    }


def _prompt(model: PreTrainedModel, tokens: int) -> None:
    model(input_ids=_probe(model, 1, tokens), use_cache=True, logits_to_keep=1)


def _generate(model: PreTrainedModel, batch: int, new_tokens: int) -> None:
    ids = _probe(model, batch, 16)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )


def _probe(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    limit = min(10_000, model.config.vocab_size)
    return (torch.arange(batch * length, device=device) * 37 % limit).view(batch, length)


def _seconds(model: PreTrainedModel, work: Callable[[], None]) -> float:
    cuda = model.get_input_embeddings().weight.is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
