"""Models that contain the text model of another family beside encoders of images or sound."""

from __future__ import annotations

from come.models.families.changes import wrapped
from come.models.families.dense import gated, head_normed
from come.models.families.fused import persimmon
from come.models.families.parts import Family

FAMILIES: dict[str, Family] = {
    "fuyu": wrapped(persimmon, "persimmon", "model.language_model"),
    "got_ocr2": wrapped(gated, "qwen2", "model.language_model"),
    "moss_transcribe_diarize": wrapped(head_normed, "qwen3", "model.language_model"),
}
