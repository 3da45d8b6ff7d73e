"""The time of each operation of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swincompress_pl import accel
from swincompress_pl.report.plain import Plain


@dataclass(frozen=True, kw_only=True)
class OperationTime(Plain):
    """One operation of an engine.

    Attributes:
        name: Name of the operation; names that are joined by "+" ran as one.
        kind: Kind of the operation, such as "linear".
        time_ms: Time per call, in milliseconds.
        macs: Multiply-accumulates per call.
        size_bytes: Bytes per call that it moves: weights, inputs and output.
        peak_share: Part of the peak of the kernels' products that it reaches, 0 to about 1; None if it is unknown.
    """

    name: str
    kind: str
    time_ms: float
    macs: int = 0
    size_bytes: int = 0
    peak_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types, without an unknown share."""
        fields = super().to_dict()
        return fields if self.peak_share is not None else {k: v for k, v in fields.items() if k != "peak_share"}


def operation_times(profile: accel.Profile) -> list[OperationTime]:
    """An engine's profile as values of a record."""
    return [
        OperationTime(
            name=row.operation,
            kind=row.kind,
            time_ms=row.time_ms,
            macs=row.macs,
            size_bytes=row.bytes,
            peak_share=profile.peak_share(row),
        )
        for row in profile
    ]
