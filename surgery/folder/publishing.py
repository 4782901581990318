"""Hand a finished folder to the Hugging Face Hub: make the repository where there is none, and upload.

    require_login -> (the folder is made) -> publish -> the commit's address

Everything goes through huggingface_hub: its token (HF_TOKEN, or `hf auth login`), HF_ENDPOINT and HF_HUB_OFFLINE.
`upload_folder` it is, not `upload_large_folder`: with hf-xet it streams, resumes what was cut and splits large folders
by itself, and huggingface_hub 2.4 has no other any more. Nothing that a repository holds is deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import PublishError, SurgeryError
from surgery.source.hub import HubSource, explain

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository to write. `private` is asked of a new one, and required of one that exists."""

    repo_id: str
    private: bool = False
    endpoint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {"push_to": self.repo_id, "private": self.private}


@dataclass(frozen=True, slots=True)
class Published:
    """What was uploaded. `url` is the commit's, `files` and `size` (bytes) are the folder's."""

    repo_id: str
    url: str
    files: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {"repository": self.repo_id, "url": self.url, "files": self.files, "bytes": self.size}


def require_login(destination: Destination) -> str:
    """The user's name; before gigabytes are fetched and written, not after.

    Raises PublishError for a name that no repository can have, without a token, and where the Hub does not take it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(destination.repo_id)
    except HFValidationError as error:
        raise PublishError(f"{destination.repo_id!r} is no name of a repository: {error}") from None
    with _explained(destination):
        return str(_api(destination).whoami()["name"])


def publish(folder: Path, destination: Destination, message: str) -> Published:
    """Upload every file of `folder`. Files that the repository holds already are not sent again.

    Raises PublishError where the Hub refuses or cannot be reached, and where a repository that exists is public
    although a private one was asked for. The folder stays as it is.
    """
    files = uploads(folder)
    api, repo_id = _api(destination), destination.repo_id
    with _explained(destination, folder):
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
        if destination.private and not api.repo_info(repo_id).private:
            raise PublishError(f"{repo_id} exists and is public; nothing was uploaded", hint="name another repository")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return Published(repo_id, str(commit.commit_url), len(files), sum(files.values()))


def uploads(folder: Path) -> dict[str, int]:
    """What would be uploaded: each file and its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _api(destination: Destination) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=destination.endpoint, library_name="gemma4-surgery")


@contextlib.contextmanager
def _explained(destination: Destination, folder: Path | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and the libraries under it raise into one sentence."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # of any kind, where the Hub's JSON is not what they take for granted
        raise _explain(error, destination, folder) from error


def _explain(error: BaseException, destination: Destination, folder: Path | None) -> PublishError:
    from huggingface_hub import errors

    repo_id, namespace = destination.repo_id, destination.repo_id.partition("/")[0]
    kept = f"; {folder} is complete: `hf upload {repo_id} {folder}` sends it later" if folder is not None else ""
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PublishError(f"there is no token to write to {repo_id} with", hint=LOGIN)
    if status == 401:
        return PublishError(f"the Hub does not accept the token that was sent for {repo_id}", hint=f"{LOGIN}{kept}")
    if status in (403, 404):
        return PublishError(
            f"the token that was sent may not write to {repo_id}",
            hint=f"take a token that may write in {namespace}, or another name{kept}",
        )
    reason = explain(error, HubSource(repo_id, endpoint=destination.endpoint))
    return PublishError(f"{repo_id} was not written: {reason}", hint=f"{reason.hint or 'try again later'}{kept}")
