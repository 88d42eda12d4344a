"""Uploads a finished model with its card to the Hugging Face hub, by huggingface_hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from come.errors import one_line
from come.merge.saving import PLAN

log = logging.getLogger(__name__)

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the HTTP client's errors; versions of huggingface_hub have different clients."""

CARD = "README.md"
PLACEHOLDER = "FOLDER OR HUB ID"
"""What the card of a local folder has in place of the repository's name."""


def check_push(repo: str) -> None:
    """Checks what can be checked before a run.

    Raises:
        ValueError: `repo` is not USER/NAME, or there is no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"hub.push={repo}: must be USER/NAME ({one_line(error)})") from error
    if repo.count("/") != 1:
        raise ValueError(f"hub.push={repo}: must be USER/NAME")
    if not get_token():
        raise ValueError(
            f"hub.push={repo} needs a token that may write: log in once with `hf auth login`, or "
            "set HF_TOKEN"
        )


def push(model: Path, repo: str, *, private: bool = True) -> str:
    """Uploads a model folder in one commit; creates the repository if it does not exist.

    The card names the repository. The plan and its tensors are included, so that the repository
    can be the start of another run.

    Args:
        model: the model folder, with weights, plan and card.
        repo: "USER/NAME".
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder is not a finished model, or the repository is public though
            `private` is true, or it holds a model that this project did not write, or the hub
            cannot be reached or refuses.
    """
    files = sorted(path for path in model.rglob("*") if path.is_file())
    names = {path.relative_to(model).as_posix() for path in files}
    if not {CARD, PLAN, "config.json"} <= names or not any(model.glob("model*.safetensors")):
        raise ValueError(
            f"hub.push={repo}: {model} is not a finished model with weights, plan and card; let "
            "the run finish"
        )
    card = (model / CARD).read_text(encoding="utf-8").replace(PLACEHOLDER, repo)
    content = {CARD: card.encode()}
    operations = [
        CommitOperationAdd(name, content.get(name, str(model / name))) for name in sorted(names)
    ]
    api = HfApi()
    try:
        _check_repository(api, repo, private)
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Upload the model")
    except (_HTTP_ERROR, OSError) as error:
        raise ValueError(
            f"hub.push={repo}: {one_line(error)}. The run is finished; run the same command again"
        ) from error
    log.info("pushed to %s", commit.commit_url)
    return str(commit.commit_url)


def _check_repository(api: HfApi, repo: str, private: bool) -> None:
    try:
        known = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    if private and not known.private:
        raise ValueError(
            f"hub.push={repo}: the repository is there and public; hub.private=false pushes to it"
        )
    names = {file.rfilename for file in known.siblings or []}
    if PLAN not in names and any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"hub.push={repo}: the repository holds another model, without {PLAN}; choose a new "
            "name"
        )
