"""Every notebook runs from its first cell to its last, at a small size, and holds no output."""

import json
from pathlib import Path

import pytest

from come.merge.sensitivity.base import SENSITIVITY

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, pico_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert SENSITIVITY.names()  # found before the copy is taken
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
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


RESULTS = {
    "quickstart": "x dense:",
    "add_a_metric": "of the channels that CoMe keeps",
    "puzzle": "layers made of several: [[",
    "read_a_grid": "21 layers: ",
}
