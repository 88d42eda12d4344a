"""Former keys of settings: for error messages, and to label the results of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED = {
    "merge.refit_lambda": "merge.refit.lambda",
    "merge.refit_parts": "merge.refit.sublayers",
    "merge.refit_weights": "merge.refit.weights",
    "merge.align_lambda": "merge.refit.align",
    "merge.finish_lambda": "merge.refit.downstream",
    "merge.target": "merge.refit.target",
    "merge.p": "merge.retention.p",
    "merge.seed": "merge.selection.seed or merge.sensitivity.seed",
    "merge.parts": "merge.sublayers",
    "merge.keep": "merge.save_weights",
    "merge.options.shortlist": "merge.selection.shortlist",
    "merge.options.trial_windows": "merge.selection.trial_windows or merge.schedule.trial_windows",
    "merge.options.judge_windows": "merge.selection.validation_windows",
    "merge.options.copying": "merge.selection.repeat_weight",
    "merge.options.granularity": "merge.retention.granularity",
    "merge.options.rate": "merge.retention.rate",
    "merge.options.input_lambda": "merge.refit.input_lambda",
    "merge.options.steps": "merge.refit.steps",
    "merge.options.learning_rate": "merge.refit.learning_rate",
    "merge.options.threshold": "merge.schedule.threshold",
    "merge.options.interval": "merge.schedule.interval",
    "merge.options.relax": "merge.schedule.relax",
    "calibration.keep": "calibration.keep_likeliest",
    "calibration.continued": "calibration.num_continuations",
    "calibration.begin": "calibration.prefix_tokens",
    "eval.also": "eval.perplexity.extra_texts",
    "eval.part": "eval.perplexity.text_range",
    "eval.perplexity": "eval=none, or a list without it such as eval=[speed]",
    "eval.speed": "a list with or without it, such as eval=[perplexity,speed]",
    **{
        f"eval.{key}": f"eval.perplexity.{key}"
        for key in (
            "source",
            "path",
            "dataset",
            "subset",
            "split",
            "revision",
            "field",
            "data_files",
            "max_tokens",
            "text_range",
            "extra_texts",
            "seq_len",
            "batch_tokens",
        )
    },
    **{f"eval.{key}": f"eval.speed.{key}" for key in ("prompt_tokens", "new_tokens", "repeats")},
    **{f"eval.{key}": f"eval.zero_shot.{key}" for key in ("tasks", "include_path", "limit")},
    "eval.speed_batch": "eval.speed.batch_size",
    "eval.task_batch": "eval.zero_shot.batch_size",
    "eval.continuation_tokens": "eval.continuations.tokens",
    "merge.operator=replaceme": "merge.operator=drop merge.refit=replaceme",
    "merge.operator=prune_comp": "merge.operator=drop merge.refit=prune_comp",
    "eval.name": "eval=NAME, or a list of several such as eval=[perplexity,speed]",
    "ablation": "overrides of its own, such as merge.refit=ridge",
}
"""Former keys of settings, with their current keys, or in words what replaces them."""


def current_keys(overrides: Mapping[str, str]) -> dict[str, str]:
    """Overrides with the current keys, where a former key has a single successor."""
    return {current_key(key): value for key, value in overrides.items()}


def current_key(key: str) -> str:
    """The current key of a setting; the key itself if it has no single successor."""
    found = RENAMED.get(key, key)
    return key if " " in found else found
