"""spikingjelly's spiking transformers: adapter, pruning groups, graphs; spikingjelly is imported on first use."""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.models.spiking.adapter import SpikingAdapter
from swincompress_pl.models.spiking.memory import check_spiking, watching_spikes, without_memory

__all__ = ["SpikingAdapter", "check_spiking", "watching_spikes", "without_memory"]


def __getattr__(name: str) -> object:
    return find_old_name("models.spiking", name)
