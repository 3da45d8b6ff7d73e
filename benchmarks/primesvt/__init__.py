"""PrimeSVT on small spiking transformers of all families: baselines, single shots, fine-tuning, ablations."""
