"""Exact match of generated answers, on local tasks that need no judge and no download."""

from __future__ import annotations

from dataclasses import dataclass

from come.evaluate.base import EVALUATIONS
from come.evaluate.zero_shot import ZeroShot
from come.setting import setting

_LOCAL = ["word_problems", "arc_easy_open", "formats"]


@EVALUATIONS.register
@dataclass
class Generation(ZeroShot):
    """Exact match of generated answers, compared with the dense model by document.

    Runs lm-eval as `zero_shot` does, so any of its tasks can be named. The default tasks are those
    that experiments/generation_tasks.py writes.
    """

    name = "generation"

    tasks: list[str] = setting(_LOCAL, "tasks and groups of lm-eval, or of include_path")

    def check(self) -> None:
        """Raises ValueError for invalid tasks, or for the default tasks without their folder."""
        super().check()
        local = [task for task in self.tasks if task in _LOCAL]
        if local and self.include_path is None:
            raise ValueError(
                f"eval.generation.tasks={local} are local: write them with python "
                "experiments/generation_tasks.py FOLDER --data DATA, and give "
                "eval.generation.include_path=FOLDER"
            )
