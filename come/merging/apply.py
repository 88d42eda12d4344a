"""Applies merges to a model: the only code that changes one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from come.merging.norms import check_norms, fold_norms
from come.merging.plan import MergeStep, Plan
from come.models.adapter import ModelAdapter
from come.operators.base import OPERATORS, MergeOperator


@torch.no_grad()
def apply_step(adapter: ModelAdapter, step: MergeStep, operator: MergeOperator, norms: str) -> None:
    """Merges one group of the model in place, as `step` says."""
    layers = [adapter.layer_state(i) for i in range(step.first, step.last + 1)]
    if check_norms(norms) == "fold":
        layers = [fold_norms(layer, adapter.roles) for layer in layers]
    merged = operator.merge(layers, adapter.roles, step.shares, step.kept)
    adapter.replace(step.first, step.last, merged)


def apply(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """Rebuilds the merged model of a plan from its base model, bit for bit, in place.

    Args:
        plan: the plan of a finished or interrupted compression.
        model: the dense base model, in the dtype of the compression; it is changed.

    Returns:
        `model`, merged.

    Raises:
        ValueError: the model is not of the plan's shape.
    """
    adapter = ModelAdapter(model)
    found = (adapter.architecture.model_type, adapter.num_layers, dict(adapter.unit_counts))
    wanted = (plan.base.model_type, plan.base.num_layers, dict(plan.base.units))
    if found != wanted:
        raise ValueError(
            f"the plan is for {plan.base.name} (type, layers, units: {wanted}); "
            f"this model has {found}"
        )
    operator = OPERATORS.create(plan.operator)
    for step in plan.steps:
        apply_step(adapter, step, operator, plan.norms)
    return model
