"""Generation of mutants and the summary of their results."""

import ast

import pytest

from tests import mutations
from tests.mutants import summary

SOURCE = '''"""A module."""
from math import sqrt


def scale(values, factor: float = 2.0, *, shown=True):
    """Scales."""
    if not values:
        raise ValueError(f"values={values}: {1 + 1} at least")
    assert factor > 0
    total = 0
    for (value,) in zip(values, strict=True):
        total += value * factor
    print(total + 1)
    return mean(values, total, total, root=sqrt(total)) if total < 9 else None
'''


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(SOURCE)
    return list(mutations.mutants(tmp_path / "code.py"))


def test_every_kind_of_mutation(found):
    changes = {(mutant.kind, mutant.before, mutant.after) for mutant, _ in found}
    assert changes == {
        ("sign", "not values", "(values)"),
        ("number", "0", "(1)"),
        ("left out", "total += value * factor", "pass"),
        ("operator", "value * factor", "(value / factor)"),
        ("comparison", "total < 9", "(total <= 9)"),
        ("number", "9", "(10)"),
        (
            "without root",
            "mean(values, total, total, root=sqrt(total))",
            "(mean(values, total, total))",
        ),
        (
            "arguments exchanged",
            "mean(values, total, total, root=sqrt(total))",
            "(mean(total, values, total, root=sqrt(total)))",
        ),
    }


def test_a_mutant_changes_one_line(found):
    for mutant, source in found:
        ast.parse(source)
        assert source != SOURCE
        before, after = SOURCE.splitlines(), source.splitlines()
        different = [i + 1 for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert different == [mutant.line]


def test_summary_counts_and_lists_survivors():
    found = {
        "a": {"outcome": "killed"},
        "b": {"outcome": "survived"},
        "c": {"outcome": "killed by a command"},
        "d": {"outcome": "not run"},
    }
    lines = summary(found, 40).splitlines()
    assert lines[:2] == ["survived: b", "not run: d"]
    assert lines[2].startswith("2 of 4 killed: 50.0% [")
    assert lines[2].endswith("of 40 mutants")
