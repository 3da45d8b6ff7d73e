"""timm's ViT and DeiT: adapter, pruning groups, graph."""

from swincompress_pl.models.vit.adapter import VisionTransformerAdapter

__all__ = ["VisionTransformerAdapter"]
