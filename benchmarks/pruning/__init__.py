"""Pruning measured: see README.md beside this file."""
