"""Progress output if stderr is not a terminal."""

import time

import come.progress
from come.progress import ProgressBar


def test_prints_a_line_per_interval(capsys, monkeypatch):
    monkeypatch.setattr(come.progress, "INTERVAL", 0.05)
    with ProgressBar(total=40, desc="layers", unit="batch") as bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.set_postfix_str("layer")  # refreshes the bar without printing a line
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("layers: ") and " of 40, 00:0" in line for line in lines)
    assert "about 00:0" in lines[-1]


def test_short_and_hidden_bars_print_nothing(capsys, monkeypatch):
    list(ProgressBar(range(3), desc="short"))
    monkeypatch.setattr(come.progress, "INTERVAL", 0.0)
    list(ProgressBar(range(3), desc="hidden", shown=False))
    assert capsys.readouterr().err == ""


def test_a_bar_whose_beginning_was_interrupted_can_be_closed():
    bar = ProgressBar.__new__(ProgressBar)
    bar.close()
