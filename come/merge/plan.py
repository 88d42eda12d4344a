"""The plan: all decisions of a compression, as plain values from which it can be rebuilt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from come.data.windows import all_drawn
from come.files import read_object, write_bytes, write_text
from come.merge.dropped import SublayerDrops
from come.merge.plan_fields import check_fields, invalid
from come.models.adapter import ModelAdapter
from come.models.layout import Block, Unit
from come.models.surgery import Span
from come.models.width import CHANNEL, units_left

FORMAT = 1


class SolvedTensors:
    """Named tensors, compared and recorded by the hash of their bytes.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        self.hashes = {name: _digest(tensor) for name, tensor in self.tensors.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SolvedTensors) and self.hashes == other.hashes

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.hashes.items())))

    def __repr__(self) -> str:
        return f"SolvedTensors({self.hashes})"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


_DROPS = {"replaceme": "drop", "prune_comp": "drop"}  # operators of earlier versions


@dataclass(frozen=True)
class SpanCandidate:
    """A span that could have been merged, or dropped, at a step: first..last and its score."""

    first: int
    last: int
    score: float


@dataclass(frozen=True)
class MergeStep:
    """One merge: the span, how much of each layer and which units are kept, and the scores.

    A span of one layer is refitted, and narrowed if fewer FFN channels or KV groups are kept than
    it has.

    Attributes:
        first: first layer of the span, a position in the model before this step.
        last: last layer of the span, inclusive.
        spans: original layers merged into each layer of the span.
        shares: share rho of every layer of the span.
        kept: kept units of every layer of the span, by kind; empty if the operator does not use
            units.
        score: selection score of the span.
        candidates: all spans scored for this step; with a shortlist, only the spans tried.
        bi: block influence of every layer of the model measured for this step. With a schedule
            that plans ahead, steps after the first have only the layers up to the span.
        kept_layer: index in the span of the layer that a drop keeps; None for a merge.
        slot: index in the span of the layer whose kind and configuration the new layer has; for a
            drop, the kept layer.
        solved: tensors of the merged layer that were solved on calibration data.
        output_scale: factor on the output projections of all layers after the span.
        ruled_out: spans of original layers that no later step may merge, because a set without
            them was better as a whole.
    """

    first: int
    last: int
    spans: list[Span]
    shares: list[float]
    kept: dict[Unit, list[list[int]]]
    score: float
    candidates: list[SpanCandidate]
    bi: list[float]
    kept_layer: int | None = None
    slot: int = 0
    solved: SolvedTensors = field(default_factory=lambda: SolvedTensors({}))
    output_scale: float = 1.0
    ruled_out: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class BaseModel:
    """The dense model of a plan.

    Attributes:
        name: the model's label.
        fingerprint: hash of its configuration and weights files, or "" if unknown.
        model_type: its family.
        num_layers: its decoder layers.
        units: number of KV groups and of MLP channels of one layer.
    """

    name: str
    fingerprint: str
    model_type: str
    num_layers: int
    units: dict[Unit, int]

    @classmethod
    def of(cls, adapter: ModelAdapter, name: str = "", fingerprint: str = "") -> BaseModel:
        """Describes a dense model."""
        return cls(
            name=name or str(adapter.config.name_or_path),
            fingerprint=fingerprint,
            model_type=adapter.model.config.model_type,
            num_layers=adapter.num_layers,
            units=adapter.unit_counts,
        )


@dataclass(frozen=True)
class Plan:
    """All merges of a compression; with the base model it determines the result bit for bit.

    Attributes:
        base: the model that it starts from.
        operator: registry name of the merge operator.
        norms: "mean" or "fold".
        block: what is merged: "layer", or one sublayer of each, "attention" or "ffn". Removed
            sublayers stay as blocks whose output is zero, so no layer is removed.
        steps: the merges, in order; for sublayers, positions count the remaining blocks.
        downstream: tensors of merged or unmerged layers, solved by the downstream refit after the
            last merge; each is named "LAYER/TENSOR" with the layer's position at that point. With
            dropped sublayers, the refitted output projections of the sublayers that are left.
        dropped: sublayers that are dropped one by one, in place of steps; None for none.
        provenance: all other information (metric, calibration, versions, job).
    """

    base: BaseModel
    operator: str
    norms: str
    block: Block = "layer"
    steps: list[MergeStep] = field(default_factory=list)
    downstream: SolvedTensors = field(default_factory=lambda: SolvedTensors({}))
    dropped: SublayerDrops | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the model after all steps; for sublayers, the remaining blocks.

        With sublayers that are dropped one by one, the depth that costs as much.
        """
        if self.dropped:
            return self.dropped.depth
        return self.base.num_layers - sum(step.last - step.first for step in self.steps)

    @property
    def narrowed(self) -> int:
        """Number of layers with fewer units; they are the first ones of the model."""
        return sum(bool(self._left(step)) for step in self.steps)

    @property
    def narrower(self) -> dict[Unit, int]:
        """Units of every layer after all steps, of the kinds that layers have fewer of."""
        return self._left(self.steps[-1]) if self.steps else {}

    @property
    def channels(self) -> int:
        """FFN channels of every layer after all steps if `merge.width` left some out, else 0."""
        return self.narrower.get(CHANNEL, 0)

    def _left(self, step: MergeStep) -> dict[Unit, int]:
        single = step.first == step.last  # a layer is narrowed by a step of its own
        return units_left(self.base.units, step.kept) if single else {}

    @property
    def history(self) -> list[Span]:
        """Original layers merged into each layer of the model: `[[0], [1, 2], [3], ...]`."""
        spans: list[Span] = [[i] for i in range(self.base.num_layers)]
        for step in self.steps:
            merged = spans[step.first : step.last + 1]
            spans[step.first : step.last + 1] = [[layer for span in merged for layer in span]]
        return spans

    @property
    def places(self) -> list[int]:
        """For sublayers, the index of the layer that holds each remaining block."""
        places = list(range(self.base.num_layers))
        for step in self.steps:
            kept = places[step.first + (step.kept_layer or 0)]
            places[step.first : step.last + 1] = [kept]
        return places

    @property
    def drawn_from(self) -> dict[str, float]:
        """The texts that the model was calibrated or trained on, as in `TokenWindows`."""
        uses = [self.provenance.get(use) for use in ("calibration", "distillation")]
        return all_drawn(*(use.get("drawn_from", {}) for use in uses if use))

    @property
    def hash(self) -> str:
        """Hash of all that determines the weights, i.e. of everything but the provenance."""
        decisions = [
            [
                *(s.first, s.last, s.shares, s.kept, s.kept_layer, s.solved.hashes),
                *(s.output_scale, *([s.slot] if s.slot and s.kept_layer is None else [])),
            ]
            for s in self.steps
        ]
        base = asdict(self.base) | {"name": ""}
        parts = [FORMAT, base, self.operator, self.norms, self.block, decisions]
        if self.downstream.hashes:
            parts.append(self.downstream.hashes)
        if self.dropped:
            parts.append(self.dropped.decisions)
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_step(self, step: MergeStep, **provenance: Any) -> Plan:
        """The plan with one more merge and more provenance, without a downstream refit."""
        return replace(
            self,
            steps=[*self.steps, step],
            downstream=SolvedTensors({}),
            provenance={**self.provenance, **provenance},
        )

    def truncated(self, depth: int) -> Plan:
        """The plan's first steps, down to `depth` layers, with the refits at that depth.

        Above the plan's own depth the downstream refit is left out, because it was solved at the
        plan's own depth. Each depth of `merge.save_at` has its own plan with its own refit.

        Raises:
            ValueError: the plan does not pass through this depth.
        """
        if (self.steps or self.dropped) and depth == self.num_layers:
            return self
        plan = replace(self, steps=[])
        depths, found = [self.num_layers] if self.dropped else [], None
        for step in self.steps:
            plan = plan.with_step(step)
            depths.append(plan.num_layers)
            found = plan if plan.num_layers == depth else found
        if found:
            return found
        raise ValueError(
            f"merge.target_layers={depth}: the plan passes through "
            f"{', '.join(map(str, dict.fromkeys(depths))) or 'no merge'}"
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically, and its solved tensors to safetensors next to it."""
        tensors = {
            f"{number}/{name}": tensor
            for number, step in enumerate(self.steps)
            for name, tensor in step.solved.tensors.items()
        }
        tensors |= {
            f"downstream/{name}": tensor for name, tensor in self.downstream.tensors.items()
        }
        path = Path(path)
        if tensors:
            write_bytes(tensors_path(path), save_tensors(tensors))
        steps = [
            {
                key: value
                for key, value in asdict(replace(step, solved=SolvedTensors({}))).items()
                if key != "solved"
            }
            | ({"solved": step.solved.hashes} if step.solved.hashes else {})
            for step in self.steps
        ]
        empty = replace(self, steps=[], downstream=SolvedTensors({}))
        data = {"format": FORMAT, **asdict(empty), "steps": steps}
        data["downstream"] = self.downstream.hashes
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan written by `save`.

        Raises:
            ValueError: the file does not exist, or is not a plan of this format.
        """
        path = Path(path)
        try:
            data = read_object(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"merge.plan={path}: cannot be read as a plan: {error}") from error
        if data.get("format") != FORMAT:
            raise ValueError(f"merge.plan={path}: not a plan of format {FORMAT}")
        try:
            check_fields(data, path)
            operator = str(data["operator"])
            steps = [_read_step(path, number, step) for number, step in enumerate(data["steps"])]
            last = "finish" if "finish" in data else "downstream"  # earlier versions: finish
            return cls(
                base=BaseModel(**data["base"]),
                operator=_DROPS.get(operator, operator),
                norms=data["norms"],
                block=data.get("block", "layer"),
                steps=steps,
                downstream=_read_tensors(path, last, data.get(last, {})),
                dropped=SublayerDrops.read(data.get("dropped")),
                provenance=data["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{invalid(path)}: {error}") from error


def tensors_path(path: Path) -> Path:
    """The file of a plan's solved tensors: plan.json -> refit.safetensors."""
    return path.with_name(path.name.replace("plan", "refit", 1)).with_suffix(".safetensors")


def _read_step(path: Path, number: int, step: dict[str, Any]) -> MergeStep:
    """One step of a plan's JSON, with its tensors."""
    solved = _read_tensors(path, str(number), step.get("solved", {}))
    candidates = [SpanCandidate(**candidate) for candidate in step["candidates"]]
    if "keeper" in step:  # earlier versions
        step["kept_layer"] = step.pop("keeper")
    step.setdefault("slot", step["kept_layer"] or 0)
    ruled_out = [(first, last) for first, last in step.get("ruled_out", [])]
    read = {"candidates": candidates, "solved": solved, "ruled_out": ruled_out}
    return MergeStep(**{**step, **read})


def _read_tensors(path: Path, prefix: str, hashes: Mapping[str, str]) -> SolvedTensors:
    """Tensors stored next to a plan, checked against the plan's hashes."""
    if not hashes:
        return SolvedTensors({})
    file = tensors_path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            solved = SolvedTensors({name: opened.get_tensor(f"{prefix}/{name}") for name in hashes})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"merge.plan={path} needs {file}: {error}") from error
    if solved.hashes != hashes:
        raise ValueError(f"merge.plan={path}: {file} belongs to another plan")
    return solved
