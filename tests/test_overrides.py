"""Overrides that Hydra cannot parse give a one-line error with a correction."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from come.cli.errors import user_line
from tests.bases import save_base
from tests.jobs import prepare_job


@pytest.mark.parametrize(
    "value",
    [
        "/x/model (copy)",
        "/x/a=b",
        "/x/a#b",
        "/x/modèl",
        "/x/it's (a)",
        '/x/a"(b',
        "/x/{a}",
        "/x/[a]b",
        "/x/${a}(b)",
        "/x/模型",
    ],
)
def test_error_shows_how_to_quote_a_path(value):
    parser = OverridesParser.create()
    with pytest.raises(OverrideParseException) as caught:
        parser.parse_overrides([f"model.path={value}"])
    line = user_line(caught.value)
    assert "\n" not in line
    (word,) = shlex.split(line.rpartition("for Hydra: ")[2])
    read = parser.parse_override(word)
    assert read.key_or_group == "model.path"
    assert read.value().replace("\\${", "${") == value


def test_folder_name_with_special_characters(tmp_path):
    base = save_base(tmp_path / "model (copy), é=1", "llama_gqa")
    assert prepare_job(base, tmp_path / "out").checkpoint == base


def test_error_messages(command_line):
    for override, parts in (
        ("merge.m=two", ["merge.m=two: must be a whole number"]),
        ("merge.sparsity=much", ["merge.sparsity=much: must be a number"]),
        ("merge.save_weights=maybe", ["merge.save_weights=maybe: must be true or false"]),
        (
            "merge.targt_layers=3",
            ["merge.targt_layers: no such", "did you mean merge.target_layers"],
        ),
        ("+foo.bar=3", ["foo: no such setting (come --cfg job"]),
        ("+merge.m_=3", ["merge.m_: no such setting; did you mean merge.m"]),
        ("mege=come", ["mege: no such setting", "did you mean merge", "come --cfg job"]),
        ("merge.sensitivity=comme", ["merge.sensitivity='comme'", "did you mean 'come'"]),
        (
            "merge.operator=replaceme",
            ["merge.operator=replaceme is now merge.operator=drop merge.refit=replaceme"],
        ),
        ("eval.speed=false", ["eval.speed is now a list with or without it"]),
        ("eval=zero_shot eval.path=x", ["eval.path is now eval.perplexity.path"]),
        ("merge.refit_lambda=1", ["merge.refit_lambda is now merge.refit.lambda"]),
        ("merge.refit.lamda=1", ["merge.refit.lamda: the chosen merge.refit has no such setting"]),
        ("merge=kome", ["merge=kome: no such choice", "did you mean come", "shortgpt"]),
        ("merge.m=2,3", ["merge.m=2,3", "--multirun", "merge.m=[2,3]"]),
    ):
        code, printed = command_line(*override.split(" "))
        assert code == 1
        assert len(printed.strip().splitlines()) == 1
        assert all(part in printed for part in parts), printed
