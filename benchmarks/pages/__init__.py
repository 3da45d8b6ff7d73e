"""The pages of docs/results and the README's plot, from the JSON that is committed in benchmarks/results."""

from .write import DOCS, RESULTS, write_pages

__all__ = ["DOCS", "RESULTS", "write_pages"]
