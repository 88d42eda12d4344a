"""Settings of the merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Optional

from come.merge.recipe import COME_PLUS, Recipe

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class MergeSettings:
    """`merge`: the method (see `come.merge.recipe.Recipe`) and where it stops.

    Attributes:
        name: label of the recipe.
        target_layers: depth to reach.
        sparsity: share of the model's parameters to remove, in place of `target_layers`.
        save_at: depths to keep on the way; given alone, the smallest is the target.
        plan: a plan to apply instead of calibrating.
        keep: whether the merged weights stay on disk after the evaluation; if not, the plans in the
            same folders rebuild them.
    """

    name: str = "come"
    operator: str = "concat"
    sensitivity: str = "come"
    selection: str = "sbi"
    retention: str = "bi_power"
    schedule: str = "progressive"
    m: int = 2
    p: float = 1.0
    tokens: str = "last"
    norms: str = "mean"
    allow_remerge: bool = False
    protect_first: int = 0
    protect_last: int = 0
    parts: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    groups: list[list[int]] = field(default_factory=list)
    refit: str = "none"
    refit_lambda: Any = 0.1
    refit_parts: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    refit_weights: str = "relative"
    align_lambda: Optional[float] = None
    target: str = "dense"
    finish_lambda: Optional[float] = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    target_layers: Optional[int] = None
    sparsity: Optional[float] = None
    save_at: list[int] = field(default_factory=list)
    plan: Optional[str] = None
    keep: bool = True

    @property
    def active(self) -> bool:
        """Whether anything is merged; `merge=none` measures a model as it is."""
        return self.operator != "none"

    def recipe(self) -> Recipe:
        """The method.

        Raises:
            ValueError: unknown names or settings out of range.
        """
        names = Recipe.__dataclass_fields__
        return Recipe(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Raises ValueError for rules that need no model."""
        if not self.active:
            self.check_unused("merge=none", but=("operator",))
            return
        self.recipe()
        if self.name == "from_plan" and self.plan is None:
            raise ValueError("merge=from_plan needs the plan to apply: merge.plan=FILE")
        if self.target_layers is not None and self.sparsity is not None:
            raise ValueError(
                f"both merge.target_layers={self.target_layers} and merge.sparsity="
                f"{self.sparsity} are given; leave one of them out"
            )
        for key in ("target_layers", "sparsity"):
            if self.groups and getattr(self, key) is not None:
                raise ValueError(
                    f"both merge.groups and merge.{key}={getattr(self, key)} are given; the groups "
                    "say how many layers are left"
                )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"merge.sparsity={self.sparsity}: the share of parameters to remove lies between "
                "0 and 1, both excluded"
            )
        if self.target_layers is not None and self.target_layers < 1:
            raise ValueError(f"merge.target_layers={self.target_layers}: must be at least 1")
        if self.plan is not None:
            self.check_unused("merge.plan", but=("plan", "target_layers", "save_at", "sparsity"))
        if self.plan is not None and self.sparsity is not None:
            raise ValueError(
                "merge.sparsity has no meaning with merge.plan; "
                "merge.target_layers stops a plan early"
            )

    def check_unused(self, reason: str, but: Sequence[str] = ()) -> None:
        """Raises ValueError for a setting that has no meaning because of `reason`.

        What stands there unasked, the default recipe, may.
        """
        default = asdict(MergeSettings())
        for entry in fields(self):
            key, value = entry.name, getattr(self, entry.name)
            unasked = [default[key]]
            if self.name == "come_plus" and key in COME_PLUS:
                unasked.append(COME_PLUS[key])
            if key not in ("name", "keep", *but) and value not in unasked:
                raise ValueError(
                    f"merge.{key}={value} has no meaning with {reason}, where no merge is left to "
                    "decide; leave it out"
                )
