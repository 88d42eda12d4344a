"""The plan: every decision of a compression, as plain values that rebuild it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from come.files import write_text
from come.models.adapter import Unit
from come.models.surgery import Span

FORMAT = 1


@dataclass(frozen=True)
class GroupCandidate:
    """A group that could have been merged at a step: layers first..last and its score."""

    first: int
    last: int
    score: float


@dataclass(frozen=True)
class MergeStep:
    """One merge: which layers, how much of each, which units, and what decided.

    Attributes:
        first: first layer of the group, a position in the model before this step.
        last: last layer of the group, inclusive.
        spans: original layers behind every layer of the group.
        shares: rho of every layer of the group.
        kept: kept units of every layer of the group, by kind; empty where the operator has no
            use for units.
        score: the selection score of the group.
        candidates: all groups that were eligible, with their scores.
        bi: block influence of every layer of the model before this step.
    """

    first: int
    last: int
    spans: list[Span]
    shares: list[float]
    kept: dict[Unit, list[list[int]]]
    score: float
    candidates: list[GroupCandidate]
    bi: list[float]


@dataclass(frozen=True)
class BaseModel:
    """What a plan was made for.

    Attributes:
        name: the model's label.
        fingerprint: hash of its configuration and weights files, or "" if unknown.
        model_type: its family.
        num_layers: its decoder layers.
        units: KV groups and FFN channels of one layer.
    """

    name: str
    fingerprint: str
    model_type: str
    num_layers: int
    units: dict[Unit, int]


@dataclass(frozen=True)
class Plan:
    """All merges of a compression; with the base model it determines the result bit for bit.

    Attributes:
        base: the model that it starts from.
        operator: registry name of the merge operator.
        norms: "mean" or "fold".
        steps: the merges, in order.
        provenance: everything else worth knowing (metric, calibration, versions, job).
    """

    base: BaseModel
    operator: str
    norms: str
    steps: list[MergeStep] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the model after all steps."""
        return self.base.num_layers - sum(step.last - step.first for step in self.steps)

    @property
    def history(self) -> list[Span]:
        """Original layers behind every layer of the merged model: `[[0], [1, 2], [3], ...]`."""
        spans: list[Span] = [[i] for i in range(self.base.num_layers)]
        for step in self.steps:
            group = spans[step.first : step.last + 1]
            spans[step.first : step.last + 1] = [[layer for span in group for layer in span]]
        return spans

    @property
    def hash(self) -> str:
        """Hash of what determines the weights: base, operator, norms and steps' decisions."""
        decisions = [[s.first, s.last, s.shares, s.kept] for s in self.steps]
        base = asdict(self.base) | {"name": ""}
        text = json.dumps([FORMAT, base, self.operator, self.norms, decisions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_step(self, step: MergeStep) -> Plan:
        """The plan with one more merge."""
        return replace(self, steps=[*self.steps, step])

    def truncated(self, depth: int) -> Plan:
        """The plan's first steps, down to `depth` layers.

        Raises:
            ValueError: the plan does not pass through this depth.
        """
        plan = replace(self, steps=[])
        passed = []
        for step in self.steps:
            plan = plan.with_step(step)
            passed.append(plan.num_layers)
            if plan.num_layers == depth:
                return plan
        raise ValueError(
            f"merge.target_layers={depth}: the plan passes through "
            f"{', '.join(map(str, passed)) or 'no merge'}"
        )

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, atomically."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan that `save` wrote.

        Raises:
            ValueError: no such file, or not a plan of this format.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"merge.plan={path}: cannot be read as a plan: {error}") from error
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"merge.plan={path}: not a plan of format {FORMAT}")
        try:
            steps = [
                MergeStep(
                    **{**step, "candidates": [GroupCandidate(**c) for c in step["candidates"]]}
                )
                for step in data["steps"]
            ]
            return cls(
                base=BaseModel(**data["base"]),
                operator=data["operator"],
                norms=data["norms"],
                steps=steps,
                provenance=data["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"merge.plan={path}: a field is missing or odd: {error}") from error
