"""Uploading to the Hugging Face hub, only when asked; whether it can work is found out before anything is computed."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from preftree.errors import RunError
from preftree.io.hub import hub_host, hub_reachable


def hub_repository(asked: str | None, folder: Path) -> str:
    """The repository that --hub_model_id names, or the one named after the output folder."""
    return asked or folder.absolute().name


def check_writable(
    repository: str, *, private: bool = True, token: str | bool | None = None, flag: str = "--push"
) -> None:
    """Make the repository where there is none, and raise RunError where it cannot be written.

    Args:
        repository: ORGANIZATION/NAME.
        flag: what asked for it, for the message.
    """
    if constants.HF_HUB_OFFLINE:
        raise RunError(f"{flag} {repository}: HF_HUB_OFFLINE is set. Unset it, or leave the flag out.")
    if not hub_reachable():
        raise RunError(f"{flag} {repository}: {hub_host()} has no address here. Check the network, or leave it out.")
    try:
        HfApi(token=token).create_repo(repository, private=private, exist_ok=True)
    except LocalTokenNotFoundError:
        raise RunError(
            f"{flag} {repository} needs a token of the hub: hf auth login, or the variable HF_TOKEN."
        ) from None
    except HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", None)
        why = {401: "the token is wrong or missing", 403: "the token may not write there"}.get(
            status or 0, str(problem).strip().splitlines()[0] if str(problem).strip() else "the hub refuses it"
        )
        raise RunError(
            f"{flag} {repository}: {why}. Log in by `hf auth login` with a token that may write."
        ) from problem
    except (HFValidationError, OSError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise RunError(f"{flag} {repository}: {first}") from problem


def upload(repository: str, folder: Path, *, private: bool = True, token: str | bool | None = None) -> str:
    """Upload all files of a folder but checkpoints in one commit; returns the address.

    Args:
        repository: ORGANIZATION/NAME, or NAME for one of the token's own user.

    Raises:
        RunError: the upload failed; the folder is complete.
    """
    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload by preftree",
            ignore_patterns=[".*", "checkpoint-*/**", "run/votes.jsonl"],
        )
    except (HfHubHTTPError, OSError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise RunError(f"{folder} is complete, and could not be uploaded to {repository}: {first}") from problem
    return str(done.commit_url)
