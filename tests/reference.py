"""Reference implementation of CoMe: plain float64 loops over the complete, unmodified model.

Implements the formulas and shares no code with the package.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

UNITS = ("kv_group", "channel")


class Reference:
    """All statistics of one model on given windows, in float64."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model = copy.deepcopy(model).double()
        self.is_opt = model.config.model_type == "opt"
        decoder = self.model.model.decoder if self.is_opt else self.model.model
        self.layers = list(decoder.layers)
        last: list[Tensor] = []
        inputs: dict[tuple[int, str], Tensor] = {}
        hooks = [self.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))]
        for index in range(len(self.layers)):
            for kind in ("kv_group", "channel"):
                hooks.append(
                    self.output(index, kind).register_forward_pre_hook(
                        lambda m, a, key=(index, kind): inputs.__setitem__(key, a[0])
                    )
                )
        with torch.no_grad():
            states = self.model(windows, output_hidden_states=True, use_cache=False).hidden_states
        for hook in hooks:
            hook.remove()
        self.h = [*states[:-1], last[0]]  # the last entry of `states` is after the final norm
        assert len(self.h) == len(self.layers) + 1
        self.inputs = {k: v.reshape(-1, v.shape[-1]) for k, v in inputs.items()}
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def output(self, index: int, kind: str) -> torch.nn.Linear:
        layer = self.layers[index]
        if kind == "kv_group":
            return layer.self_attn.out_proj if self.is_opt else layer.self_attn.o_proj
        return layer.fc2 if self.is_opt else layer.mlp.down_proj

    def cosines(self, before: int, after: int, tokens: str) -> list[float]:
        x, y = self.h[before], self.h[after]
        if tokens == "last":
            x, y = x[:, -1:], y[:, -1:]
        return [
            float(a @ b / (a.norm() * b.norm()))
            for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)
        ]

    def bi(self, index: int, tokens: str) -> float:
        values = [1 - min(max(c, 0), 1) for c in self.cosines(index, index + 1, tokens)]
        return sum(values) / len(values)

    def sbi(self, first: int, last: int, tokens: str) -> float:
        values = [
            math.acos(min(max(c, 0), 1)) / math.pi for c in self.cosines(first, last + 1, tokens)
        ]
        return sum(values) / len(values)

    def sensitivity(self, index: int, kind: str) -> list[float]:
        weight = self.output(index, kind).weight
        mean = self.inputs[index, kind].abs().mean(0)
        columns = [float(mean[j] * weight[:, j].abs().sum()) for j in range(weight.shape[1])]
        if kind == "channel":
            return columns
        scores = []
        for group in range(self.kv_heads):
            own = [
                columns[head * self.head_dim + dim]
                for head in range(self.heads)
                if head // (self.heads // self.kv_heads) == group
                for dim in range(self.head_dim)
            ]
            scores.append(sum(own) / len(own))
        return scores

    def shares(self, first: int, last: int, p: float, tokens: str) -> list[float]:
        powers = [self.bi(i, tokens) ** p for i in range(first, last + 1)]
        return [x / sum(powers) for x in powers]

    def kept(self, first: int, last: int, kind: str, p: float, tokens: str) -> list[list[int]]:
        shares = self.shares(first, last, p, tokens)
        scores = [self.sensitivity(i, kind) for i in range(first, last + 1)]
        total = len(scores[0])
        counts = [math.floor(total * share) for share in shares]
        biggest = shares.index(max(shares))
        counts[biggest] = total - sum(c for i, c in enumerate(counts) if i != biggest)
        return [
            sorted(sorted(range(total), key=lambda j: (-s[j], j))[:count])
            for s, count in zip(scores, counts, strict=True)
        ]

    def merged(self, first: int, last: int, p: float, tokens: str, fold: bool) -> dict[str, Tensor]:
        """All tensors of the concatenated layer, head by head and row by row."""
        shares = self.shares(first, last, p, tokens)
        groups = self.kept(first, last, "kv_group", p, tokens)
        channels = self.kept(first, last, "channel", p, tokens)
        names = {
            "attention_norm": "self_attn_layer_norm" if self.is_opt else "input_layernorm",
            "ffn_norm": "final_layer_norm" if self.is_opt else "post_attention_layernorm",
            "o": "self_attn.out_proj" if self.is_opt else "self_attn.o_proj",
            "down": "fc2" if self.is_opt else "mlp.down_proj",
        }
        wide = ["fc1"] if self.is_opt else ["mlp.gate_proj", "mlp.up_proj"]
        states = [
            {k: v.clone() for k, v in self.layers[i].state_dict().items()}
            for i in range(first, last + 1)
        ]
        if fold:
            for state in states:
                projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
                for norm, readers in (
                    (names["attention_norm"], projections),
                    (names["ffn_norm"], wide),
                ):
                    for reader in readers:
                        weight = state[f"{reader}.weight"]
                        if f"{norm}.bias" in state and f"{reader}.bias" in state:
                            state[f"{reader}.bias"] = (
                                state[f"{reader}.bias"] + weight @ state[f"{norm}.bias"]
                            )
                        state[f"{reader}.weight"] = weight * state[f"{norm}.weight"][None, :]
                    if f"{norm}.bias" in state:
                        left = 0 if f"{readers[0]}.bias" in state else 1 / state[f"{norm}.weight"]
                        state[f"{norm}.bias"] = left * state[f"{norm}.bias"]
                    state[f"{norm}.weight"] = torch.ones_like(state[f"{norm}.weight"])
        ratio, dim = self.heads // self.kv_heads, self.head_dim

        def head_rows(heads: list[int]) -> list[int]:
            return [head * dim + d for head in heads for d in range(dim)]

        merged: dict[str, Tensor] = {}
        for name in states[0]:
            sources = []
            for state, own_groups, own_channels in zip(states, groups, channels, strict=True):
                tensor = state[name]
                queries = [h for h in range(self.heads) if h // ratio in own_groups]
                if ".q_proj" in name:
                    sources.append(tensor[head_rows(queries)])
                elif ".k_proj" in name or ".v_proj" in name:
                    sources.append(tensor[head_rows(own_groups)])
                elif name == f"{names['o']}.weight":
                    sources.append(tensor[:, head_rows(queries)].T)
                elif any(name.startswith(w) for w in wide):
                    sources.append(tensor[own_channels])
                elif name == f"{names['down']}.weight":
                    sources.append(tensor[:, own_channels].T)
            if sources:
                joined = torch.cat(sources)
                is_output = name in (f"{names['o']}.weight", f"{names['down']}.weight")
                merged[name] = joined.T if is_output else joined
            elif fold and name.endswith("layer_norm.bias"):  # zero, unless rows have none
                merged[name] = sum(
                    share * state[name] for share, state in zip(shares, states, strict=True)
                )
            elif names["attention_norm"] in name or names["ffn_norm"] in name:
                merged[name] = sum(state[name] for state in states) / len(states)
            else:
                merged[name] = sum(
                    share * state[name] for share, state in zip(shares, states, strict=True)
                )
        return merged
