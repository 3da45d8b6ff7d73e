"""The integer engine against the runtimes that a user would else pick, on one architecture."""
