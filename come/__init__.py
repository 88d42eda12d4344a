"""come: compresses large language models by merging layers.

The five calls that make a smaller model are exported here; everything else is in the subpackages.
"""

__version__ = "0.1.0"

from come.evaluation.perplexity import perplexity
from come.merging.apply import apply
from come.merging.compress import compress
from come.merging.plan import Plan
from come.merging.recipe import Recipe
from come.merging.saving import save_model
from come.models.loading import load_model
from come.text.pydocs import PyDocs
from come.text.text_file import TextFile
from come.text.windows import calibration_windows, evaluation_windows

__all__ = [
    "Plan",
    "PyDocs",
    "Recipe",
    "TextFile",
    "apply",
    "calibration_windows",
    "compress",
    "evaluation_windows",
    "load_model",
    "perplexity",
    "save_model",
]
