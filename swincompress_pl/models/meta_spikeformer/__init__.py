"""Meta-SpikeFormer (Spike-driven Transformer v2): the network itself, adapter, pruning groups, graph.

Importing this does not import spikingjelly; importing `network`, `groups` or `graph` does.
"""

from swincompress_pl._deprecated import find_old_name
from swincompress_pl.models.meta_spikeformer.adapter import MetaSpikeFormerAdapter

__all__ = ["MetaSpikeFormerAdapter"]


def __getattr__(name: str) -> object:
    return find_old_name("models.meta_spikeformer", name)
