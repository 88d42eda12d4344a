"""Estimates memory and disk of a distillation before it starts."""

from __future__ import annotations

import copy

import torch

from come.distill.memory import TrainingMemory, parameter_memory
from come.distill.objectives.base import DISTILL
from come.distill.trainable import add_lora, choose_parameters, equal_rank
from come.files import cache_folder
from come.job.job import Job
from come.job.teacher import FOLDER
from come.models.adapter import ModelAdapter
from come.models.loading import choose_device
from come.models.surgery import remove_layers
from come.report.numbers import megabytes


def training_lines(job: Job) -> list[str]:
    """Lines on the steps, memory and disk of a job's distillation; none without one."""
    settings = job.settings.distill
    if not settings.active:
        return []
    training = settings.train_config(choose_device(job.settings.model.device).type)
    memory, trained = training_estimate(job), f"{settings.train} of {settings.layers} layers"
    lines = [
        f"distill: {settings.method}, {training.steps} steps of {training.batch_size} "
        f"windows of {settings.seq_len} tokens",
        f"memory of the training: at most {megabytes(memory.weights)} of weights, "
        f"{megabytes(memory.gradients)} of gradients and {megabytes(memory.optimizer)} of "
        f"{settings.optimizer}'s states for {memory.parameters / 1e6:,.1f} M trained parameters"
        f"{f' ({trained})' if 'layers' in DISTILL.options(settings.method) else ''}, and "
        "activations",
    ]
    if settings.teacher == "stored":
        tokens = (training.windows + settings.validation_samples) * settings.seq_len
        most = tokens * job.shape.hidden * job.shape.dtype.itemsize * _stored_layers(job)
        lines.append(
            f"stored teacher: at most {megabytes(most)} on disk in {cache_folder() / FOLDER}"
        )
    return lines


def training_estimate(job: Job) -> TrainingMemory:
    """The largest memory of the distillation, from a model without weights.

    Before the merge, the number of merged layers is not known; at most one layer is merged for
    each that is removed.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import

    settings, dtype = job.settings.distill, job.shape.dtype
    device = choose_device(job.settings.model.device).type
    trusted = job.settings.model.trust_remote_code
    with torch.device("meta"):
        config = copy.deepcopy(job.shape.config)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    model.tie_weights()
    adapter, merged = ModelAdapter(model.to(dtype)), _merged_layers(job)
    if job.target < adapter.num_layers:
        removed = list(range(job.target, adapter.num_layers))
        remove_layers(adapter.layers, adapter.config, removed)
    method = settings.distillation()
    if settings.method == "lora":
        layers = range(job.target)
        model.requires_grad_(False)
        rank = equal_rank(adapter, layers, len(merged), settings.lora_rank)
        add_lora(adapter, layers, rank, settings.seed)
    else:
        each = merged[:1] if method.layerwise else merged
        choose_parameters(adapter, each, settings.train, settings.lora_rank, layers=settings.layers)
    if method.layerwise or settings.train_config(device).precision == "float32":
        model.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    live = method.uses_teacher and settings.teacher == "live"
    modules = [adapter.layers[merged[0]]] if method.layerwise else [model]
    found = parameter_memory(modules, settings.optimizer)
    teacher = job.shape.weight_bytes if live and not method.layerwise else 0
    return TrainingMemory(
        found.parameters, found.weights + teacher, found.gradients, found.optimizer
    )


def _merged_layers(job: Job) -> list[int]:
    """Indices of the merged layers of the plan, or as many as there can be, apart."""
    if job.plan is not None:
        return [index for index, span in enumerate(job.plan.history) if len(span) > 1]
    count = max(1, min(job.target, job.shape.num_layers - job.target))
    if job.settings.merge.groups:
        count = len(job.settings.merge.groups)
    step = job.target / count
    return [min(job.target - 1, round(step * (k + 0.5))) for k in range(count)]


def _stored_layers(job: Job) -> int:
    """Layers after which the teacher's states are stored, at most."""
    settings = job.settings.distill
    hidden = len(_merged_layers(job)) if settings.method == "come_sp" else 0
    logits = settings.method == "logits" or settings.logit_weight > 0
    return 1 + hidden + logits
