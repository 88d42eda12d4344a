"""The preparation stage: checks settings against checkpoint, job folder and texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from come.data.mix import interleaved
from come.data.sources.base import TextSource
from come.data.windows import (
    TokenWindows,
    begin_token,
    calibration_windows,
    check_length,
    check_token_ids,
)
from come.evaluate.base import Evaluation, Subject
from come.files import check_replaceable, read_again
from come.job.budget import choose_placement
from come.job.folder import check_folder, find_run
from come.job.job import Job, merge_cost
from come.job.sampled_text import prompts_of
from come.job.stages.depth import (
    check_reachable,
    kinds_of,
    shapes_within_budget,
    stated_target,
    target_layers,
)
from come.merge.budget import CandidateShape, windows_for
from come.merge.operators.base import OPERATORS
from come.merge.plan import Plan
from come.merge.saving import MARKS, plan_path
from come.merge.width import kept_units
from come.models.checkpoint import find_checkpoint, fingerprint
from come.models.loading import (
    ModelShape,
    check_configuration,
    inspect_model,
    load_tokenizer,
)
from come.schema import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def prepare(settings: Settings, folder: Path, name: str) -> Job:
    """Checks checkpoint, target, job folder and texts, so that errors occur before a long run.

    Raises:
        ValueError: see `run`.
    """
    source = settings.model
    checkpoint = find_checkpoint(
        source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    _check_configuration(settings, checkpoint)
    shape = inspect_model(
        checkpoint,
        dtype=source.dtype,
        device=source.device,
        trust_remote_code=source.trust_remote_code,
    )
    merge = settings.merge
    if not merge.enabled:
        check_folder(folder, 0)
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=source.trust_remote_code)
        return Job(
            settings,
            folder,
            name,
            checkpoint,
            shape,
            shape.num_layers,
            tokenizer,
            plan=None,
            calibration=None,
            evaluations=_evaluations(settings, shape, tokenizer, [], _own_plan(checkpoint)),
        )
    start = find_run(settings.from_run) if settings.from_run is not None else None
    given = str(plan_path(start)) if start else merge.plan
    plan = Plan.load(Path(given)) if given is not None else None
    shapes: tuple[CandidateShape, ...] = ()
    if plan is not None:
        _check_plan(plan, str(given), shape, checkpoint)
        plan = plan.truncated(merge.target_layers) if merge.target_layers else plan
        target = plan.num_layers
        for depth in merge.save_at:
            plan.truncated(depth)
    else:
        merge.check_layers(shape.layouts)
        if merge.searches_shape:
            shapes = shapes_within_budget(merge, shape)
            target = shapes[-1].layers  # the largest spans
        else:
            kept_units(merge, shape.config, shape.layouts)
            target = target_layers(merge, shape)
            check_reachable(merge, shape.num_layers, target, kinds_of(merge, shape))
    if plan is None:
        settings = choose_placement(settings, shape, target)
    copies = 1 + len(set(merge.save_at) - {target}) + 3 * settings.distill.active  # and checkpoints
    needed, trials = shape.weight_bytes * copies, 0
    calibrating = settings.calibration
    if plan is None:
        check_length("calibration.seq_len", calibrating.seq_len, shape.longest)
        least = merge.min_windows
        if merge.searches_shape and calibrating.windows < windows_for(least):
            raise ValueError(
                f"calibration.num_samples={calibrating.num_samples}: {merge.budget} compares "
                "shapes on windows that they are not fitted to, and needs at least "
                f"{windows_for(least)} windows"
            )
        if calibrating.windows < least:
            raise ValueError(
                f"calibration.num_samples={calibrating.num_samples}: merge={merge.name} compares "
                f"layers by one state a window, and needs at least {least} windows"
            )
        cost = merge_cost(settings, shape, target)
        trials = cost.trial_bytes
        needed += trials
        if settings.calibration.place == "disk":
            needed += cost.boundary_bytes
        if settings.weights == "disk":
            merged = (shape.num_layers - target) * shape.block_parameters["layer"]
            needed += merged * shape.dtype.itemsize
    if settings.distill.active:
        if plan is not None and (plan.dropped or plan.block != "layer"):
            what = "drops sublayers" if plan.dropped else f"merges the {plan.block} blocks"
            raise ValueError(
                f"distill={settings.distill.method}: {given} {what} of layers, and distillation "
                "trains whole layers; take distill=none"
            )
        if plan is not None and plan.narrower:
            raise ValueError(
                f"distill={settings.distill.method}: the layers of {given} have fewer units "
                "than the dense model's, which is not supported; take distill=none"
            )
        check_length("distill.seq_len", settings.distill.seq_len, shape.longest)
    check_folder(folder, needed, trials)
    for output in ("model", "model-merged", *(f"model-{depth}" for depth in merge.save_at)):
        if (folder / output).resolve() == checkpoint.resolve():
            raise ValueError(
                f"model.path={source.path} is where the result would be written; "
                "choose another hydra.run.dir"
            )
        check_replaceable(folder / output, MARKS)

    tokenizer = load_tokenizer(checkpoint, trust_remote_code=source.trust_remote_code)
    if calibrating.chat:
        _check_chat(settings, shape, tokenizer, calibrates=plan is None)
    trained = settings.training_text if settings.distill.active else None
    others = [*settings.calibration.texts().values(), *([] if trained is None else [trained])]
    evaluations = _evaluations(settings, shape, tokenizer, others, plan)
    calibration = _calibration(settings, shape, tokenizer) if plan is None else None
    return Job(
        settings,
        folder,
        name,
        checkpoint,
        shape,
        target,
        tokenizer,
        plan,
        calibration,
        evaluations,
        _training(settings, shape, tokenizer),
        start,
        needed,
        shapes,
    )


def _evaluations(
    settings: Settings,
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerBase,
    others: Sequence[TextSource],
    plan: Plan | None,
) -> dict[str, tuple[Evaluation, Any]]:
    """The evaluations with their data.

    Held-out text is disjoint from `others`, and from the texts that the model of the plan was
    calibrated or trained on.
    """
    begin = begin_token(settings.model.begin_token, shape.begin_token, tokenizer)
    drawn_from = plan.drawn_from if plan else {}
    subject = Subject(tokenizer, shape.vocabulary, shape.longest, others, begin, drawn_from)
    return {name: (chosen, chosen.prepare(subject)) for name, chosen in settings.eval.items()}


def _own_plan(checkpoint: Path) -> Plan | None:
    """The plan of a model that was compressed; None if it was not, or not by this version."""
    return read_again(plan_path(checkpoint), Plan.load)


def _check_chat(
    settings: Settings, shape: ModelShape, tokenizer: PreTrainedTokenizerBase, *, calibrates: bool
) -> None:
    """Checks that there is a chat template, and that windows are longer than the prompts."""
    if not tokenizer.chat_template:
        raise ValueError(
            "calibration.chat=true: the model's tokenizer has no chat template; leave it out, or "
            "take an instruct model"
        )
    lengths = {}
    if calibrates and settings.calibration.sampled_windows:
        lengths["calibration.seq_len"] = settings.calibration.seq_len
    if settings.distill.active and settings.training_text is None:
        lengths["distill.seq_len"] = settings.distill.seq_len
    longest = max(map(len, prompts_of(settings, shape, tokenizer))) if lengths else 0
    for key, tokens in lengths.items():
        if tokens <= longest:
            raise ValueError(
                f"{key}={tokens}: the prompts of calibration.chat=true have up to {longest} "
                f"tokens, and the answers follow; take {key}={2 * longest} or more"
            )


def _calibration(
    settings: Settings, shape: ModelShape, tokenizer: PreTrainedTokenizerBase
) -> TokenWindows | None:
    """Calibration windows of all sources, without those sampled from the model; None for none.

    Raises:
        ValueError: a text cannot be read or is too short.
    """
    calibration, parts = settings.calibration, []
    for name, text in calibration.texts().items():
        asked = f"calibration.num_samples={calibration.num_samples}"
        share = (calibration.mix or {}).get(name)
        found = calibration_windows(
            tokenizer,
            text,
            num_samples=calibration.counts[name],
            seq_len=calibration.seq_len,
            seed=calibration.seed,
            held_out=settings.held_out_texts,
            begin=begin_token(settings.model.begin_token, shape.begin_token, tokenizer),
            asked_by=f"calibration.mix.{name}={share:g} of {asked}" if share else asked,
        )
        what = f"calibration text {found.source}"
        check_token_ids(found.windows, shape.vocabulary, what, tokenizer)
        log.info(
            "calibration: %s, %d tokens available, %d used%s",
            found.source,
            found.corpus_tokens,
            found.tokens,
            f", {found.removed_lines} lines left out that the held-out text has too"
            if found.removed_lines
            else "",
        )
        parts.append(replace(found, source=calibration.described(name, found.source)))
    return interleaved(parts) if parts else None


def _training(
    settings: Settings, shape: ModelShape, tokenizer: PreTrainedTokenizerBase
) -> TokenWindows | None:
    """Training windows, disjoint from the held-out text; None if no text is read.

    No text is read without distillation, or if the training text is sampled from the model. The
    first windows are for validation. The merge may have been fitted to the windows that calibration
    draws, so training draws in reverse order, and the validation windows are the last ones that
    calibration would draw.

    Raises:
        ValueError: the text is too short for one training step and the validation windows.
    """
    distill, text = settings.distill, settings.training_text
    if not distill.active or text is None:
        return None
    train_config = distill.train_config("cpu")
    count = train_config.windows + distill.validation_samples
    found = calibration_windows(
        tokenizer,
        text,
        num_samples=count,
        seq_len=distill.seq_len,
        seed=distill.seed,
        held_out=settings.held_out_texts,
        at_most=True,
        backwards=True,
        begin=begin_token(settings.model.begin_token, shape.begin_token, tokenizer),
        what="training",
    )
    left = len(found.windows) - distill.validation_samples
    if left < distill.batch_size:
        raise ValueError(
            f"training text too short: {text.name} has {len(found.windows)} windows of "
            f"{distill.seq_len} tokens, of which distill.validation_samples="
            f"{distill.validation_samples} are held out; give more text, or lower that or "
            f"distill.batch_size={distill.batch_size}"
        )
    check_token_ids(found.windows, shape.vocabulary, f"training text {found.source}", tokenizer)
    return found


def _check_configuration(settings: Settings, checkpoint: Path) -> None:
    """Checks settings against config.json before transformers, which takes seconds to import.

    A configuration without its own number of layers is left to the checks that follow.
    """
    merge, config = settings.merge, check_configuration(checkpoint)
    layers, longest = config.get("num_hidden_layers"), config.get("max_position_embeddings")
    if not merge.enabled or merge.plan is not None or settings.from_run is not None:
        return
    if isinstance(layers, int):
        target = stated_target(merge, layers)
        if target is not None:
            check_reachable(merge, layers, target)
    if isinstance(longest, int):
        check_length("calibration.seq_len", settings.calibration.seq_len, longest)


def _check_plan(plan: Plan, given: str, shape: ModelShape, checkpoint: Path) -> None:
    """Checks a plan against the model that it will be applied to."""
    OPERATORS.get(plan.operator)
    left = plan.base.num_layers
    for number, step in enumerate(plan.steps, start=1):
        if not 0 <= step.first <= step.last < left:
            raise ValueError(
                f"the plan {given} merges layers {step.first} to {step.last} in step {number}, "
                f"where the model has {left}"
            )
        left -= step.last - step.first
    base = plan.base
    if (base.model_type, base.num_layers) != (shape.config.model_type, shape.num_layers):
        raise ValueError(
            f"the plan {given} is for {base.name}, {base.num_layers} layers of "
            f"{base.model_type}; the model has {shape.num_layers} of {shape.config.model_type}"
        )
    if base.fingerprint not in ("", fingerprint(checkpoint)):
        log.warning("the plan was made for other weights, those of %s", base.name)
    dtype = str(shape.dtype).removeprefix("torch.")
    if plan.provenance.get("dtype", dtype) != dtype:
        log.warning(
            "the plan was made in %s and is applied in %s: the weights will differ by rounding",
            plan.provenance["dtype"],
            dtype,
        )
