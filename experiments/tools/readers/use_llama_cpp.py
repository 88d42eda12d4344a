"""llama.cpp: converts the folder to GGUF, quantises it, and runs it by llama-cpp-python.

The converter is in the package's source, which the driver keeps. It knows pre-tokenisers by hashes
of what they do to one text, so that of a new tokenizer has to be named.

The comparison with transformers uses the same rounded weights: the file's, expanded.
"""

import runpy
import sys
from pathlib import Path

SOURCE = Path(sys.prefix) / "source" / "vendor" / "llama.cpp"
sys.path.insert(0, str(SOURCE / "gguf-py"))  # the converter needs the version beside it

import gguf  # noqa: E402
import llama_cpp  # noqa: E402
from protocol import Request, greedy, load, perplexity, with_transformers  # noqa: E402
from transformers import AutoModelForCausalLM, GgufConfig  # noqa: E402

FORMS = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
request = Request.read()
work = Path(request.work)


def convert(kind: str) -> Path:
    """Runs the converter; returns the file."""
    sys.path.insert(0, str(SOURCE))
    import conversion.base

    if request.model == "llama3":
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    path = work / f"{kind}.gguf"
    script = SOURCE / "convert_hf_to_gguf.py"
    sys.argv = [str(script), request.folder, "--outfile", str(path), "--outtype", kind]
    runpy.run_path(str(script), run_name="__main__")
    return path


def quantize(path: Path, form: str) -> Path:
    """Quantises a file; returns the new one."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FORMS[form], 1
    found = path.with_name(f"{form}.gguf")
    failed = llama_cpp.llama_model_quantize(str(path).encode(), str(found).encode(), parameters)
    assert not failed
    return found


def expanded(path: Path) -> dict:
    """What transformers computes with the file's weights and the folder's configuration."""
    weights = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    model = load(request.folder)
    model.load_state_dict(weights.float().state_dict())
    return with_transformers(model, request)


def run(path: Path, form: str) -> None:
    """Reports what llama.cpp computes."""
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True,
        verbose=False,
    )  # fmt: skip

    def logits(ids: list[int]):
        model.reset()
        model.eval(ids)
        return model.scores[: len(ids)]

    types = sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors})
    request.report(
        form,
        tokens=greedy(request.prompt_ids, request.new_tokens, logits),
        perplexity=perplexity(request.windows, logits),
        prompt_ids=[model.tokenize(text.encode(), special=True) for text in request.prompts],
        expected=expanded(path) if form in FORMS else None,
        note=", ".join(types),
    )


full, half = convert("f32"), convert("f16")
run(full, "float32")
run(half, "float16")
for form in FORMS:
    run(quantize(full, form), form)
