"""experiments/sink.py on hand-made hidden states."""

import pytest

from tests.commands import load_script
from tests.conftest import pico


def test_rows_after_merged_layers_and_before_the_last(windows):
    sink = load_script("sink")
    dense = sink.states(pico("llama_mha"), windows)
    merged = [dense[0], dense[1], 2 * dense[3], *dense[4:]]  # layers 1 and 2 merged
    merged[2][:, 1:] /= 2
    history = [[0], [1, 2], *[[i] for i in range(3, len(dense) - 1)]]
    found = dict(sink.rows(history, dense, merged))
    assert list(found) == ["1 to 2", str(len(dense) - 3)]
    assert found["1 to 2"] == pytest.approx([2, 1, 1, 0], abs=1e-6)
    assert found[str(len(dense) - 3)] == pytest.approx([1, 1, 0, 0], abs=1e-6)
