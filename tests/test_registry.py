"""Registries: discovery, provenance and error messages."""

import pytest

from come.data.sources.base import TEXT
from come.merge.operators.base import OPERATORS
from come.merge.refit.base import REFITS
from come.merge.retention.base import RETENTION
from come.merge.schedules.base import SCHEDULES
from come.merge.selection.base import SELECTION
from come.merge.sensitivity.base import SENSITIVITY
from come.registry import Registry, load_plugin

REGISTRIES = [OPERATORS, SENSITIVITY, SELECTION, RETENTION, SCHEDULES, REFITS, TEXT]
COSINES = ("sbi", "angular", "bi_sum")  # these scores share one file


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_module_name_is_registry_name(registry):
    assert registry.names()
    for name in registry.names():
        cls = registry.get(name)
        file = "cosine" if name in COSINES else name
        assert cls.__module__ == f"{registry.package}.{file}"
        assert cls.source
        assert cls.__doc__
        assert cls.paper == "" or cls.paper[4] == "."


def test_register_a_class(monkeypatch):
    assert SENSITIVITY.names()
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))

    @SENSITIVITY.register
    class Mine(SENSITIVITY.get("random")):
        name = "mine"

    assert "mine" in SENSITIVITY.names()
    assert SENSITIVITY.create("mine", {"seed": 5}).seed == 5
    with pytest.raises(ValueError, match="'mine' is already registered"):

        @SENSITIVITY.register
        class Other(SENSITIVITY.get("random")):
            name = "mine"


def plugin(folder, name):
    path = folder / f"{name}.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from come.merge.sensitivity.base import SENSITIVITY, SensitivityMetric\n"
        "@SENSITIVITY.register\n@dataclass\n"
        "class Own(SensitivityMetric):\n"
        f"    name = '{name}'\n    paper = ''\n    source = 'test'\n"
        "    def score(self, inputs):\n        return inputs.weight.double().sum(0)\n"
    )
    return path


def test_plugin_cannot_replace_a_package_entry(tmp_path, monkeypatch):
    assert SENSITIVITY.names()
    monkeypatch.setattr(SENSITIVITY, "_entries", dict(SENSITIVITY._entries))
    for _ in range(2):
        load_plugin(plugin(tmp_path, "mine_alone"))
    assert SENSITIVITY.get("mine_alone").__name__ == "Own"
    taken = r"'wanda' is already registered by come.merge.sensitivity.wanda.Wanda"
    with pytest.raises(ValueError, match=taken):
        load_plugin(plugin(tmp_path, "wanda"))
    assert SENSITIVITY.get("wanda").__module__ == "come.merge.sensitivity.wanda"
    with pytest.raises(ValueError, match="which is not a file"):
        load_plugin(tmp_path / "nowhere.py")


def test_class_without_a_name_is_rejected():
    registry = Registry("thing", "come.merge.sensitivity", "merge.thing")
    with pytest.raises(TypeError, match="needs a class attribute 'name'"):

        @registry.register
        class Nameless:
            pass


def test_unknown_setting_and_renamed_entry():
    with pytest.raises(ValueError, match="merge.sensitivity.sed: .*no such setting; did you mean"):
        SENSITIVITY.create("random", {"sed": 1})
    with pytest.raises(ValueError, match="merge.schedule=cheapest is now .*optimal_partition"):
        SCHEDULES.get("cheapest")
