# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Files on a model hub: download and upload, and one sentence that says what to do when that fails."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download

SCHEME = "hf:/"  # pathlib folds two slashes into one, and anomalib's checkpoints turn paths into strings and back
_LOGIN = "log in with 'hf auth login', with a token that may {verb} {repo}."


class HubError(OSError):
    """The hub cannot do what was asked; the last sentence says what to do."""


def download(place: str) -> Path:
    """Fetch ``hf://owner/repo/file`` (``owner/repo@revision`` pins one) into the hub's cache.

    The hub is ``HF_ENDPOINT``, where that is set.

    Returns:
        Path: The file in the cache.

    Raises:
        ValueError: If the address is not complete.
        HubError: If there is no such file, it may not be read, or the hub cannot be reached.
    """
    parts = place.removeprefix("hf:").lstrip("/").split("/")
    if len(parts) < 3 or not all(parts):
        msg = f"adapter {place!r}: write hf://owner/repo/file."
        raise ValueError(msg)
    name, _, revision = parts[1].partition("@")
    repo = f"{parts[0]}/{name}"
    with _explained(repo, "read"):
        path = hf_hub_download(repo, "/".join(parts[2:]), revision=revision or None, endpoint=_endpoint())
    return Path(path)


def upload(folder: str | Path, repo_id: str, message: str, private: bool = False) -> None:
    """Put the files of a folder into a repository of the hub, which is made if it does not exist.

    Args:
        folder: Folder whose files are uploaded.
        repo_id: ``owner/name``.
        message: Message of the commit.
        private: Make a new repository private.

    Raises:
        HubError: If the hub refuses or cannot be reached.
    """
    api = HfApi(endpoint=_endpoint())
    with _explained(repo_id, "write to"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def _explained(repo: str, verb: str) -> Generator[None, None, None]:
    """Turn what the hub's client raises into a :class:`HubError` that ends in what to do."""
    try:
        yield
    except Exception as error:
        # The client's transport, and with it the errors of a broken connection, differ from version to version.
        said = " ".join([line for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
        msg = f"hub repository {repo!r}: {said.rstrip(' .')}. To go on, {_advice(error, repo, verb)}"
        raise HubError(msg) from error


def _advice(error: Exception, repo: str, verb: str) -> str:
    login = _LOGIN.format(verb=verb, repo=repo)
    denied = getattr(getattr(error, "response", None), "status_code", None) in {401, 403}
    reading = verb == "read"
    # From the special to the general: a gated repository is also one that is not found, a broken connection also a
    # missing local entry.
    cases = (
        (isinstance(error, errors.OfflineModeIsEnabled), "unset HF_HUB_OFFLINE, or give the path of a local file."),
        (isinstance(error, errors.GatedRepoError), f"accept the conditions on the repository's page and {login}"),
        (isinstance(error, errors.HFValidationError), "write owner/name with letters, digits, '-', '_' and '.' only."),
        (isinstance(error, errors.RevisionNotFoundError), "give a branch, tag or commit that the repository has."),
        (
            isinstance(error, errors.RepositoryNotFoundError) and reading,
            f"check the name; if the repository is private, {login}",
        ),
        (denied or isinstance(error, errors.LocalTokenNotFoundError), login),
        (
            isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError),
            "check the name of the file on the repository's page.",
        ),
        (reading, "check the network and HF_ENDPOINT, or copy the file here by other means and give its path."),
    )
    return next((advice for applies, advice in cases if applies), "check the network and HF_ENDPOINT, and try again.")
