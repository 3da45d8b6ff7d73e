"""Where the time goes: one row per step of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from swincompress_pl import spec
from swincompress_pl.printable import printable
from swincompress_pl.spec.kinds import KINDS
from swincompress_pl.summaries import Tabulated

Counts = tuple[int, int, int]  # spikes, places of neurons, synaptic operations
ABOVE_THE_PEAK = (
    "A share of the peak above 100 % is no error: the peak is that of products in registers, measured after the steps, "
    "when the clock may have been slower. With avx2 it is that of any two operands in 16 bits; layers, whose weights "
    "are known, multiply four numbers of 8 bits where that has two. Layers over counts of spikes skip zeros."
)
_COLUMNS = (9, 6, 9, 7, 5, 9, 9, 6)  # widths of the table's columns


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One step of an engine, for a whole batch.

    A step may cover several operations that run as one; then "+" joins their names and kinds.

    Attributes:
        operation: Name of the operation.
        kind: Kind of the operation, such as "linear".
        time_ms: Median time over the repeats, in milliseconds.
        share: Part of the total time, 0 to 1.
        macs: Multiply-accumulates.
        bytes: Bytes that it reads and writes, each counted once.
        spike_rate: Spikes per place and time step, 0 to 1; None if the step has no neurons.
        sops: Synaptic operations, the additions that spikes cause; a count of k causes k of them per output that it
            reaches. None unless a layer reads spikes or counts of them.
    """

    operation: str
    kind: str
    time_ms: float
    share: float
    macs: int
    bytes: int
    spike_rate: float | None = None
    sops: int | None = None

    @property
    def gmacs_per_s(self) -> float:
        """Billions of multiply-accumulates per second."""
        return self.macs / self.time_ms / 1e6 if self.time_ms > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and `gmacs_per_s` in JSON types."""
        return {**asdict(self), "gmacs_per_s": self.gmacs_per_s}


@dataclass(frozen=True, kw_only=True)
class Profile(Tabulated):
    """The times of an engine's steps, in order of execution; `str(profile)` is a table.

    A profile has a length, and its rows can be iterated over and indexed.

    Attributes:
        rows: One row per step.
        implementation: Name of the kernels.
        threads: Number of threads.
        images: Images in the batch.
        peak_gmacs_per_s: What the kernels' products reach with operands in registers on as many threads, measured with
            the rows; None for the reference. With avx2 a layer may exceed it: the peak is that of two numbers in 16
            bits at a time, and weights are known, so that four in 8 bits can be. Layers over spikes skip zeros.
    """

    rows: tuple[ProfileRow, ...] = field(repr=False)
    implementation: str
    threads: int
    images: int
    peak_gmacs_per_s: float | None = None

    @property
    def time_ms(self) -> float:
        """The time of all steps, in milliseconds."""
        return sum(row.time_ms for row in self.rows)

    @property
    def macs(self) -> int:
        """The multiply-accumulates of all steps."""
        return sum(row.macs for row in self.rows)

    @property
    def sops(self) -> int | None:
        """The synaptic operations of all steps; None for a network without spikes."""
        found = [row.sops for row in self.rows if row.sops is not None]
        return sum(found) if found else None

    def peak_share(self, row: ProfileRow) -> float | None:
        """Computes the part of the peak that a row reaches.

        Args:
            row: A row of this profile.

        Returns:
            The part, 0 to about 1; None if the row has no multiply-accumulates or the peak is unknown.
        """
        if not row.macs or self.peak_gmacs_per_s is None:
            return None
        return row.gmacs_per_s / self.peak_gmacs_per_s

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ProfileRow]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> ProfileRow:
        return self.rows[number]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything in JSON types."""
        return {
            "implementation": self.implementation,
            "threads": self.threads,
            "images": self.images,
            "time_ms": self.time_ms,
            "macs": self.macs,
            "sops": self.sops,
            "peak_gmacs_per_s": self.peak_gmacs_per_s,
            "rows": [row.to_dict() | {"peak_share": self.peak_share(row)} for row in self.rows],
        }

    def __str__(self) -> str:
        names = [printable(row.operation) for row in self.rows] + ["total"]
        width = max(*map(len, names), len("operation"))
        kinds = max(max((len(row.kind) for row in self.rows), default=0), len("kind"))
        spiking = self.sops is not None
        titles = ("ms", "share", "MMAC", "GMAC/s", "peak", "kB") + (("MSOP", "spikes") if spiking else ())
        head = f"{'operation':{width}}  {'kind':{kinds}}  " + "  ".join(
            f"{title:>{size}}" for title, size in zip(titles, _COLUMNS, strict=False)
        )
        peak = "" if self.peak_gmacs_per_s is None else f", peak {self.peak_gmacs_per_s:.0f} GMAC/s"
        lines = [f"{self.images} images, {self.implementation}, {self.threads} threads{peak}", head, "-" * len(head)]
        total = ProfileRow(
            operation="total",
            kind="",
            time_ms=self.time_ms,
            share=1.0,
            macs=self.macs,
            bytes=sum(row.bytes for row in self.rows),
            sops=self.sops,
        )
        for name, row in zip(names, (*self.rows, total), strict=True):
            cells = [f"{row.time_ms:9.4f}", f"{row.share:6.1%}", f"{row.macs / 1e6:9.3f}", f"{row.gmacs_per_s:7.1f}"]
            reached = self.peak_share(row)
            cells += ["" if reached is None else f"{reached:5.0%}", f"{row.bytes / 1e3:9.1f}"]
            if spiking:
                cells += ["" if row.sops is None else f"{row.sops / 1e6:9.3f}"]
                cells += ["" if row.spike_rate is None else f"{row.spike_rate:6.1%}"]
            line = f"{name:{width}}  {row.kind:{kinds}}  " + "  ".join(
                f"{cell:>{size}}" for cell, size in zip(cells, _COLUMNS, strict=False)
            )
            lines.append(line.rstrip())
        if any((self.peak_share(row) or 0) > 1 for row in self.rows):
            lines.append(ABOVE_THE_PEAK)
        return "\n".join(lines)


def _reads_spikes(op: spec.Operation, values: Mapping[str, spec.Value]) -> bool:
    """Whether this is a layer over spikes or counts of them, and not over pixels or other numbers."""
    x = values[op.inputs[0]]
    return op.kind in ("linear", "conv2d") and x.dtype.startswith("uint") and x.reach < 255


def spike_counts(
    program: spec.Program, values: Mapping[str, spec.Value], seen: Mapping[str, Any], number: int
) -> Counts:
    """(spikes, places, synaptic operations) of operation `number`, from its values in `seen`, as the engine counts."""
    op = program.operations[number]
    spikes = places = 0
    counts = "largest" in op.attributes and op.kind != "integrate"
    if counts or op.kind in ("lif", "fire"):
        spikes = int(seen[op.output].sum())
        places = seen[op.output].size * (op.attributes["largest"] if counts else 1)
    if not _reads_spikes(op, values):
        return spikes, places, 0
    ones = {"weight": np.ones_like(program.tensors[op.tensors["weight"]])}
    ones |= {"bias": np.zeros(values[op.output].channels, np.int32)}
    ones |= {"mult": np.full(values[op.output].channels, 2**21, np.int32)}
    ones |= {"shift": np.full(values[op.output].channels, 21, np.uint8)}
    attributes = {key: value for key, value in op.attributes.items() if key != "largest"}
    counted = KINDS[op.kind].run([seen[op.inputs[0]]], ones, attributes, "int32")
    return spikes, places, int(counted.astype(np.int64).sum())


def profile_of(
    program: spec.Program,
    steps: Sequence[Sequence[int]],
    times_ms: Sequence[float],
    counts: Sequence[Counts],
    *,
    implementation: str,
    threads: int,
    images: int,
    peak_gmacs_per_s: float | None = None,
) -> Profile:
    """Joins measured times and counts with the Program's costs; `steps` has the operations of each, by number."""
    costs = spec.costs(program)
    values = spec.check(program)
    total_ms = sum(times_ms) or 1.0
    rows = []
    for covered, time_ms, (spikes, places, counted) in zip(steps, times_ms, counts, strict=True):
        operations = [program.operations[number] for number in covered]
        written = {op.output for op in operations}
        read = {name for op in operations for name in op.inputs} - written
        moved = sum(values[name].size_bytes for name in read) + values[operations[-1].output].size_bytes
        keys = {key for op in operations for key in op.tensors.values()}
        rows.append(
            ProfileRow(
                operation="+".join(op.name for op in operations),
                kind="+".join(op.kind for op in operations),
                time_ms=time_ms,
                share=time_ms / total_ms,
                macs=images * sum(costs[number].macs for number in covered),
                bytes=images * moved + sum(program.tensors[key].nbytes for key in keys),
                spike_rate=spikes / places if places else None,
                sops=counted if _reads_spikes(program.operations[covered[0]], values) else None,
            )
        )
    return Profile(
        rows=tuple(rows),
        implementation=implementation,
        threads=threads,
        images=images,
        peak_gmacs_per_s=peak_gmacs_per_s,
    )
