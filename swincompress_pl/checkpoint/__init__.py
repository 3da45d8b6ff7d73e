"""The compression record in a checkpoint: written with the weights, and restored before they are loaded."""
