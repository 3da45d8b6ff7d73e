"""Where the time goes: one row a step of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swincompress_pl import norm


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One step for a whole batch: `time_ms` is the median over the repeats, `bytes` what it reads and writes once.

    A step may cover several operations that run as one; then `operation` and `kind` join theirs with `+`.
    """

    operation: str
    kind: str
    time_ms: float
    share: float
    macs: int
    bytes: int

    @property
    def gmacs_per_s(self) -> float:
        """Billions of multiply-accumulates a second."""
        return self.macs / self.time_ms / 1e6 if self.time_ms > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gmacs_per_s": self.gmacs_per_s}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The rows in order of execution; `str(profile)` is a table."""

    rows: tuple[ProfileRow, ...]
    implementation: str
    threads: int
    images: int

    @property
    def time_ms(self) -> float:
        return sum(row.time_ms for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ProfileRow]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> ProfileRow:
        return self.rows[number]

    def to_dict(self) -> dict[str, Any]:
        return {
            "implementation": self.implementation,
            "threads": self.threads,
            "images": self.images,
            "time_ms": self.time_ms,
            "macs": self.macs,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        width = max((len(row.operation) for row in self.rows), default=0)
        width = max(width, len("operation"))
        kinds = max(max((len(row.kind) for row in self.rows), default=0), len("kind"))
        head = f"{'operation':{width}}  {'kind':{kinds}}" + "  {:>9}  {:>6}  {:>9}  {:>7}  {:>9}".format(
            "ms", "share", "MMAC", "GMAC/s", "kB"
        )
        lines = [f"{self.images} images, {self.implementation}, {self.threads} threads", head, "-" * len(head)]
        total = ProfileRow(
            operation="total",
            kind="",
            time_ms=self.time_ms,
            share=1.0,
            macs=self.macs,
            bytes=sum(row.bytes for row in self.rows),
        )
        for row in (*self.rows, total):
            lines.append(
                f"{row.operation:{width}}  {row.kind:{kinds}}  {row.time_ms:9.4f}  {row.share:6.1%}"
                f"  {row.macs / 1e6:9.3f}  {row.gmacs_per_s:7.1f}  {row.bytes / 1e3:9.1f}"
            )
        return "\n".join(lines)


def profile_of(
    program: norm.Program,
    steps: Sequence[Sequence[int]],
    times_ms: Sequence[float],
    *,
    implementation: str,
    threads: int,
    images: int,
) -> Profile:
    """Joins measured times with the Program's costs. steps: the numbers of the operations that every time covers."""
    costs = norm.costs(program)
    values = norm.check(program)
    total_ms = sum(times_ms) or 1.0
    rows = []
    for covered, time_ms in zip(steps, times_ms, strict=True):
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
            )
        )
    return Profile(rows=tuple(rows), implementation=implementation, threads=threads, images=images)
