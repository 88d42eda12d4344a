"""The table of supported decoder types."""

import re
from pathlib import Path

from come.models import families
from come.models.families import FAMILIES, REFUSED
from tests.decoders import DECODERS
from tests.family_table import FILE, page, supported

FOLDER, EXTEND = Path(families.__file__).parent, FILE.with_name("extend.md")


def test_table_is_up_to_date():
    assert FILE.read_text() == page(), "run python -m tests.family_table"


def test_at_least_120_types_are_supported():
    assert len(supported()) >= 120


def test_the_example_of_a_family_is_code_of_the_package():
    section = EXTEND.read_text().split("## A decoder family")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert any(example in path.read_text() for path in FOLDER.glob("*.py"))


def test_every_other_type_is_refused_with_a_reason():
    for model_type in DECODERS:
        assert (model_type in FAMILIES) != (model_type in REFUSED), model_type
