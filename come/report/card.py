"""The model card of a compressed model, with metadata from the base model's card."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from come.distill.objectives.base import DISTILL
from come.errors import one_line
from come.evaluate.base import read_metrics
from come.merge.operators.base import OPERATORS
from come.merge.plan import Plan, tensors_path
from come.merge.refit.base import REFITS
from come.merge.saving import PLAN
from come.models.checkpoint import describe_source
from come.models.dialects import TESTED_TRANSFORMERS
from come.models.width import UNIT_NAMES
from come.records import DepthResult, Result
from come.report.numbers import comparison, heading, relative, value
from come.report.tables import Table

log = logging.getLogger(__name__)

_METADATA = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(result: Result, depth: DepthResult, plan: Plan, base: Path) -> ModelCard:
    """The model card of one saved model.

    Licence and language are copied from the base model's card, if it has one. `base_model` is
    `model.base_model`, or else the hub id that the model was loaded from or that its configuration
    names; without any of them it is omitted.
    """
    operator = OPERATORS.get(plan.operator)
    given = _front_matter(base / "README.md")
    base_model = _base_model(result, base)
    what = "layers" if plan.block == "layer" else f"{plan.block} blocks"
    at_cost = "at the cost of " if plan.dropped else ""
    named = given.get("model_name") or (base_model or result["model"]).rpartition("/")[2]
    data = ModelCardData(
        base_model=base_model,
        model_name=f"{named}, {at_cost}{depth['layers']} layers ({result['method']})",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["come", "layer-merging", result["method"]],
        **{key: given[key] for key in _INHERITED if key in given},
    )
    paper = f" ([arXiv {operator.paper}](https://arxiv.org/abs/{operator.paper}))"
    calibration = result["calibration"]
    origin = (
        f"{calibration['tokens']} tokens of {calibration['source']}"
        if calibration
        else "none, a given plan was applied"
    )
    action = f"dropping {what}" if operator.drops else f"merging adjacent {what}"
    if plan.block != "layer":
        action += (
            f"; {plan.base.num_layers - depth['layers']} of {plan.base.num_layers} are removed "
            "and stay in the file as blocks that add nothing, so that any loader takes it"
        )
    if plan.dropped:
        action = (
            f"dropping {plan.dropped.described()}, which stay in the file as blocks that add "
            f"nothing: the {plan.base.num_layers} layers have no fewer bytes, and use as many "
            f"parameters as {plan.num_layers} layers"
        )
    if plan.narrower:
        width = f"keeping {units_kept(plan)} in every layer"
        action = f"{action}, and {width}" if plan.num_layers < plan.base.num_layers else width
    healing, files = _healing(plan)
    rebuilt = "the merged" if "distillation" in plan.provenance else "these"
    origin_name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else named
    source = describe_source(result["settings"]["model"]["path"])
    if source:
        source = f" The base model is {source}; the numbers compare with these weights."
    licence = given.get("license_name") or given.get("license")
    if isinstance(licence, list):
        licence = ", ".join(licence)
    changes = f" with `{', '.join(result['changes'])}`" if result.get("changes") else ""
    text = f"""---
{data.to_yaml()}
---

# {named}, {at_cost}{depth["layers"]} {what}

{origin_name}, a model of {plan.base.num_layers} layers, compressed by
{depth["sparsity"]:.1%} of its parameters by {action}: method
`{result["method"]}`{changes}, operator `{plan.operator}`{paper if operator.paper else ""}, norms
`{plan.norms}`. {healing}{source}

{_quality(result, depth)}

## Use

It is an ordinary checkpoint of the same architecture, with the tokenizer of the base model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR HUB ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR HUB ID")
```

Written with transformers {result["versions"]["transformers"]}; this form of checkpoint is tested
with transformers {" and ".join(TESTED_TRANSFORMERS)}.

## How it was made

{_command(result)}Calibration: {origin}.

Merge history (the original layers of every layer): `{plan.history}`

Plan `{plan.hash}`, in {files}: with the base model it rebuilds {rebuilt} weights bit for bit.

## Limits

A compressed model can lose abilities that perplexity on one text does not show, such as facts,
other languages and long reasoning. Measure your own task before you rely on it. What holds for the
base model, its biases included, holds here too. The licence is that of the base model{
        f" ({licence})" if licence else ""
    }.
"""
    return ModelCard(text)


def _quality(result: Result, depth: DepthResult) -> str:
    """Table of the headline metrics next to those of the dense model."""
    dense = read_metrics(result["depths"][0]["metrics"])
    own = {name: m for name, m in read_metrics(depth["metrics"]).items() if m.headline}
    if not own:
        return "Not evaluated."
    rows = [
        [
            heading(name, metric),
            value(metric),
            value(dense[name]),
            f"{relative(metric)} {comparison(metric)}".strip(),
            metric.data,
        ]
        for name, metric in own.items()
    ]
    head = ["", "this model [95%]", "dense [95%]", "against dense [95%]", "measured on"]
    return Table(head, rows).without_empty_columns().markdown().strip()


def _command(result: Result) -> str:
    """The command line as a code block, with local paths shortened to their names."""
    if not result["command"]:
        return ""
    words = []
    for word in shlex.split(result["command"]):
        key, equals, given = word.partition("=")
        path = Path(given).expanduser()
        words.append(f"{key}={path.name}" if equals and path.is_absolute() else word)
    return f"```bash\n{shlex.join(words)}\n```\n\n"


def _base_model(result: Result, base: Path) -> str | None:
    settings = result["settings"]["model"]
    path = settings["path"] or ""
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    given: str | None = settings.get("base_model")
    if given or (is_hub_id and not Path(path).exists()):
        return given or path
    try:
        named = json.loads((base / "config.json").read_text()).get("_name_or_path") or ""
    except (OSError, ValueError):
        return None
    return named if _HUB_ID.fullmatch(named) and not Path(named).exists() else None


def _front_matter(path: Path) -> dict[str, Any]:
    """Name, licence and language from the metadata of a model card.

    Empty if the card does not exist or cannot be parsed: a base model's card never stops a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    block = _METADATA.match(text)
    try:
        found = yaml.load(block[1], yaml.BaseLoader) if block else {}  # "no" is Norwegian
    except yaml.YAMLError as error:
        log.warning("the card of the base model is left out (%s)", one_line(error))
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        key: value
        for key, value in found.items()
        if key in ("model_name", *_INHERITED)
        and value
        and (isinstance(value, str) or key in ("language", "license"))
        and (isinstance(value, str) or all(isinstance(item, str) for item in value))
    }


def _healing(plan: Plan) -> tuple[str, str]:
    """Describes the distillation or refit of the merged layers, and the files of the plan."""
    if trained := plan.provenance.get("distillation"):
        method = DISTILL.get(trained["method"])
        return (
            f"Then trained: `{method.name}` ({method.source}) on {trained['tokens']} tokens of "
            f"{trained['source']}, {trained['trained_parameters']} parameters.",
            f"`{PLAN}`",
        )
    given = plan.provenance.get("recipe", {}).get("refit", "none")
    name = given["name"] if isinstance(given, dict) else given  # earlier versions wrote a name
    solved = bool(plan.downstream.hashes) or any(step.solved.hashes for step in plan.steps)
    files = f"`{PLAN}`" + (f" and `{tensors_path(Path(PLAN)).as_posix()}`" if solved else "")
    if name not in REFITS.names() or not REFITS.get(name).active:
        return "No training.", files
    refit = REFITS.get(name)
    trained = "Gradient steps were taken" if refit.batchwise else "No training"
    return f"Refit `{name}`: {refit.source}. {trained}.", files


def units_kept(plan: Plan) -> str:
    """How many FFN channels and KV groups layers have, of the kinds that they have fewer of."""
    parts = [
        f"{plan.narrower[unit]} of {plan.base.units[unit]} {name}"
        for unit, name in UNIT_NAMES.items()
        if unit in plan.narrower
    ]
    return " and ".join(parts)
