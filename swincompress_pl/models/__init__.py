"""The networks: factories, the LightningModule, and what each family tells pruning and quantization about itself."""

from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.models import spiking, swin, vit  # importing them registers their adapters
from swincompress_pl.models.classifier import CompressibleClassifier
from swincompress_pl.models.factory import create_model, rebuild

__all__ = ["CompressibleClassifier", "CompressionMixin", "create_model", "rebuild", "spiking", "swin", "vit"]
