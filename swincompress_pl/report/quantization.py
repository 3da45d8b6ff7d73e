"""The report of one quantized network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swincompress_pl.quant.diagnosis.diagnosis import Diagnosis
from swincompress_pl.report.accuracy import Accuracy, PairedComparison
from swincompress_pl.report.diagnosis import read_diagnosis
from swincompress_pl.report.environment import describe_environment
from swincompress_pl.report.record import RunRecord
from swincompress_pl.report.write import write_report


def quantization_record(
    diagnosis: Diagnosis | Mapping[str, Any], *, name: str = "Quantization", data: str = ""
) -> RunRecord:
    """Makes a record of one diagnosis; with labels, also of the accuracies.

    Args:
        diagnosis: What `quant.diagnose` gave, or its plain data.
        name: Title of the report.
        data: What the images are, for the reader; by default their number.

    Returns:
        The record.

    Raises:
        ValueError: If the diagnosis is of another version, incomplete or ill-typed.
    """
    plain = diagnosis.to_dict() if isinstance(diagnosis, Diagnosis) else diagnosis
    known = read_diagnosis(plain)
    record = RunRecord(name=name, environment=describe_environment(), data=data or f"{known.images} images")
    record.add_quantization(plain)
    if known.paired is not None:
        paired = PairedComparison.from_dict(known.paired)
        result = "simulation" if known.integer is None else "integers"
        for stage, right in (("float", paired.right_to_wrong), (result, paired.wrong_to_right)):
            accuracy = Accuracy(correct=paired.both_right + right, images=paired.images)
            record.add_stage(stage, accuracy=accuracy)
        record.add_comparison(f"{result} against float", paired)
    return record


def write_quantization_report(
    diagnosis: Diagnosis | Mapping[str, Any], directory: str | Path, *, name: str = "Quantization", data: str = ""
) -> Path:
    """Writes the report of one quantized network: report.json, report.md, report.html and the plots.

    Args:
        diagnosis: What `quant.diagnose(quantized, images, labels)` gave, or its plain data.
        directory: Where the files go; it is made if needed.
        name: Title of the report.
        data: What the images are, for the reader; by default their number.

    Returns:
        The path of report.md.

    Raises:
        NotADirectoryError: If `directory` is a file.
        ValueError: If the diagnosis is of another version, incomplete or ill-typed.
    """
    return write_report(quantization_record(diagnosis, name=name, data=data), directory)
