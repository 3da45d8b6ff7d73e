"""Benchmarks: reports with everything a reader needs to judge them, never gates."""
