"""experiments/slicegpt.py: exact without a cut, and where the cut directions are empty."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.commands import ROOT, load_script
from tests.conftest import SEQ, VOCAB, pico

FAMILIES = ("llama_bias", "llama_tied", "mistral_gqa", "qwen2_gqa", "qwen3_wide")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


def windows_of(seed, count=12):
    return torch.randint(3, VOCAB, (count, SEQ), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def exact_norms(monkeypatch):
    """Norms in the dtype of their input; those of transformers compute in float32."""

    def forward(self, states):
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (states * scale)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_cut_logits_are_those_of_the_dense_model(family, exact_norms):
    slicegpt, model = load_script("slicegpt"), pico(family)
    wanted = model(windows_of(8)).logits
    moments = slicegpt.second_moments(model, windows_of(7))
    found = slicegpt.sliced(model, moments, 32)
    logits = found(windows_of(8)).logits
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight)
    model = model.double()
    logits, wanted = (
        slicegpt.sliced(model, moments, 32)(windows_of(8)).logits,
        model(windows_of(8)).logits,
    )
    assert logits.dtype == torch.float64
    assert (logits - wanted).abs().max() < 1e-9 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_bias", "qwen3_wide"])
def test_a_stream_of_few_directions_loses_nothing(family, exact_norms):
    """All that is written to the residual stream lies in 16 of 32 directions."""
    slicegpt, model = load_script("slicegpt"), pico(family).double()
    basis = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64))[0]
    onto = basis @ basis.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
    for layer in model.model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.copy_(onto @ output.weight)
            if output.bias is not None:
                output.bias.copy_(onto @ output.bias)
    if family.startswith("qwen3"):  # its head norms share eps
        model.config.rms_norm_eps = 0.0
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
    wanted = model(windows_of(8)).logits
    moments = slicegpt.second_moments(model, windows_of(7))
    found = slicegpt.sliced(model, moments, 16)
    logits = found(windows_of(8)).logits
    assert found.config.hidden_size == 16
    assert (logits - wanted).abs().max() < 1e-9 * wanted.abs().max()


@torch.no_grad()
def test_norms_keep_the_mean_square_of_the_kept_directions():
    """Of the first norm, whose states are those of the dense model on the kept directions."""
    slicegpt, windows = load_script("slicegpt"), windows_of(7)
    model = pico("llama_gqa", rms_norm_eps=1e-12)
    moments = slicegpt.second_moments(model, windows)
    basis = slicegpt.rotation(moments)[:, :20]
    found = slicegpt.sliced(model, moments, 20)
    states = model.model.embed_tokens(windows).double()
    n = states / states.square().mean(-1, keepdim=True).sqrt()
    kept = (n @ basis).square().sum(-1).mean()
    own = found.model.layers[0].input_layernorm(found.model.embed_tokens(windows))
    torch.testing.assert_close(own.double().square().sum(-1).mean(), kept, rtol=1e-5, atol=0)


@torch.no_grad()
def test_moments_and_rotation():
    slicegpt, model, windows = load_script("slicegpt"), pico("llama_gqa"), windows_of(7)
    moments = slicegpt.second_moments(model, windows)
    hidden = model(windows, output_hidden_states=True).hidden_states[2].flatten(0, 1).double()
    n = hidden * (hidden.square().mean(1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    torch.testing.assert_close(moments["2.input_layernorm"], n.T @ n, rtol=1e-4, atol=1e-3)
    assert len(moments) == 2 * 6 + 1
    basis = slicegpt.rotation(moments)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32).double(), rtol=0, atol=1e-12)
    variances = (basis * (sum(moments.values()) @ basis)).sum(0)
    assert torch.all(variances.diff() <= 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_tied", "mistral_sliding", "qwen2_gqa", "qwen3_gqa"])
def test_an_ordinary_checkpoint(family, tmp_path):
    slicegpt, model = load_script("slicegpt"), pico(family)
    found = slicegpt.sliced(model, slicegpt.second_moments(model, windows_of(7)), 24)
    found.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(windows_of(8)).logits, found(windows_of(8)).logits)
    own = loaded.config
    assert (own.hidden_size, own.head_dim, own.tie_word_embeddings) == (24, 8, False)
    generated = loaded.generate(windows_of(8)[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == SEQ + 3


@pytest.mark.parametrize(
    ("keep", "multiple", "size"), [(0.9, 1, 28), (0.5, 8, 16), (0.01, 1, 4), (1, 64, 32)]
)
def test_sizes(keep, multiple, size):  # of 32, with 4 heads
    assert load_script("slicegpt").kept_size(pico("llama_gqa").config, keep, multiple) == size


def test_what_is_refused():
    slicegpt, model = load_script("slicegpt"), pico("opt")
    with pytest.raises(ValueError, match="'opt': .* llama, mistral, qwen2, qwen3 only"):
        slicegpt.second_moments(model, windows_of(7))
    with pytest.raises(ValueError, match=r"--keep 0.95: the nearest multiple of 4 is not below"):
        slicegpt.kept_size(pico("llama_gqa").config, 0.95)
    with pytest.raises(ValueError, match=r"--keep 1.5: must be above 0"):
        slicegpt.kept_size(pico("llama_gqa").config, 1.5)
