"""PrimeSVT: a single-shot search for spiking vision transformers."""
