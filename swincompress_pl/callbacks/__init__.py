"""Lightning callbacks that prune and quantize a network in a fit. The rooms `pruning` and `quant` do the work."""

from swincompress_pl.callbacks.checkpoint import CompressedCheckpoint
from swincompress_pl.callbacks.primesvt import PrimeSVT
from swincompress_pl.callbacks.pruning import AdaptiveIterativePruning
from swincompress_pl.callbacks.quantization import QuantizationAwareTraining

__all__ = ["AdaptiveIterativePruning", "CompressedCheckpoint", "PrimeSVT", "QuantizationAwareTraining"]


def __dir__() -> list[str]:
    return sorted(__all__)
