"""Settings of the merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from come.files import size_in_bytes
from come.merge.budget import Budget
from come.merge.constraints import DEFAULT_SPARSITY
from come.merge.method import Method
from come.merge.width import narrows, width_setting
from come.setting import HasSettings, setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045


@dataclass
class MergeSettings(Method):
    """`merge`: the merging method, its target depth or budget, and what is saved."""

    name: str = setting("come_plus", "label of the method", counts=False)
    changes: list[str] = setting(
        [], "settings of the method that differ from the named one, for titles", counts=False
    )
    enabled: bool = setting(True, "false measures the model without merging")
    target_layers: Optional[int] = setting(None, "depth to reach", kind=int, least=1, optional=True)
    sparsity: Optional[float] = setting(
        None,
        "share of the parameters to remove, in place of target_layers; "
        f"{DEFAULT_SPARSITY} where neither is given",
        kind=float,
        above=0,
        below=1,
        optional=True,
    )
    budget: Budget = field(default_factory=Budget)
    save_at: list[int] = setting(
        [], "depths to save on the way; given alone, the smallest is the target"
    )
    plan: Optional[str] = setting(
        None, "a plan to apply instead of calibrating", kind=str, optional=True, counts=False
    )
    save_weights: bool = setting(
        True, "whether merged weights stay on disk after the evaluation; plans rebuild them"
    )

    shard_size: str = setting(
        "5GB",
        "largest file of the merged weights; at most 1GB where layers are on disk",
        counts=False,
    )

    def record(self) -> dict[str, Any]:
        """All settings: those of the method and those of this class."""
        return {
            **super().record(),
            **HasSettings.record(self),
            "budget": self.budget.record(),
        }

    def check(self) -> None:
        """Raises ValueError for depths that contradict each other, a missing plan, or no size."""
        size_in_bytes("merge.shard_size", self.shard_size)
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
        self.budget.check()
        if self.budget.quantity:
            self._check_budget()
        if self.narrows:
            self._check_width()
        if self.plan is not None and self.sparsity is not None:
            raise ValueError(
                "merge.sparsity has no effect with merge.plan; "
                "merge.target_layers stops a plan early"
            )

    @property
    def narrows(self) -> bool:
        """Whether layers get fewer FFN channels or KV groups."""
        return self.enabled and self.plan is None and narrows(self)

    @property
    def searches_shape(self) -> bool:
        """Whether the job chooses depth and FFN width for `merge.budget`."""
        return self.enabled and self.plan is None and bool(self.budget.quantity)

    def _check_budget(self) -> None:
        """Raises ValueError for settings of the shape that a budget determines."""
        widths = ("width", "width_attention")
        for key in ("target_layers", "sparsity", "groups", "save_at", *widths, "plan"):
            value = getattr(self, key)
            if value not in (None, [], 1):
                raise ValueError(
                    f"both {self.budget} and merge.{key}={value} are given; the budget determines "
                    "depth and width, so leave one of them out"
                )
        if self.block != "layer":
            raise ValueError(
                f"{self.budget} chooses a depth, and merge.sublayers={list(self.sublayers)} keeps "
                "all layers; leave one of them out"
            )
        if self.drops_sublayers:
            raise ValueError(
                f"{self.budget} chooses a depth, and merge.schedule={self.schedule.name} keeps all "
                "layers; leave one of them out"
            )

    def _check_width(self) -> None:
        """Raises ValueError for settings of the depth that narrower layers do not allow."""
        if self.sparsity is not None:
            raise ValueError(
                f"merge.sparsity={self.sparsity} follows from removed layers alone, and "
                f"{width_setting(self)} removes units too; give merge.target_layers"
            )
        others = [depth for depth in self.save_at if depth != self.target_layers]
        if others:
            raise ValueError(
                f"merge.save_at={list(self.save_at)}: layers are narrowed once the target is "
                f"reached, so depths before it would not have {width_setting(self)}; run "
                "merge.target_layers as a sweep (-m)"
            )
