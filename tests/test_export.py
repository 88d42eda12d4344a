"""`export=gguf` and `hub.push`, with a fake converter and a fake hub."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

import come
from come.cli.words import check_sweep
from come.export import hub
from come.merge.saving import PLAN
from come.schema.export import ExportSettings, HubSettings
from tests.jobs import job_settings, run_job

REPO = "me/smaller"
CONVERTER = """
import sys
from pathlib import Path
model, _, path, _, kind = sys.argv[1:]
assert (Path(model) / "config.json").is_file()
Path(path).write_text(kind)
"""


class FakeHub:
    """A hub with at most one repository: None, or its visibility and file names."""

    def __init__(self, repository=None, error=None):
        self.repository, self.error = repository, error
        self.created, self.commits = [], []

    def __call__(self):
        return self

    def model_info(self, repo):
        if self.repository is None:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        private, names = self.repository
        files = [SimpleNamespace(rfilename=name) for name in names]
        return SimpleNamespace(private=private, siblings=files)

    def create_repo(self, repo, **options):
        if self.error is not None:
            raise self.error
        self.created.append((repo, options))

    def create_commit(self, repo, operations, **options):
        self.commits.append({operation.path_in_repo: operation for operation in operations})
        return SimpleNamespace(commit_url=f"address of {repo}")


@pytest.fixture
def fake(monkeypatch):
    def use(*given, **options):
        found = FakeHub(*given, **options)
        monkeypatch.setattr(hub, "HfApi", found)
        return found

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return use


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a finished run, in as far as it is read here."""
    model = tmp_path / "run" / "model"
    (model / "come").mkdir(parents=True)
    (model / PLAN).write_text("{}")
    (model / "README.md").write_text(f'from_pretrained("{hub.PLACEHOLDER}")')
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    (model.parent / "result.json").write_text("{}")
    return model.parent


def test_push_in_one_private_commit(fake, run_folder):
    api = fake()
    assert come.push_to_hub(run_folder, REPO) == f"address of {REPO}"
    assert api.created == [(REPO, {"private": True, "exist_ok": True})]
    (commit,) = api.commits
    assert set(commit) == {"README.md", PLAN, "config.json", "model.safetensors"}
    assert commit["README.md"].path_or_fileobj == f'from_pretrained("{REPO}")'.encode()
    weights = commit["model.safetensors"].path_or_fileobj
    assert weights == str(run_folder / "model" / "model.safetensors")
    assert hub.PLACEHOLDER in (run_folder / "model" / "README.md").read_text()


@pytest.mark.parametrize(("repository", "private", "message"), [
    ((False, [PLAN]), True, "is there and public; hub.private=false pushes to it"),
    ((True, ["a.safetensors"]), True, f"holds another model, without {PLAN}"),
    ((False, ["a.safetensors"]), False, "holds another model"),
    ((True, ["README.md", ".gitattributes"]), True, None),
    ((False, [PLAN, "a.safetensors"]), False, None),
])  # fmt: skip
def test_push_to_an_existing_repository(repository, private, message, fake, run_folder):
    api = fake(repository)
    if message is None:
        come.push_to_hub(run_folder, REPO, private=private)
        assert len(api.commits) == 1
        return
    with pytest.raises(ValueError, match=message):
        come.push_to_hub(run_folder, REPO, private=private)
    assert not api.created
    assert not api.commits


@pytest.mark.parametrize(("missing", "message"), [
    ("result.json", "has no result.json; it is not a finished run"),
    ("model/model.safetensors", "no model with weights"),
    (f"model/{PLAN}", "is not a finished model with weights, plan and card"),
    ("model/README.md", "is not a finished model"),
])  # fmt: skip
def test_only_what_is_finished_is_pushed(missing, message, fake, run_folder):
    api = fake()
    (run_folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        come.push_to_hub(run_folder, REPO)
    assert not api.created


def test_failure_of_the_hub_is_one_line(fake, run_folder):
    fake(error=OSError("no\nnetwork"))
    with pytest.raises(ValueError, match="hub.push=me/smaller: no network. The run is finished"):
        come.push_to_hub(run_folder, REPO)


@pytest.mark.parametrize("name", ["smaller", "me/smaller/x", "me/sm aller", "me/-x"])
def test_names_of_repositories(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(ValueError, match=f"hub.push={name}: must be USER/NAME"):
        HubSettings(push=name).check()
    HubSettings(push=REPO).check()


def test_jobs_of_a_sweep_do_not_share_a_repository(command_line):
    words = ("merge.m=2,3", "-m")
    code, output = command_line(*words, f"hub.push={REPO}")
    assert code == 1
    assert "every job of the sweep would push to this repository; name it after what" in output
    check_sweep(["hub.push=null", "hub.push=a/b,a/c", "hub.push=a/${merge.m}", "merge.m=2,3"])


def test_push_needs_a_token(monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="log in once with `hf auth login`, or set HF_TOKEN"):
        HubSettings(push=REPO).check()


def test_converter_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="convert_hf_to_gguf.py is not on the PATH"):
        ExportSettings(format="gguf").check()
    with pytest.raises(ValueError, match=f"is not at export.converter={tmp_path}"):
        ExportSettings(format="gguf", converter=str(tmp_path)).check()
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    script.chmod(0o755)
    for converter in (None, str(tmp_path), str(script)):
        ExportSettings(format="gguf", converter=converter).check()
    with pytest.raises(ValueError, match=r"export.types=\[\]"):
        ExportSettings(format="gguf", types=[]).check()
    with pytest.raises(ValueError, match="must be a list of f32, f16, bf16, q8_0, auto"):
        ExportSettings(format="gguf", types=["q4_k_m"])


def test_failed_conversion_leaves_no_file(run_folder, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("import sys; open(sys.argv[3], 'w').close(); raise KeyError('rope')")
    with pytest.raises(ValueError, match="export=gguf: failing.py failed: KeyError: 'rope'"):
        come.export_gguf(run_folder, converter=str(script))
    assert {path.name for path in run_folder.iterdir()} == {"model", "result.json"}


@pytest.mark.parametrize("words", [("merge=none", "merge.target_layers=null"),
                                   ("merge.save_weights=false",)])  # fmt: skip
def test_there_must_be_a_model(words, base, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(ValueError, match=f"hub.push: {words[0]}"):
        job_settings(base, *words, f"hub.push={REPO}")


@pytest.mark.usefixtures("private_caches")
def test_finished_job_is_exported_and_pushed(fake, base, tmp_path):
    """A job pushes when it has finished; the same command pushes again and runs nothing."""
    api, folder = fake(), tmp_path / "out"
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    first = run_job(base, folder, "eval=none", f"hub.push={REPO}")
    words = ("export=gguf", "export.types=[f16,q8_0]", f"export.converter={script}")
    again = run_job(base, folder, "eval=none", *words, f"hub.push={REPO}", "hub.private=false")
    assert again["job"] == first["job"] == json.loads((folder / "result.json").read_text())["job"]
    assert [options["private"] for _, options in api.created] == [True, False]
    assert api.commits[0].keys() == api.commits[1].keys() >= {"README.md", PLAN, "tokenizer.json"}
    card = api.commits[0]["README.md"].path_or_fileobj.decode()
    assert f'from_pretrained("{REPO}"' in card
    assert [(folder / f"model-{kind}.gguf").read_text() for kind in ("f16", "q8_0")] == [
        "f16", "q8_0"
    ]  # fmt: skip
