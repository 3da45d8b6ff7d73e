"""Numbers as a report and a terminal show them."""

from __future__ import annotations


def megabytes(size_bytes: int | None) -> str:
    """Bytes as MB of 10**6 bytes, or as kB below 1 MB; "-" for None."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def unit_of(largest: float) -> tuple[float, str]:
    """The unit that keeps a count short, such as (1e6, "M")."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size:
            return size, name
    return 1.0, ""


def count(value: int | None) -> str:
    """A count with the unit that keeps it short, such as 28.29 M; "-" for None."""
    if value is None:
        return "-"
    size, name = unit_of(value)
    return f"{value / size:.4g} {name}" if name else str(value)


def duration(seconds: float) -> str:
    """A duration such as 45 s, 12 min or 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def change(before: int, after: int | None) -> str:
    """The change of a count, such as 4 M -> 1 M, 75.0 % removed."""
    if after is None:
        return f"{count(before)} before, unknown after"
    return f"{count(before)} -> {count(after)}, {100 * (1 - after / before):.1f} % removed"


def many(number: int, what: str) -> str:
    """A number with its noun, such as 1 thread or 2 threads."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def figure(value: float | None, form: str) -> str:
    """A number in a format; "-" for None."""
    return "-" if value is None else format(value, form)
