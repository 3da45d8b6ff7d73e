"""The adaptive iterative (round-robin) search."""
