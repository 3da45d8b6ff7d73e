"""Published weights: what is fetched is said before, and a failure says how to do without the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from lightning.pytorch.utilities import rank_zero_info

_REMEDY = (
    "to use a file instead, give checkpoint_path (in a config or on the command line --model.checkpoint_path FILE, "
    "with --model.model_kwargs.pretrained false)"
)


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
    rank_zero_info(f"{name}: taking the weights {source}, from its cache or the network; {_REMEDY}")
    try:
        yield
    except Exception as error:
        reason = _failure(error)
        if reason is None:
            raise
        raise ConnectionError(f"{name}: the weights {source} cannot be fetched ({reason}); {_REMEDY}") from error


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
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) or type(link).__module__.split(".")[0].startswith(("httpx", "requests", "urllib")):
            reason = " ".join(str(link).split()) or type(link).__name__
        link = link.__cause__ or link.__context__
    return reason
