"""E-SpikeFormer (Spike-driven Transformer V3): the network itself, adapter, pruning groups, graph.

Importing this does not import spikingjelly; importing `network`, `groups` or `graph` does.
"""

from swincompress_pl.models.e_spikeformer.adapter import ESpikeFormerAdapter

__all__ = ["ESpikeFormerAdapter"]
