"""Published weights: what is fetched is said before, and a failure says how to do without the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from lightning.pytorch.utilities import rank_zero_info

from swincompress_pl.hub_errors import chain, meaning

_REMEDY = (
    "to use a file instead, give checkpoint_path (in a config or on the command line --model.checkpoint_path FILE, "
    "with --model.model_kwargs.pretrained false)"
)

_ONLINE = "go online once so that it gets into the cache, or give a folder"
_DAMAGED = ("SafetensorError", "UnpicklingError")


@contextmanager
def announced(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Says where timm takes the weights of a model from; a ConnectionError with the remedy if it cannot get them.

    Args:
        name: Name of a model of timm, with a tag or without.
        kwargs: The other arguments of `timm.create_model`.
    """
    source = _source(name, kwargs)
    if source is None:
        yield
        return
    with announced_source(name, f"the weights {source}", _REMEDY):
        yield


@contextmanager
def announced_source(name: str, what: str, remedy: str = _ONLINE) -> Iterator[None]:
    """Says what is fetched; errors as those of `fetching`."""
    rank_zero_info(f"{name}: taking {what}, from its cache or the network; {remedy}")
    with fetching(name, what, remedy):
        yield


@contextmanager
def fetching(name: str, what: str, remedy: str = _ONLINE) -> Iterator[None]:
    """Names what could not be fetched or read, why, and what to do.

    Args:
        name: The network.
        what: What is fetched, such as "config.json".
        remedy: What to do if it cannot be fetched.

    Raises:
        ConnectionError: If it cannot be fetched.
        PermissionError: If a file may not be read.
        ValueError: If the Hugging Face Hub has no such repository, revision or file, or weights are damaged.
    """
    try:
        yield
    except Exception as error:
        absent = meaning(error)
        if absent is not None:
            raise ValueError(f"{name}: {what} cannot be fetched: {absent}") from error
        denied = next((link for link in chain(error) if isinstance(link, PermissionError)), None)
        if denied is not None:
            raise PermissionError(f"{name}: {what} cannot be read ({denied}); give read access to it") from error
        if type(error).__name__ in _DAMAGED:
            raise ValueError(f"{name}: {what} are damaged ({error}); delete them and fetch them again") from error
        reason = _failure(error)
        if reason is None:
            raise
        raise ConnectionError(f"{name}: {what} cannot be fetched ({reason}); {remedy}") from error


def _source(name: str, kwargs: Mapping[str, Any]) -> str | None:
    """What timm fetches for a model; None if it takes a local file, or has nothing to fetch."""
    told = kwargs.get("pretrained_cfg_overlay")
    overlay = told if isinstance(told, Mapping) else {}
    if "pretrained_cfg" in kwargs or overlay.get("file") or overlay.get("state_dict"):
        return None
    published = timm.models.get_pretrained_cfg(name)
    hub = overlay.get("hf_hub_id", getattr(published, "hf_hub_id", None))
    address = overlay.get("url", getattr(published, "url", None))
    if hub:
        return f"{hub} of the Hugging Face Hub"
    return f"at {address}" if address else None


def _failure(error: BaseException) -> str | None:
    """Why a transfer failed, the innermost reason; None if the error is none of a transfer."""
    reason: str | None = None
    for link in chain(error):
        if isinstance(link, OSError) or type(link).__module__.split(".")[0].startswith(("httpx", "requests", "urllib")):
            reason = " ".join(str(link).split()) or type(link).__name__
    return reason
