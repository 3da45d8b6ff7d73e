"""timm's Swin and Swin v2: adapter, pruning groups, graph."""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.models.swin.adapter import SwinAdapter

__all__ = ["SwinAdapter"]


def __getattr__(name: str) -> object:
    return find_old_name("models.swin", name)
