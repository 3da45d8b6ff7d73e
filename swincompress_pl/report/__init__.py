"""What a compression cost and what it gave: accuracy, bytes and latency.

A `RunRecord` collects them, and `write_report` renders it. Names are imported on first use, so that a measurement of
an engine (`report.comparison`) loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swincompress_pl.report.accuracy import Accuracy as Accuracy
    from swincompress_pl.report.accuracy import PairedComparison as PairedComparison
    from swincompress_pl.report.accuracy import wilson_interval as wilson_interval
    from swincompress_pl.report.curves import TrainingCurves as TrainingCurves
    from swincompress_pl.report.environment import describe_environment as describe_environment
    from swincompress_pl.report.fit_report import CompressionReport as CompressionReport
    from swincompress_pl.report.latency import Latency as Latency
    from swincompress_pl.report.latency import Ratio as Ratio
    from swincompress_pl.report.latency import measure as measure
    from swincompress_pl.report.latency import ratio as ratio
    from swincompress_pl.report.layers import LayerSparsity as LayerSparsity
    from swincompress_pl.report.layers import layer_sparsity as layer_sparsity
    from swincompress_pl.report.operations import OperationTime as OperationTime
    from swincompress_pl.report.plots.primesvt import primesvt_figures as primesvt_figures
    from swincompress_pl.report.plots.primesvt import save_primesvt_figures as save_primesvt_figures
    from swincompress_pl.report.quantization import quantization_record as quantization_record
    from swincompress_pl.report.quantization import write_quantization_report as write_quantization_report
    from swincompress_pl.report.record import Check as Check
    from swincompress_pl.report.record import Comparison as Comparison
    from swincompress_pl.report.record import PruningStep as PruningStep
    from swincompress_pl.report.record import RecordError as RecordError
    from swincompress_pl.report.record import RunRecord as RunRecord
    from swincompress_pl.report.record import Stage as Stage
    from swincompress_pl.report.sizes import Size as Size
    from swincompress_pl.report.sizes import matrix_size as matrix_size
    from swincompress_pl.report.sizes import network_size as network_size
    from swincompress_pl.report.sizes import program_macs as program_macs
    from swincompress_pl.report.sizes import program_parameters as program_parameters
    from swincompress_pl.report.sizes import program_size as program_size
    from swincompress_pl.report.spiking import SpikingCost as SpikingCost
    from swincompress_pl.report.spiking import spiking_cost as spiking_cost
    from swincompress_pl.report.training import TrainingEpoch as TrainingEpoch
    from swincompress_pl.report.write import render_report as render_report
    from swincompress_pl.report.write import write_report as write_report

_NAMES = {
    "accuracy": ("Accuracy", "PairedComparison", "wilson_interval"),
    "curves": ("TrainingCurves",),
    "environment": ("describe_environment",),
    "fit_report": ("CompressionReport",),
    "latency": ("Latency", "Ratio", "measure", "ratio"),
    "layers": ("LayerSparsity", "layer_sparsity"),
    "operations": ("OperationTime",),
    "plots.primesvt": ("primesvt_figures", "save_primesvt_figures"),
    "quantization": ("quantization_record", "write_quantization_report"),
    "record": ("Check", "Comparison", "PruningStep", "RecordError", "RunRecord", "Stage"),
    "sizes": ("Size", "matrix_size", "network_size", "program_macs", "program_parameters", "program_size"),
    "spiking": ("SpikingCost", "spiking_cost"),
    "training": ("TrainingEpoch",),
    "write": ("render_report", "write_report"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
