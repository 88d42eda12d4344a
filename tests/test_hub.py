"""`hub.push` by the real client of the hub, to a server on this machine, and back."""

import json
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from transformers import AutoModelForCausalLM

from come.export import hub
from come.merge.saving import PLAN, plan_path
from tests.bases import save_base
from tests.hub_server import hub_server
from tests.jobs import run_job

REPO, TOKEN = "me/smaller", "hf_a_token_that_nothing_prints"

pytestmark = pytest.mark.usefixtures("private_caches")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go to the server
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as found:
        monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=found.url))
        yield found


def test_a_pushed_model_is_the_one_that_was_measured(server, tmp_path):
    base, folder = save_base(tmp_path / "base", "llama_gqa"), tmp_path / "run"
    run_job(base, folder, "eval=none", f"hub.push={REPO}")
    repository = server.repositories[REPO]
    assert repository.private
    assert repository.commits == ["Upload the model"]
    model = folder / "model"
    local = {path.relative_to(model).as_posix(): path for path in model.rglob("*")}
    assert repository.files.keys() == {name for name, path in local.items() if path.is_file()}
    for name, data in repository.files.items():
        text = local[name].read_bytes()
        assert data == (text.replace(hub.PLACEHOLDER.encode(), REPO.encode()))
    assert REPO.encode() in repository.files["README.md"]
    assert json.loads(repository.files[PLAN])["steps"]
    assert server.tokens == {TOKEN}
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]

    back = snapshot_download(REPO, endpoint=server.url, cache_dir=tmp_path / "cache")
    ids = torch.arange(12)[None]
    found, expected = (
        AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (back, model)
    )
    assert torch.equal(found, expected)
    assert plan_path(model).read_bytes() == repository.files[PLAN]


def test_a_refusal_is_one_line_and_the_next_push_goes_on(server, tmp_path):
    base, words = save_base(tmp_path / "base", "llama_gqa"), ("eval=none", f"hub.push={REPO}")
    server.refused = 403
    with pytest.raises(
        ValueError, match=r"hub.push=me/smaller: .*403.* run the same command again"
    ):
        run_job(base, tmp_path / "run", *words)
    assert server.repositories[REPO].files == {}
    server.refused = 0
    run_job(base, tmp_path / "run", *words)
    assert PLAN in server.repositories[REPO].files


def test_a_public_repository_is_not_pushed_to_by_default(server, tmp_path):
    HfApi(endpoint=server.url).create_repo(REPO, private=False)
    base = save_base(tmp_path / "base", "llama_gqa")
    with pytest.raises(ValueError, match="is there and public; hub.private=false pushes to it"):
        run_job(base, tmp_path / "run", "eval=none", f"hub.push={REPO}")
    assert server.repositories[REPO].files == {}
