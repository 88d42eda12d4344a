"""Overrides that Hydra cannot parse give a one-line error with a correction."""

import shlex
from dataclasses import fields

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from come.cli.errors import setting_names, user_line
from come.cli.overrides import RENAMED
from come.cli.words import FLAGS, flag_words, read_flags
from come.schema import Settings
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
        (
            "experiment=smoke eval=none eval.perplexity.path=x",
            [
                "eval.perplexity.path: the evaluation perplexity is not chosen; list it, as in "
                "eval=[perplexity]"
            ],
        ),
        (
            "eval=perplexity eval.perplexity.pth=x",
            ["eval.perplexity.pth: no such", "did you mean eval.perplexity.path"],
        ),
        ("merge.refit_lambda=1", ["merge.refit_lambda is now merge.refit.lambda"]),
        ("merge.refit.lamda=1", ["merge.refit.lamda: the chosen merge.refit has no such setting"]),
        ("merge=kome", ["merge=kome: no such choice", "did you mean come", "shortgpt"]),
        ("--dryrun", ["--dryrun: no such flag; did you mean --dry-run?"]),
        ("--cfg jobs", ["--cfg/-c: invalid choice: 'jobs'", "'job'"]),
        ("--config-dir", ["--config-dir", "expected one argument"]),
        ("merge", ["merge: a value is missing; write merge=CHOICE"]),
        ("merge.refit", ["merge.refit: a value is missing; write merge.refit=CHOICE"]),
        ("merge.m", ["merge.m: a value is missing; write merge.m=VALUE"]),
        ("=3", ["=3: the name of a setting is missing; write KEY=3"]),
        ("merge.m=2 merge.m=3", ["merge.m is given twice, as merge.m=2 and merge.m=3; leave one"]),
        (
            "merge/refit=adam merge.refit=ridge",
            ["merge.refit is given twice, as merge/refit=adam and merge.refit=ridge"],
        ),
        ("merge.options.shortlist=3", ["merge.options.shortlist is now merge.selection.shortlist"]),
        ("+merge.options.x=3", ["merge.options.x is now a setting of a component"]),
        ("~merge.refit_lambda", ["merge.refit_lambda is now merge.refit.lambda"]),
        ("eval.name=perplexity", ["eval.name is now eval=NAME"]),
        ("merge.m=2,3", ["merge.m=2,3", "--multirun", "merge.m=[2,3]"]),
    ):
        code, printed = command_line(*override.split(" "))
        assert code == 1
        assert len(printed.strip().splitlines()) == 1
        assert all(part in printed for part in parts), printed


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("merge", "options: {shortlist: 3}", "shortlist is merge.selection.shortlist"),
        ("merge", "refit_lambda: 1", "merge.refit_lambda is now merge.refit.lambda"),
        ("experiment", "merge: {parts: [ffn]}", "merge.parts is now merge.sublayers"),
        ("experiment", "eval: {path: x}", "eval.path is now eval.perplexity.path"),
        ("experiment", "eval: {name: x}", "eval.name is now eval=NAME"),
        ("experiment", "eval: {perplexity: false}", "eval.perplexity is now eval="),
        (
            "experiment",
            "merge: {operator: replaceme}",
            "merge.operator=replaceme is now merge.operator=drop",
        ),
        (
            "experiment",
            "defaults: [override /merge/operator: replaceme]",
            "merge.operator=replaceme is now merge.operator=drop",
        ),
        ("experiment", "defaults: [override /ablation: x]", "ablation is now"),
        ("experiment", "ablation: x", "ablation is now"),
    ],
)
def test_former_keys_in_a_folder_of_own_choices(command_line, tmp_path, group, text, message):
    (tmp_path / "own" / group).mkdir(parents=True)
    package = "# @package _global_\n" if group == "experiment" else "defaults: [come, _self_]\n"
    (tmp_path / "own" / group / "mine.yaml").write_text(f"{package}{text}\n")
    code, printed = command_line(
        "--config-dir", str(tmp_path / "own"), f"{group}=mine", "eval=none"
    )
    assert (code, len(printed.strip().splitlines())) == (1, 1), printed
    assert printed.strip().startswith("error: ")
    assert message in printed


def test_former_keys_are_no_current_settings():
    current = {*setting_names()} - {"eval.perplexity", "eval.speed"}
    assert not current & {*RENAMED}


def test_flags_may_come_anywhere():
    flags, overrides = read_flags(["a=1", "-m", "b=2", "--config-dir", "x", "--dry-run", "c=3"])
    assert overrides == ["a=1", "b=2", "c=3"]
    assert flags.dry_run
    assert flag_words(flags) == ["--multirun", "--config-dir", "x"]


def test_flags_are_those_of_hydra():
    parser = get_args_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {*FLAGS} == known | {"--dry-run"}


def test_cfg_job_shows_the_values_of_a_job(command_line, text_file, tmp_path):
    def values(*overrides):
        code, printed = command_line("--cfg", "job", *overrides)
        assert code == 0, printed
        return yaml.safe_load(printed), printed

    shown, printed = values("eval=perplexity")
    assert shown["calibration"]["source"] == "pydocs"
    assert "target_layers: 21  # follows from the default merge.sparsity=0.1\n" in printed
    assert {*shown} == {entry.name for entry in fields(Settings)} - {"command"}
    found, _ = values(f"calibration.path={text_file}", f"eval.perplexity.path={text_file}")
    assert found["calibration"]["source"] == found["eval"]["perplexity"]["source"] == "text_file"
    for overrides, line in (
        (["merge.sparsity=0.2"], "target_layers: 18  # follows from merge.sparsity=0.2\n"),
        (["merge.save_at=[20,21]"], "target_layers: 20  # follows from merge.save_at\n"),
        (["merge.groups=[[0,1]]"], "target_layers: 23  # follows from merge.groups\n"),
        (["merge.target_layers=20"], "target_layers: 20\n"),
        (["merge=none"], "target_layers: null\n"),
        (["model.path=me/absent"], "target_layers: null  # follows from the default merge.spars"),
        (["merge.refit=ridge"], "- refit=ridge\n"),
    ):
        assert line in values(*overrides)[1]
    part, _ = values("-p", "merge.refit", "merge.refit=ridge")
    assert part["name"] == "ridge"
    assert values("experiment=smoke", "eval=none")[0]["eval"] == {}
    code, printed = command_line("--cfg", "job", "-p", "merge.nothing")
    assert (code, printed.strip()[:24]) == (1, "error: --package merge.n")
    assert not (tmp_path / "runs").exists()
