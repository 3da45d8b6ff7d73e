"""What a compression cost and what it gave: accuracy, bytes, latency; collected in a `RunRecord`, rendered by
`write_report`."""

from swincompress_pl.report.accuracy import Accuracy, PairedComparison, wilson_interval
from swincompress_pl.report.environment import describe_environment
from swincompress_pl.report.latency import Latency, Ratio, measure, ratio
from swincompress_pl.report.layers import layer_sparsity
from swincompress_pl.report.plots.primesvt import primesvt_figures, save_primesvt_figures
from swincompress_pl.report.quantization import quantization_record, write_quantization_report
from swincompress_pl.report.record import (
    Check,
    Comparison,
    LayerSparsity,
    OperationTime,
    PruningStep,
    RecordError,
    RunRecord,
    Stage,
)
from swincompress_pl.report.sizes import Size, matrix_size, network_size, program_macs, program_parameters, program_size
from swincompress_pl.report.spiking import SpikingCost, spiking_cost
from swincompress_pl.report.write import render_report, write_report

__all__ = [
    "Accuracy",
    "Check",
    "Comparison",
    "Latency",
    "LayerSparsity",
    "OperationTime",
    "PairedComparison",
    "PruningStep",
    "Ratio",
    "RecordError",
    "RunRecord",
    "Size",
    "SpikingCost",
    "Stage",
    "describe_environment",
    "layer_sparsity",
    "matrix_size",
    "measure",
    "network_size",
    "primesvt_figures",
    "program_macs",
    "program_parameters",
    "program_size",
    "quantization_record",
    "ratio",
    "render_report",
    "save_primesvt_figures",
    "spiking_cost",
    "wilson_interval",
    "write_quantization_report",
    "write_report",
]
