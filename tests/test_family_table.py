"""The table of supported decoder types."""

from come.models.families import FAMILIES, REFUSED
from tests.decoders import DECODERS
from tests.family_table import FILE, page, supported


def test_table_is_up_to_date():
    assert FILE.read_text() == page(), "run python -m tests.family_table"


def test_at_least_105_types_are_supported():
    assert len(supported()) >= 105


def test_every_other_type_is_refused_with_a_reason():
    for model_type in DECODERS:
        assert (model_type in FAMILIES) != (model_type in REFUSED), model_type
