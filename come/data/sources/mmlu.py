"""The development questions of MMLU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from come.data.sources.base import TEXT, TextSource

_PROMPTS = Path("tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")


@TEXT.register
class MMLU(TextSource):
    """MMLU development questions with worked answers, four or five per subject, from lm-eval.

    Needs no network. The test questions, on which MMLU is scored, are not included.
    """

    name = "mmlu"
    paper = "2009.03300"
    source = "the few-shot prompts inside the lm-eval package (MIT licence)"
    always_split = True

    @property
    def identity(self) -> str:
        """Name and version of the package."""
        return f"mmlu lm-eval {version('lm_eval')}"

    def documents(self) -> Iterator[str]:
        """One document per question and answer, ordered by subject."""
        spec = find_spec("lm_eval")
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent / _PROMPTS
        if not path.is_file():
            raise ValueError(f"this version of lm-eval has no {_PROMPTS}; install lm-eval 0.4.13")
        subjects: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        for subject in sorted(subjects):
            for part in subjects[subject].split("\n\n"):
                if part.startswith("Q:"):
                    yield part.strip()
