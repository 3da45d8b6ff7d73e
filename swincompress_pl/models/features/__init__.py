"""timm's feature extractors (`features_only=True`) around ViT and Swin: adapter, pruning groups, graph."""

from swincompress_pl.models.features.adapter import FeatureAdapter

__all__ = ["FeatureAdapter"]
