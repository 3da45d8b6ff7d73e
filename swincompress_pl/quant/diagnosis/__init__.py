"""What quantization costs, and where: the errors and the costs of each quantizer, and a summary of a network."""

from swincompress_pl.quant.diagnosis.costs import Effect, QuantizerCost, cost_table, quantizer_costs
from swincompress_pl.quant.diagnosis.diagnosis import Diagnosis, diagnose
from swincompress_pl.quant.diagnosis.errors import Histogram, QuantizationError, error_table, quantization_errors

__all__ = [
    "Diagnosis",
    "Effect",
    "Histogram",
    "QuantizationError",
    "QuantizerCost",
    "cost_table",
    "diagnose",
    "error_table",
    "quantization_errors",
    "quantizer_costs",
]
