"""The plots of a report: of a run, of the searches, and of a quantized network."""

from typing import Any

from swincompress_pl._deprecated import find_old_name


def __getattr__(name: str) -> Any:
    return find_old_name("report.plots", name)
