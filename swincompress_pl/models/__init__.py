"""The networks: factories, the LightningModule, and the adapters of the families for pruning and quantization."""

from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.models import (  # noqa: F401  # they register their adapters
    e_spikeformer,
    features,
    meta_spikeformer,
    spiking,
    swin,
    vit,
)
from swincompress_pl.models.classifier import CompressibleClassifier
from swincompress_pl.models.conversion import to_timm
from swincompress_pl.models.factory import create_model, preprocessing_for, rebuild
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.models.training import DistillationConfig, MixingConfig, OptimizationConfig

__all__ = [
    "CompressibleClassifier",
    "CompressionMixin",
    "DistillationConfig",
    "MixingConfig",
    "OptimizationConfig",
    "create_model",
    "preprocessing_for",
    "rebuild",
    "to_timm",
    "without_memory",
]


def __dir__() -> list[str]:
    return sorted(__all__)
