"""timm's Swin and Swin v2: adapter, pruning groups, graph."""

from swincompress_pl.models.swin.adapter import SwinAdapter

__all__ = ["SwinAdapter"]
