"""come: compresses large language models by merging layers.

This module exports the functions and classes that compress, save and evaluate a model. Each is
imported on first use. Everything else is in the subpackages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from come.api import compress
    from come.data.sources.pydocs import PyDocs
    from come.data.sources.text_file import TextFile
    from come.data.windows import calibration_windows, evaluation_windows
    from come.evaluate.perplexity import perplexity
    from come.export.publish import export_gguf, push_to_hub
    from come.merge.apply import apply
    from come.merge.method import Method
    from come.merge.plan import Plan
    from come.merge.saving import save_model
    from come.models.loading import load_model

__version__ = "0.1.0"

__all__ = [
    "Method",
    "Plan",
    "PyDocs",
    "TextFile",
    "apply",
    "calibration_windows",
    "compress",
    "evaluation_windows",
    "export_gguf",
    "load_model",
    "perplexity",
    "push_to_hub",
    "save_model",
]

_MODULES = {
    "Plan": "merge.plan",
    "PyDocs": "data.sources.pydocs",
    "Method": "merge.method",
    "TextFile": "data.sources.text_file",
    "apply": "merge.apply",
    "calibration_windows": "data.windows",
    "compress": "api",
    "evaluation_windows": "data.windows",
    "export_gguf": "export.publish",
    "load_model": "models.loading",
    "perplexity": "evaluate.perplexity",
    "push_to_hub": "export.publish",
    "save_model": "merge.saving",
}


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use: importing torch and transformers takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'come' has no attribute {name!r}")
    return getattr(import_module(f"come.{_MODULES[name]}"), name)
