"""Every notebook runs and is saved with its outputs."""

import json
from pathlib import Path

import pytest

from come.merge.sensitivity.base import SENSITIVITY

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, pico_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert SENSITIVITY.names()  # discovers the entries before they are copied
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    namespace: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), namespace)
        if "MODEL" in namespace and "model" not in namespace:
            namespace |= {
                "MODEL": str(pico_folder),
                "TARGET_LAYERS": 22,
                "NUM_SAMPLES": 4,
                "SEQ_LEN": 32,
            }
    assert RESULTS[path.stem] in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_contains_its_outputs(path):
    text = path.read_text()
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    printed = "".join(line for o in outputs for line in o.get("text", ()))
    assert RESULTS[path.stem] in printed
    assert str(Path.home()) not in printed
    assert "/tmp/" not in printed
    assert len(text) < 400_000
    last = cells[-1]
    assert last["execution_count"] == len(cells), "cells were not run in order"


RESULTS = {
    "quickstart": "x dense:",
    "add_a_metric": "of the channels that CoMe keeps",
    "puzzle": "layers made of several: [[",
    "read_a_grid": "21 layers: ",
}
