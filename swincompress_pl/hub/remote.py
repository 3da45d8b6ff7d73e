"""The Hugging Face Hub: `download` and `push_to_hub`. huggingface_hub is imported where it is used; torch is not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swincompress_pl.hub.contents import ARTIFACT, CARD, CONFIG, FILES, LIBRARY, altered, read_config
from swincompress_pl.hub_errors import chain, meaning


def download(
    place: str | Path,
    files: Sequence[str] = (CONFIG, ARTIFACT),
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Fetches files of a repository, without torch: `accel.load(download("me/vit") / "artifact.safetensors")`.

    Args:
        place: "OWNER/NAME" of the Hugging Face Hub, or a folder, which is returned as it is.
        files: Names of the files.
        revision: Branch, tag or commit of the repository.
        cache_dir: Where downloads are kept; None for huggingface_hub's cache.
        token: Token of the Hub; None for the one that you logged in with.

    Returns:
        The folder with the files that there are.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If `place` is no name of a repository, or there is no such repository or revision.
        ConnectionError: If the repository is not in the cache and cannot be fetched.
        PermissionError: If the Hub refuses the token.
        ImportError: If huggingface_hub is not installed.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if not isinstance(place, str) or place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise FileNotFoundError(f"{place}: there is no such folder; give one, or OWNER/NAME of the Hugging Face Hub")
    library = _library()
    try:
        found = library.snapshot_download(
            place, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=list(files)
        )
    except Exception as error:
        raise _meant(error, f"{place}: cannot be fetched from the Hugging Face Hub") from error
    return Path(found)


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Add the compressed network",
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publishes a folder that `save_pretrained` wrote, in one commit.

    Read its README.md first: the license is yours to choose. Files of this package that the folder does not have, such
    as the artifact of an earlier version, are removed from the repository; others there stay.

    Args:
        folder: The folder.
        repository: "OWNER/NAME"; it is made if it does not exist.
        private: Whether a new repository is private; None for the default of its owner.
        revision: Branch to commit to; None for the main one.
        message: Message of the commit.
        create_pr: Whether to propose the commit instead.
        token: Token of the Hub with the right to write; None for the one that you logged in with.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If the folder holds no network.
        ValueError: If `repository` is no such name, or a file is another one than config.json lists.
        PermissionError: If the Hub refuses the token.
        ConnectionError: If the Hub cannot be reached.
        ImportError: If huggingface_hub is not installed.
    """
    source = Path(folder)
    config = read_config(source)
    mixed = [name for name in altered(source, config) if name != CARD]  # which is yours to edit
    if mixed:
        raise ValueError(
            f"{source}: {', '.join(mixed)} and {CONFIG} are of different saves, such as one that was interrupted; save "
            "the network again"
        )
    if not isinstance(repository, str) or repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"repository is {repository!r}; give OWNER/NAME")
    present = [CONFIG, *(name for name in FILES if (source / name).exists())]
    api = _library().HfApi(token=token, library_name=LIBRARY)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=source,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            allow_patterns=present,
            delete_patterns=[name for name in FILES if name not in present],
        )
    except Exception as error:
        raise _meant(error, f"{repository}: cannot be published on the Hugging Face Hub") from error
    return str(commit.commit_url)


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"the Hugging Face Hub needs huggingface_hub, which cannot be imported ({error}); run "
            "`pip install huggingface_hub`"
        ) from error


def _meant(error: Exception, what: str) -> Exception:
    """The error to raise: what went wrong, and what to do."""
    absent = meaning(error)
    if absent is not None:
        return ValueError(f"{what}: {absent}")
    reason = type(error).__name__
    for link in chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status in (401, 403):
            return PermissionError(f"{what}: the token has no right to do so (HTTP {status}); run `hf auth login`")
        if type(link).__name__ in ("HFValidationError", "BadRequestError"):
            return ValueError(f"{what}: {' '.join(str(link).split())}")
        reason = " ".join(str(link).split()) or reason
    return ConnectionError(f"{what} ({reason}); check the connection, or give a folder")
