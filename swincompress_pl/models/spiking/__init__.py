"""spikingjelly's spiking transformers: adapter, pruning groups, graphs. Importing this does not import spikingjelly."""

from swincompress_pl.models.spiking.adapter import SpikingAdapter, check_spiking, watching_spikes, without_memory

__all__ = ["SpikingAdapter", "check_spiking", "watching_spikes", "without_memory"]
