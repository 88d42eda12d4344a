"""Some of the golden values: a choice of methods and families; all are `python -m tests.golden`."""

import json

import pytest

from tests.golden import FILE, cases, values

KNOWN = json.loads(FILE.read_text())
EVERY = 17  # of the cases; all families are among them


@pytest.mark.parametrize(("name", "family", "method"), list(cases())[::EVERY])
def test_golden_values(name, family, method):
    found, known = values(family, method()), dict(KNOWN[name])
    assert float(found.pop("size")) == pytest.approx(float(known.pop("size")), rel=1e-4)
    assert known.items() <= found.items()
