"""Judges what a tool reported, and writes the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

FORMS: dict[str, float] = {
    "float32": 1e-3,
    "float16": 5e-3,
    "Q8_0": 2e-2,
    "8 bits": 3e-2,
    "Q4_K_M": 2e-1,
    "4 bits": 5e-1,
}
"""The formats of weights, each with the largest allowed |perplexity / expected - 1|. Greedy tokens
must be equal where the bound is at most 1e-3. In the other formats rounding may change some."""
ROUNDED = 1e-3
LABELS = {
    "smollm2": "SmolLM2, 27 layers",
    "sentencepiece": "sentencepiece",
    "llama3": "llama3 rope",
}
Row = dict[str, Any]


def judge(answer: Mapping[str, Any], probe: Mapping[str, Any]) -> Row:
    """Compares an answer of `Request.report` with the reference of its model.

    Returns:
        `same` of `count` greedy tokens (or texts, from tools that return no ids), `perplexity`,
        its `ratio` to the expected one, and `verdict`: "equal", "rounding" for the tokens that the
        format changes, or what differs.
    """
    expected = answer["expected"] or probe
    same, count = _same(answer, expected, probe)
    ratio = answer["perplexity"] and answer["perplexity"] / expected["perplexity"]
    bound = FORMS[answer["form"]]
    problems = []
    if answer["prompt_ids"] and answer["prompt_ids"] != probe["prompt_ids"]:
        problems.append("other token ids of the prompts")
    if ratio is not None and not abs(ratio - 1) <= bound:
        problems.append(f"perplexity {ratio:.4f} x")
    if same < count and bound <= ROUNDED:
        problems.append(f"{count - same} of {count} greedy tokens differ")
    elif count and not same:
        problems.append("no greedy token is equal")
    verdict = ", ".join(problems) or ("equal" if same == count else "rounding")
    return {
        "form": answer["form"], "note": answer["note"], "version": answer["version"],
        "same": same, "count": count, "perplexity": answer["perplexity"], "ratio": ratio,
        "own_reference": answer["expected"] is not None, "verdict": verdict,
    }  # fmt: skip


def _same(
    answer: Mapping[str, Any], expected: Mapping[str, Any], probe: Mapping[str, Any]
) -> tuple[int, int]:
    """How many greedy tokens are equal up to the first that differs, of how many."""
    if answer["tokens"] is None:
        texts = [[text.strip()] for text in answer["continuations"] or []]
        wanted = [[text.strip()] for text in probe["continuations"]] if texts else []
    else:
        texts, wanted = answer["tokens"], expected["tokens"]
    same = 0
    for found, right in zip(texts, wanted, strict=True):
        for one, other in zip(found, right, strict=False):
            if one != other:
                break
            same += 1
    return same, sum(map(len, wanted))


def table(
    rows: Sequence[Mapping[str, Any]],
    tools: Sequence[str],
    models: Sequence[str],
    reasons: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> str:
    """Markdown: a line for every tool and form, a column for every model, then reasons.

    Args:
        rows: results of `judge`, or reasons why there are none, with their tool and model.
        tools: names of the tools, in order.
        models: names of the models, in order.
        reasons: by tool and model, why a result differs.
    """
    head = ["tool", "weights", *(LABELS.get(model, model) for model in models)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for tool in tools:
        own = [row for row in rows if row["tool"] == tool]
        for key in dict.fromkeys((row.get("form", ""), _title(row)) for row in own):
            chosen = {row["model"]: row for row in own if (row.get("form", ""), _title(row)) == key}
            version = next((row["version"] for row in chosen.values() if row.get("version")), "")
            cells = [_cell(chosen[model]) if model in chosen else "" for model in models]
            lines.append(f"| {_name(tool, version)} | {key[1]} | {' | '.join(cells)} |")
    different = {(row["tool"], row["model"]) for row in rows if _differs(row)}
    notes = [
        f"- {tool}, {LABELS.get(model, model)}: {text}."
        for (tool, model), text in reasons.items()
        if (tool, model) in different
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _differs(row: Mapping[str, Any]) -> bool:
    return "reason" in row or row["verdict"] not in ("equal", "rounding")


def _name(tool: str, version: str) -> str:
    """Name and version, which may begin with a version in the name."""
    name, _, last = tool.rpartition(" ")
    return f"{name if name and version.startswith(last) else tool} {version}".strip()


def _title(row: Mapping[str, Any]) -> str:
    note = row.get("note") or ""
    own = note and not note[0].isupper()  # the types of a GGUF file differ between models
    return f"{row.get('form', '')}, {note}" if own else str(row.get("form", ""))


def _cell(row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"]).replace("|", "/")
    parts = [f"{row['same']}/{row['count']}"] if row["count"] else []
    parts += [f"{row['ratio']:.4f} x"] if row["ratio"] is not None else []
    shown = ", ".join(parts)
    return f"{row['verdict']} ({shown})"
