"""Compressed networks in folders and on the Hugging Face Hub: the network, its artifact, its report and a model card.

Names are imported on first use: `download` brings the artifact to a machine without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swincompress_pl.hub.folder import from_pretrained as from_pretrained
    from swincompress_pl.hub.folder import save_pretrained as save_pretrained
    from swincompress_pl.hub.remote import download as download
    from swincompress_pl.hub.remote import push_to_hub as push_to_hub

_MODULE_OF = {"download": "remote", "from_pretrained": "folder", "push_to_hub": "remote", "save_pretrained": "folder"}
__all__ = ["download", "from_pretrained", "push_to_hub", "save_pretrained"]  # imported on first use


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
